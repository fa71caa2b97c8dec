//! A tar stream walked as it arrives: bytes are pushed in, entries come out.
//!
//! Owns: the tar dialects (v7, ustar, PAX, GNU, sparse files) and where each file's bytes lie in the
//! stream. Does not own: what entries mean together (see [`crate::tree`]). File contents are never
//! held: an [`Entry`] says at which offsets of the stream they are.
//!
//! Where dialects leave room, this follows Go's `archive/tar`, which containerd and umoci unpack
//! with: global PAX headers are read over, entries of links, directories and devices have no
//! payload, two zero blocks end the archive and whatever follows them is ignored.
//!
//! Invariants:
//! - The entries do not depend on how the stream was split into pushes.
//! - Memory is bounded by [`Limits`], whatever the stream declares.

mod header;
mod path;
mod pax;
mod sparse;
#[cfg(test)]
mod tests;

pub use path::{clean as clean_path, display as display_path};

use header::{Header, Type};
use pax::Records;
use sparse::SparseMap;

/// Size of a tar block; headers and payloads are padded to it.
pub const BLOCK: u64 = 512;

const BLOCK_LEN: usize = 512;
/// Largest PAX header, long name or sparse map, as in Go's `archive/tar`.
const MAX_SPECIAL: u64 = 1 << 20;

/// What a tar stream may ask for before it is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries, counting those that later ones replace.
    pub entries: u64,
    /// Bytes of a path.
    pub path_bytes: usize,
    /// Components of a path.
    pub depth: usize,
    /// Bytes of all extended attributes of one entry, names and values.
    pub xattr_bytes: usize,
    /// Bytes of the stream, and of the data file that holds it. 2³² blocks of 512 bytes at most.
    pub data_bytes: u64,
    /// Logical bytes of one sparse file.
    pub sparse_bytes: u64,
    /// Memory for the tree, in bytes (estimated).
    pub metadata_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 4_000_000,
            path_bytes: 4096,
            depth: 256,
            xattr_bytes: 256 << 10,
            data_bytes: 2 << 40,
            sparse_bytes: 16 << 40,
            metadata_bytes: 2 << 30,
        }
    }
}

/// One member of the archive, with all extension headers applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Cleaned path below the root: components joined by `/`, no `.` or `..`. Empty: the root.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permission bits, `0o7777` at most.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970 (may be negative) and nanoseconds (always added).
    pub mtime: (i64, u32),
    /// Full names and values, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Logical size; 0 for everything that is not a file.
    pub size: u64,
    /// Where the file's bytes lie, ascending in `logical`; what no extent covers reads as zeros.
    pub data: Vec<Extent>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Dir,
    File,
    /// The target as it stands in the archive.
    Symlink {
        target: Vec<u8>,
    },
    /// The target as a cleaned path below the root.
    HardLink {
        target: Vec<u8>,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A run of a file's bytes in the stream (or in the data file).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file.
    pub logical: u64,
    pub len: u64,
    /// Offset in the stream.
    pub at: u64,
}

/// Why a stream was refused. `at` is an offset in the tar stream.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("tar header at byte {at} is invalid: {reason}")]
    Header { at: u64, reason: &'static str },
    #[error("PAX header at byte {at} is invalid: {reason}")]
    Pax { at: u64, reason: &'static str },
    #[error("sparse map of {path:?} (tar header at byte {at}) is invalid: {reason}")]
    Sparse { at: u64, path: String, reason: &'static str },
    #[error("extension header at byte {at} has {len} bytes; at most {limit} are accepted")]
    SpecialTooLong { at: u64, len: u64, limit: u64 },
    #[error(
        "{path:?} (tar header at byte {at}) declares {len} bytes, more than the {limit} that a layer may hold"
    )]
    TooLarge { at: u64, path: String, len: u64, limit: u64 },
    #[error("the archive has more than {limit} entries (at byte {at})")]
    TooManyEntries { at: u64, limit: u64 },
    #[error(
        "path of {len} bytes starting {start:?} (tar header at byte {at}) is longer than {limit} bytes"
    )]
    PathTooLong { at: u64, start: String, len: usize, limit: usize },
    #[error("path {start:?}… (tar header at byte {at}) is deeper than {limit} directories")]
    PathTooDeep { at: u64, start: String, limit: usize },
    #[error(
        "extended attributes of {path:?} (tar header at byte {at}) take {len} bytes; at most {limit} are accepted"
    )]
    XattrsTooLarge { at: u64, path: String, len: usize, limit: usize },
    #[error("the archive is cut short: it ends at byte {at} inside {inside}")]
    Truncated { at: u64, inside: String },
    #[error("place {path:?} (tar header at byte {at})")]
    Sink { at: u64, path: String, source: Box<dyn std::error::Error + Send + Sync> },
}

