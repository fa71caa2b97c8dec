//! Tar streams written field by field, so that a test can make any corner of the format, valid or not.
//!
//! Formats: POSIX.1-2001 pax (ustar header, `x` records), GNU (`L`, `K`, `S` entries and base-256 numbers), as described in
//! GNU tar's manual, "Basic Tar Format" and "Storing Sparse Files".

const BLOCK: usize = 512;

/// A tar stream under construction. Every method returns `self` so that corners read as one expression.
#[derive(Default, Clone)]
pub struct Tar {
    bytes: Vec<u8>,
}

/// The fields of one header. Defaults: a regular file, mode 0644, owner 0:0, time 1,600,000,000.
#[derive(Clone)]
pub struct Header {
    pub name: Vec<u8>,
    pub kind: u8,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub size: u64,
    pub mtime: i64,
    pub link: Vec<u8>,
    pub device: (u32, u32),
    /// `ustar\0` + `00`, or GNU's `ustar  \0`.
    pub gnu: bool,
    /// Written over the finished block before its checksum, as (offset, bytes).
    pub patches: Vec<(usize, Vec<u8>)>,
}

impl Header {
    pub fn new(name: impl AsRef<[u8]>, kind: u8) -> Self {
        let mode = if kind == b'5' { 0o755 } else { 0o644 };
        Self {
            name: name.as_ref().to_vec(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 1_600_000_000,
            link: Vec::new(),
            device: (0, 0),
            gnu: false,
            patches: Vec::new(),
        }
    }

    /// The 512 bytes, checksum included.
    pub fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        put(&mut block, 0, 100, &self.name);
        number(&mut block, 100, 8, i128::from(self.mode));
        number(&mut block, 108, 8, i128::from(self.uid));
        number(&mut block, 116, 8, i128::from(self.gid));
        number(&mut block, 124, 12, i128::from(self.size));
        number(&mut block, 136, 12, i128::from(self.mtime));
        block[156] = self.kind;
        put(&mut block, 157, 100, &self.link);
        put(&mut block, 257, 8, if self.gnu { b"ustar  \0" } else { b"ustar\x0000" });
        if matches!(self.kind, b'3' | b'4') {
            number(&mut block, 329, 8, i128::from(self.device.0));
            number(&mut block, 337, 8, i128::from(self.device.1));
        }
        for (at, bytes) in &self.patches {
            put(&mut block, *at, bytes.len(), bytes);
        }
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        put(&mut block, 148, 8, format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// Copies as much of `bytes` as fits.
fn put(block: &mut [u8; BLOCK], at: usize, room: usize, bytes: &[u8]) {
    let length = bytes.len().min(room);
    block[at..at + length].copy_from_slice(&bytes[..length]);
}

/// Octal with a terminating NUL where it fits, else GNU's base-256: two's complement, big-endian, top bit set.
fn number(block: &mut [u8; BLOCK], at: usize, room: usize, value: i128) {
    let octal = format!("{value:0width$o}\0", width = room - 1);
    if value >= 0 && octal.len() == room {
        put(block, at, room, octal.as_bytes());
        return;
    }
    let bytes = value.to_be_bytes();
    put(block, at, room, &bytes[bytes.len() - room..]);
    block[at] |= 0x80;
}

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    /// A header with `data` behind it; the header's size is the data's unless it was set.
    #[must_use]
    pub fn entry(mut self, mut header: Header, data: &[u8]) -> Self {
        if header.size == 0 {
            header.size = data.len() as u64;
        }
        self.bytes.extend_from_slice(&header.block());
        self.raw(data)
    }

    /// Bytes, padded to a block.
    #[must_use]
    pub fn raw(mut self, data: &[u8]) -> Self {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        self
    }

    #[must_use]
    pub fn file(self, name: impl AsRef<[u8]>, data: &[u8]) -> Self {
        self.entry(Header::new(name, b'0'), data)
    }

    #[must_use]
    pub fn program(self, name: impl AsRef<[u8]>, data: &[u8]) -> Self {
        self.entry(Header { mode: 0o755, ..Header::new(name, b'0') }, data)
    }

    #[must_use]
    pub fn dir(self, name: impl AsRef<[u8]>) -> Self {
        self.entry(Header::new(name, b'5'), b"")
    }

    #[must_use]
    pub fn symlink(self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.entry(
            Header { link: target.as_ref().to_vec(), mode: 0o777, ..Header::new(name, b'2') },
            b"",
        )
    }

    #[must_use]
    pub fn hard_link(self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.entry(Header { link: target.as_ref().to_vec(), ..Header::new(name, b'1') }, b"")
    }

    /// `kind` is `b'3'` (character) or `b'4'` (block).
    #[must_use]
    pub fn device(self, name: impl AsRef<[u8]>, kind: u8, major: u32, minor: u32) -> Self {
        self.entry(Header { device: (major, minor), ..Header::new(name, kind) }, b"")
    }

    /// Pax records for the entry that follows.
    #[must_use]
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let data: Vec<u8> =
            records.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
        self.entry(Header::new("PaxHeaders/x", b'x'), &data)
    }

    /// Pax records for all entries that follow.
    #[must_use]
    pub fn global_pax(self, records: &[(&str, &[u8])]) -> Self {
        let data: Vec<u8> =
            records.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
        self.entry(Header::new("pax_global_header", b'g'), &data)
    }

    /// GNU's long name (`b'L'`) or long link target (`b'K'`) for the entry that follows.
    #[must_use]
    pub fn gnu_long(self, kind: u8, value: &[u8]) -> Self {
        let mut data = value.to_vec();
        data.push(0);
        self.entry(Header { gnu: true, ..Header::new("././@LongLink", kind) }, &data)
    }

    /// A sparse file in the old GNU format (`S`): up to four extents in the header, 21 in each extension block.
    #[must_use]
    pub fn gnu_sparse(self, name: &str, real_size: u64, extents: &[(u64, &[u8])]) -> Self {
        let data: Vec<u8> = extents.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
        let field = |value: u64| format!("{value:011o}\0").into_bytes();
        let pair = |(at, bytes): &(u64, &[u8])| [field(*at), field(bytes.len() as u64)].concat();
        let (first, rest) = extents.split_at(extents.len().min(4));
        let mut header = Header { gnu: true, size: data.len() as u64, ..Header::new(name, b'S') };
        header.patches.push((386, first.iter().flat_map(pair).collect()));
        header.patches.push((482, vec![u8::from(!rest.is_empty())]));
        header.patches.push((483, field(real_size)));
        let mut tar = self.entry(header, b"");
        let mut chunks = rest.chunks(21).peekable();
        while let Some(chunk) = chunks.next() {
            let mut block: Vec<u8> = chunk.iter().flat_map(pair).collect();
            block.resize(BLOCK, 0);
            block[504] = u8::from(chunks.peek().is_some());
            tar = tar.raw(&block);
        }
        tar.raw(&data)
    }

    /// The stream with its two closing blocks.
    pub fn end(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }

    /// The stream as it is, without an end.
    pub fn cut(self) -> Vec<u8> {
        self.bytes
    }
}

/// `<length> <key>=<value>\n`, where the length counts itself.
fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut length = body + 1;
    while body + length.to_string().len() != length {
        length = body + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
}

#[cfg(test)]
mod tests {
    use super::{Tar, pax_record};

    #[test]
    fn pax_lengths_count_themselves() {
        for (key, value, expected) in [
            ("path", "a", "9 path=a\n".to_owned()),
            ("k", &*"v".repeat(93), format!("99 k={}\n", "v".repeat(93))),
            ("k", &*"v".repeat(94), format!("101 k={}\n", "v".repeat(94))),
        ] {
            assert_eq!(pax_record(key, value.as_bytes()), expected.as_bytes());
        }
    }

    #[test]
    fn system_tar_reads_it() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("t.tar");
        let long = format!("{}/file", "d".repeat(120));
        let tar = Tar::new()
            .dir("a/")
            .file("a/b", b"hello")
            .symlink("a/c", "b")
            .pax(&[("path", long.as_bytes())])
            .file("short", b"x")
            .gnu_sparse("holes", 10_000, &[(0, b"start"), (9_990, b"endendend.")]);
        std::fs::write(&file, tar.end())?;
        let listing = crate::command::run("tar", ["-tvf".as_ref(), file.as_os_str()])?;
        for part in ["a/b", "a/c -> b", &long, "10000"] {
            assert!(listing.contains(part), "{part} is not in {listing}");
        }
        Ok(())
    }
}
