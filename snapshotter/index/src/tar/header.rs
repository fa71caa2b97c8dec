//! One tar header block: v7, ustar, PAX and GNU.
//!
//! Source of the layout: POSIX.1-1988 (ustar), the GNU tar manual, "Basic Tar Format".

use std::ops::Range;

use super::pax::Records;
use super::{Kind, clean_path};

/// Entry types, by what the walk does with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    File,
    /// `\0`: a file, or with a trailing slash in its name a directory.
    OldFile,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Dir,
    Fifo,
    GnuSparse,
    Pax,
    PaxGlobal,
    LongName,
    LongLink,
    /// Volume labels, multi-volume continuations, sockets and whatever else: passed over.
    Other,
}

impl Type {
    fn from_flag(flag: u8) -> Self {
        match flag {
            0 => Self::OldFile,
            b'0' | b'7' => Self::File,
            b'1' => Self::HardLink,
            b'2' => Self::Symlink,
            b'3' => Self::CharDevice,
            b'4' => Self::BlockDevice,
            b'5' => Self::Dir,
            b'6' => Self::Fifo,
            b'S' => Self::GnuSparse,
            b'x' | b'X' => Self::Pax,
            b'g' => Self::PaxGlobal,
            b'L' => Self::LongName,
            b'K' => Self::LongLink,
            _ => Self::Other,
        }
    }

    /// Whether it describes the entry after it.
    pub(super) fn is_special(self) -> bool {
        matches!(self, Self::Pax | Self::PaxGlobal | Self::LongName | Self::LongLink)
    }

    /// Whether bytes follow the header: the size of the others is ignored.
    pub(super) fn has_payload(self) -> bool {
        matches!(self, Self::File | Self::OldFile | Self::GnuSparse | Self::Other)
    }
}

/// The fields that matter, with the records of a PAX header once [`Header::apply`] has seen them.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) typ: Type,
    /// Bytes of the payload in the stream.
    pub(super) size: u64,
    pub(super) mtime: (i64, u32),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    mode: i64,
    uid: i64,
    gid: i64,
    major: i64,
    minor: i64,
    /// The part of an old GNU sparse header behind the common fields.
    pub(super) gnu: Option<Box<[u8]>>,
}