/// The walk: push the stream's bytes in order, then [`finish`](TarWalk::finish).
#[derive(Debug)]
pub struct TarWalk {
    limits: Limits,
    /// Bytes of the stream seen so far.
    at: u64,
    /// Where the header of the current entry starts.
    header_at: u64,
    state: State,
    /// What the current state collects.
    buf: Vec<u8>,
    entries: u64,
    /// Extension headers that wait for the entry they describe.
    pending: Pending,
}

#[derive(Debug, Default)]
struct Pending {
    pax: Option<Records>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Pending {
    /// What still waits for its entry.
    fn subject(&self) -> Option<&'static str> {
        match self {
            Self { pax: Some(_), .. } => Some("a PAX header"),
            Self { long_name: Some(_), .. } => Some("a GNU long name"),
            Self { long_link: Some(_), .. } => Some("a GNU long link target"),
            _ => None,
        }
    }
}

#[derive(Debug)]
enum State {
    /// Collects a header block. `zero`: the block before it was all zeros.
    Header { zero: bool },
    /// Collects the payload of an extension header.
    Special { typ: Type, len: u64 },
    /// Collects the next block of a sparse map: a GNU extension header, or (PAX 1.0) what stands
    /// before the data in the payload.
    SparseMap { header: Box<Header>, map: SparseMap },
    /// Passes over a payload and its padding.
    Payload { path: String, left: u64, pad: u64 },
    /// After the end mark.
    Ended,
}

type Sink<'a> = &'a mut dyn FnMut(Entry) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

impl TarWalk {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            at: 0,
            header_at: 0,
            state: State::Header { zero: false },
            buf: Vec::new(),
            entries: 0,
            pending: Pending::default(),
        }
    }

    /// Takes the next bytes of the stream; `sink` gets each entry as soon as its headers are
    /// complete, before its payload has passed.
    ///
    /// # Errors
    /// The first thing wrong with the stream, or what `sink` refused. The walk is useless after.
    pub fn push(&mut self, mut bytes: &[u8], sink: Sink<'_>) -> Result<(), Error> {
        while !bytes.is_empty() {
            let taken = match &mut self.state {
                State::Ended => bytes.len(),
                State::Payload { left, pad, .. } => pass(left, &mut bytes) + pass(pad, &mut bytes),
                State::Special { len, .. } => {
                    let want = usize::try_from(*len).unwrap_or(usize::MAX);
                    collect(&mut self.buf, want, &mut bytes)
                }
                State::Header { .. } | State::SparseMap { .. } => {
                    collect(&mut self.buf, BLOCK_LEN, &mut bytes)
                }
            };
            self.at = self.at.saturating_add(taken as u64);
            match &self.state {
                State::Ended => return Ok(()),
                State::Payload { left: 0, pad: 0, .. } => {
                    self.state = State::Header { zero: false }
                }
                State::Payload { .. } => {}
                State::Special { typ, len } if self.buf.len() as u64 == *len => {
                    let typ = *typ;
                    self.special(typ)?;
                }
                State::Special { .. } => {}
                _ if self.buf.len() == BLOCK_LEN => self.block(sink)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// The length of the stream, once all of it was pushed.
    ///
    /// # Errors
    /// [`Error::Truncated`] when it ends inside a header or a payload. The end mark and the padding
    /// of the last payload may be missing.
    pub fn finish(self) -> Result<u64, Error> {
        let inside = match &self.state {
            State::Header { .. } if self.buf.is_empty() => match self.pending.subject() {
                None => return Ok(self.at),
                Some(what) => format!("{what}, before the entry it belongs to"),
            },
            State::Ended | State::Payload { left: 0, .. } => return Ok(self.at),
            State::Header { .. } => "a header".to_owned(),
            State::Special { .. } => "an extension header".to_owned(),
            State::SparseMap { header, .. } => {
                format!("the sparse map of {:?}", display_path(&header.name))
            }
            State::Payload { path, left, .. } => {
                format!("the contents of {path:?}, of which {left} bytes are missing")
            }
        };
        Err(Error::Truncated { at: self.at, inside })
    }

    /// A whole block has been collected in `buf`.
    fn block(&mut self, sink: Sink<'_>) -> Result<(), Error> {
        let block = std::mem::take(&mut self.buf);
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Header { zero } => {
                self.header_at = self.at - BLOCK;
                if block.iter().all(|b| *b == 0) {
                    self.state = if zero { State::Ended } else { State::Header { zero: true } };
                    return Ok(());
                }
                if zero {
                    return Err(
                        self.bad_header("it follows a block of zeros, the archive's end mark")
                    );
                }
                let header = Header::parse(&block).map_err(|reason| self.bad_header(reason))?;
                self.header(header, sink)
            }
            State::SparseMap { mut header, mut map } => {
                let in_payload = map.in_payload();
                map.push(&block).map_err(|reason| self.bad_sparse(&header, reason))?;
                if in_payload {
                    let left = header.size.checked_sub(BLOCK);
                    header.size = left
                        .ok_or_else(|| self.bad_sparse(&header, "it is longer than the payload"))?;
                }
                self.sparse(header, map, sink)
            }
            State::Special { .. } | State::Payload { .. } | State::Ended => Ok(()),
        }
    }

    /// A header block other than the end mark: of an extension, or of an entry.
    fn header(&mut self, mut header: Header, sink: Sink<'_>) -> Result<(), Error> {
        if header.typ.is_special() {
            if header.size > MAX_SPECIAL {
                let (at, len) = (self.header_at, header.size);
                return Err(Error::SpecialTooLong { at, len, limit: MAX_SPECIAL });
            }
            self.state = State::Special { typ: header.typ, len: header.size };
            return if header.size == 0 { self.special(header.typ) } else { Ok(()) };
        }
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(Error::TooManyEntries { at: self.header_at, limit: self.limits.entries });
        }
        let Pending { pax, long_name, long_link } = std::mem::take(&mut self.pending);
        let records = pax.unwrap_or_default();
        let at = self.header_at;
        header.apply(&records).map_err(|reason| Error::Pax { at, reason })?;
        header.name = long_name.filter(|n| !n.is_empty()).unwrap_or(header.name);
        header.link = long_link.filter(|n| !n.is_empty()).unwrap_or(header.link);
        header.settle_type();
        match SparseMap::of(&mut header, &records).map_err(|r| self.bad_sparse(&header, r))? {
            Some(map) => self.sparse(Box::new(header), map, sink),
            None => {
                let whole = Extent { logical: 0, len: header.size, at: self.at };
                let size = header.size;
                self.entry(header, size, vec![whole], sink)
            }
        }
    }

    /// A sparse map, complete or not.
    fn sparse(&mut self, header: Box<Header>, map: SparseMap, sink: Sink<'_>) -> Result<(), Error> {
        if !map.is_complete() {
            self.state = State::SparseMap { header, map };
            return Ok(());
        }
        let (size, limit) = (map.size(), self.limits.sparse_bytes);
        if size > limit {
            let path = display_path(&header.name);
            return Err(Error::TooLarge { at: self.header_at, path, len: size, limit });
        }
        let data = map.extents(self.at, header.size);
        let data = data.map_err(|reason| self.bad_sparse(&header, reason))?;
        self.entry(*header, size, data, sink)
    }

    /// All headers of an entry are complete and the stream stands at its payload.
    fn entry(
        &mut self,
        header: Header,
        size: u64,
        mut data: Vec<Extent>,
        sink: Sink<'_>,
    ) -> Result<(), Error> {
        let at = self.header_at;
        let path = clean_path(&header.name);
        self.check_path(&header.name, &path)?;
        let payload = if header.typ.has_payload() { header.size } else { 0 };
        let padded = payload.checked_next_multiple_of(BLOCK);
        let end = padded.and_then(|len| self.at.checked_add(len));
        if end.is_none_or(|end| end > self.limits.data_bytes) {
            let (path, limit) = (display_path(&path), self.limits.data_bytes);
            return Err(Error::TooLarge { at, path, len: payload, limit });
        }
        let pad = padded.map_or(0, |padded| padded - payload);
        self.state = State::Payload { path: display_path(&path), left: payload, pad };
        if payload == 0 {
            self.state = State::Header { zero: false };
        }
        let kind = header.kind().map_err(|reason| self.bad_header(reason))?;
        let Some(kind) = kind else { return Ok(()) };
        let xattr_len = header.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        if xattr_len > self.limits.xattr_bytes {
            let (path, limit) = (display_path(&path), self.limits.xattr_bytes);
            return Err(Error::XattrsTooLarge { at, path, len: xattr_len, limit });
        }
        let is_file = kind == Kind::File;
        data.retain(|extent| is_file && extent.len > 0);
        if let Kind::HardLink { target } | Kind::Symlink { target } = &kind {
            self.check_path(target, target)?;
        }
        let (uid, gid) = header.owner().map_err(|reason| self.bad_header(reason))?;
        let entry = Entry {
            path,
            mode: header.permissions(),
            uid,
            gid,
            mtime: header.mtime,
            xattrs: header.xattrs,
            size: if is_file { size } else { 0 },
            data,
            kind,
        };
        let path = display_path(&entry.path);
        sink(entry).map_err(|source| Error::Sink { at, path, source })
    }

    /// The payload of an extension header has been collected in `buf`.
    fn special(&mut self, typ: Type) -> Result<(), Error> {
        let payload = std::mem::take(&mut self.buf);
        let pad = (payload.len() as u64).next_multiple_of(BLOCK) - payload.len() as u64;
        let at = self.header_at;
        match typ {
            Type::Pax => {
                let records =
                    Records::parse(&payload).map_err(|reason| Error::Pax { at, reason })?;
                self.pending.pax = Some(records);
            }
            // Parsed for its errors only: containerd and umoci do not apply global records.
            Type::PaxGlobal => {
                Records::parse(&payload).map_err(|reason| Error::Pax { at, reason })?;
                self.pending = Pending::default();
            }
            Type::LongLink => self.pending.long_link = Some(header::text(&payload).to_vec()),
            _ => self.pending.long_name = Some(header::text(&payload).to_vec()),
        }
        self.state = match pad {
            0 => State::Header { zero: false },
            pad => State::Payload { path: String::new(), left: 0, pad },
        };
        Ok(())
    }

    fn check_path(&self, raw: &[u8], cleaned: &[u8]) -> Result<(), Error> {
        let (at, limits) = (self.header_at, &self.limits);
        let start = || display_path(&raw[..raw.len().min(64)]);
        if raw.len() > limits.path_bytes {
            let (len, limit) = (raw.len(), limits.path_bytes);
            return Err(Error::PathTooLong { at, start: start(), len, limit });
        }
        if cleaned.split(|b| *b == b'/').count() > limits.depth {
            return Err(Error::PathTooDeep { at, start: start(), limit: limits.depth });
        }
        Ok(())
    }

    fn bad_header(&self, reason: &'static str) -> Error {
        Error::Header { at: self.header_at, reason }
    }

    fn bad_sparse(&self, header: &Header, reason: &'static str) -> Error {
        Error::Sparse { at: self.header_at, path: display_path(&header.name), reason }
    }
}

/// Moves bytes into `buf` until it has `want` of them; how many were moved.
fn collect(buf: &mut Vec<u8>, want: usize, bytes: &mut &[u8]) -> usize {
    let n = want.saturating_sub(buf.len()).min(bytes.len());
    let (now, later) = bytes.split_at(n);
    buf.extend_from_slice(now);
    *bytes = later;
    n
}

/// Passes over up to `left` bytes; how many were passed.
fn pass(left: &mut u64, bytes: &mut &[u8]) -> usize {
    let n = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
    *left -= n as u64;
    *bytes = &bytes[n..];
    n
}