impl Header {
    pub(super) fn parse(block: &[u8]) -> Result<Self, &'static str> {
        if block.len() != 512 {
            return Err("a header has 512 bytes");
        }
        check_sum(block)?;
        let ustar = &block[257..263] == b"ustar\0";
        let gnu = &block[257..265] == b"ustar  \0";
        let (mut major, mut minor) = (0, 0);
        let mut name = text(&block[..100]).to_vec();
        if ustar || gnu {
            major = number(&block[329..337]).ok_or("the device's major number is malformed")?;
            minor = number(&block[337..345]).ok_or("the device's minor number is malformed")?;
        }
        let star = ustar && &block[508..512] == b"tar\0";
        // GNU headers have times where the prefix is; Go before 1.8 wrote a prefix all the same.
        let time = |field: &[u8]| field[0] == 0 || number(field).is_some();
        let mistaken = gnu && !(time(&block[345..357]) && time(&block[357..369]));
        let prefix = match (ustar, star) {
            (true, true) => text(&block[345..476]),
            (true, false) => text(&block[345..500]),
            _ if mistaken => Some(text(&block[345..500])).filter(|p| p.is_ascii()).unwrap_or(b""),
            _ => b"",
        };
        if !prefix.is_empty() {
            name = [prefix, b"/", &name].concat();
        }
        let typ = Type::from_flag(block[156]);
        let sparse = typ == Type::GnuSparse;
        if sparse && !gnu {
            return Err("a sparse entry ('S') needs a GNU header");
        }
        let size = number(&block[124..136]).ok_or("the size is malformed")?;
        Ok(Self {
            name,
            link: text(&block[157..257]).to_vec(),
            typ,
            size: u64::try_from(size).map_err(|_| "the size is negative")?,
            mtime: (number(&block[136..148]).ok_or("the modification time is malformed")?, 0),
            xattrs: Vec::new(),
            mode: number(&block[100..108]).ok_or("the mode is malformed")?,
            uid: number(&block[108..116]).ok_or("the owner is malformed")?,
            gid: number(&block[116..124]).ok_or("the group is malformed")?,
            major,
            minor,
            gnu: sparse.then(|| block.into()),
        })
    }

    /// Lets the records of a PAX header override the fields. An empty value leaves a field as it is.
    pub(super) fn apply(&mut self, records: &Records) -> Result<(), &'static str> {
        for (key, value) in records.iter() {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                if !name.is_empty() {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
                continue;
            }
            if value.is_empty() {
                continue;
            }
            match key {
                b"path" => self.name = value.to_vec(),
                b"linkpath" => self.link = value.to_vec(),
                b"size" => self.size = super::pax::unsigned(value).ok_or("size is not a number")?,
                b"uid" => self.uid = super::pax::signed(value).ok_or("uid is not a number")?,
                b"gid" => self.gid = super::pax::signed(value).ok_or("gid is not a number")?,
                b"mtime" => self.mtime = super::pax::time(value).ok_or("mtime is not a time")?,
                _ => {}
            }
        }
        Ok(())
    }

    /// The oldest archives mark directories by a slash at the end of the name.
    pub(super) fn settle_type(&mut self) {
        if self.typ == Type::OldFile {
            self.typ = if self.name.ends_with(b"/") { Type::Dir } else { Type::File };
        }
    }

    /// What the entry is; `None` for types that no file system object comes of.
    pub(super) fn kind(&self) -> Result<Option<Kind>, &'static str> {
        let device = || -> Result<(u32, u32), &'static str> {
            let part = |n: i64| u32::try_from(n).map_err(|_| "the device number is out of range");
            Ok((part(self.major)?, part(self.minor)?))
        };
        Ok(Some(match self.typ {
            Type::File | Type::OldFile | Type::GnuSparse => Kind::File,
            Type::Dir => Kind::Dir,
            Type::Fifo => Kind::Fifo,
            Type::Symlink => Kind::Symlink { target: self.link.clone() },
            Type::HardLink => Kind::HardLink { target: clean_path(&self.link) },
            Type::CharDevice => {
                let (major, minor) = device()?;
                Kind::CharDevice { major, minor }
            }
            Type::BlockDevice => {
                let (major, minor) = device()?;
                Kind::BlockDevice { major, minor }
            }
            Type::Pax | Type::PaxGlobal | Type::LongName | Type::LongLink | Type::Other => {
                return Ok(None);
            }
        }))
    }

    /// Permission bits; the file type that some writers add is dropped. Links have them all.
    pub(super) fn permissions(&self) -> u32 {
        match self.typ {
            Type::Symlink => 0o777,
            _ => u32::try_from(self.mode & 0o7777).unwrap_or(0),
        }
    }

    /// Owner and group. Small negative numbers are ids too (`nobody` of some systems); −1, which
    /// chown(2) takes as "leave it", leaves root.
    pub(super) fn owner(&self) -> Result<(u32, u32), &'static str> {
        let id = |n: i64, what: &'static str| match i32::try_from(n) {
            Ok(-1) => Ok(0),
            Ok(small) => Ok(small.cast_unsigned()),
            Err(_) => match u32::try_from(n) {
                Ok(u32::MAX) => Ok(0),
                Ok(id) => Ok(id),
                Err(_) => Err(what),
            },
        };
        let uid = id(self.uid, "the owner's id does not fit 32 bits")?;
        Ok((uid, id(self.gid, "the group's id does not fit 32 bits")?))
    }
}

/// The header's sum counts its own field as spaces; old writers added signed bytes.
fn check_sum(block: &[u8]) -> Result<(), &'static str> {
    const SUM: Range<usize> = 148..156;
    let stored = octal(&block[SUM]).ok_or("the checksum is malformed")?;
    // Wrapping, which 512 bytes can't: it lets the compiler add many at a time.
    let add = |sum: u32, byte: u8| sum.wrapping_add(u32::from(byte));
    let sum = |bytes: &[u8]| i64::from(bytes.iter().fold(0, |sum, byte| add(sum, *byte)));
    let high = |bytes: &[u8]| i64::from(bytes.iter().fold(0, |sum, byte| add(sum, byte >> 7)));
    let unsigned = sum(block) - sum(&block[SUM]) + sum(&[b' '; SUM.end - SUM.start]);
    let signed = unsigned - 256 * (high(block) - high(&block[SUM]));
    if stored == unsigned || stored == signed {
        return Ok(());
    }
    Err("the checksum does not match (not a tar archive, or damaged)")
}

/// A field up to its first NUL.
pub(super) fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or(field)
}

/// A numeric field: octal digits, or base 256 (two's complement) if the top bit is set.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => base256(field),
        _ => octal(field),
    }
}

fn base256(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    // Bit 6 is the sign: it spreads over the marker bit.
    let first =
        if first & 0x40 == 0 { i64::from(first & 0x3f) } else { i64::from(first & 0x7f) - 0x80 };
    rest.iter().try_fold(first, |n, byte| n.checked_mul(256)?.checked_add(i64::from(*byte)))
}

/// Digits between spaces and NULs; a blank field is 0.
fn octal(field: &[u8]) -> Option<i64> {
    let blank = |b: &u8| matches!(b, b' ' | 0);
    let Some(start) = field.iter().position(|b| !blank(b)) else { return Some(0) };
    let end = field.iter().rposition(|b| !blank(b)).map_or(start, |last| last + 1);
    text(&field[start..end]).iter().try_fold(0_i64, |n, digit| match digit {
        b'0'..=b'7' => n.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}
