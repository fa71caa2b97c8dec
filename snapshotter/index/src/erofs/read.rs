//! The inodes of an image that anyone may have written.
//!
//! Invariants:
//! - What [`Inodes::open`] accepted has been checked from end to end, so that look-ups need no
//!   errors; they still reach bytes by checked offsets only, and answer "nothing" rather than panic.
//! - Look-ups allocate nothing and take O(log n) at most.

mod check;
mod dir;
mod record;
mod xattr;

use std::ops::Range;

use super::format::{self, FileKind, Nid};
use dir::Dir;
use record::{Data, Record};

pub use dir::{DirEntry, Entries};
pub use xattr::{Xattr, Xattrs};

/// An accepted image.
#[derive(Debug)]
pub struct Inodes<B> {
    bytes: B,
    inodes: u64,
    /// One bit for each slot in which an inode starts.
    starts: Vec<u64>,
    any_xattrs: bool,
}

/// What an inode says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    pub nid: Nid,
    pub kind: FileKind,
    /// Permission bits; those of the type come from [`FileKind::mode_bits`].
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    pub nlink: u32,
    /// As Linux keeps it in 32 bits, also what FUSE expects; 0 for all but devices.
    pub rdev: u32,
    /// A directory that the layer has no entry for: see [`crate::tree::Inode::implicit`].
    pub implicit: bool,
}

/// A run of a file's bytes in the data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtent {
    /// Offset in the file.
    pub logical: u64,
    pub len: u64,
    /// Offset in the data file; `None`: zeros.
    pub at: Option<u64>,
}

/// Why an image was refused.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("the image is not one of ours: {reason}")]
    Head { reason: &'static str },
    #[error("inode {nid} is invalid: {reason}")]
    Inode { nid: u64, reason: &'static str },
    #[error("directory {nid} is invalid: {reason}")]
    Dir { nid: u64, reason: &'static str },
    #[error("bytes at {at} belong to nothing but are not zero")]
    Stray { at: u64 },
}

impl<B: AsRef<[u8]>> Inodes<B> {
    /// Checks an image over a data file of `data_len` bytes, in time and memory linear in its size.
    ///
    /// # Errors
    /// When it is not exactly what [`super::write()`] makes of some tree.
    pub fn open(bytes: B, data_len: u64) -> Result<Self, ReadError> {
        let found = check::check(bytes.as_ref(), data_len)?;
        let check::Found { inodes, starts, any_xattrs } = found;
        Ok(Self { bytes, inodes, starts, any_xattrs })
    }

    /// The whole image.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    pub fn root(&self) -> Nid {
        format::ROOT
    }

    pub fn inode_count(&self) -> u64 {
        self.inodes
    }

    /// Whether any inode has extended attributes.
    pub fn any_xattrs(&self) -> bool {
        self.any_xattrs
    }

    /// The image as it is.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// The inode of that number; `None` if it names none.
    pub fn inode(&self, nid: Nid) -> Option<Inode> {
        Some(self.record(nid)?.inode)
    }

    /// The inode with a name in a directory; `.` and `..` are names too.
    pub fn lookup(&self, dir: Nid, name: &[u8]) -> Option<Nid> {
        Some(self.dir(dir)?.find(name)?.nid)
    }

    /// A directory's entries from a position on, with `.` and `..`, in order of their names.
    /// Positions are 0 and [`DirEntry::next`] of an entry. Nothing if it is no directory.
    pub fn entries(&self, dir: Nid, from: u64) -> Entries<'_> {
        Entries::new(self.dir(dir), from)
    }

    /// An inode's extended attributes in order of their names.
    pub fn xattrs(&self, nid: Nid) -> Xattrs<'_> {
        match self.record(nid) {
            Some(record) => record.xattrs(self.bytes.as_ref()),
            None => Xattrs::new(&[]),
        }
    }

    /// The value of an extended attribute by its full name.
    pub fn xattr(&self, nid: Nid, name: &[u8]) -> Option<&[u8]> {
        self.xattrs(nid).find(|xattr| xattr.is(name)).map(|xattr| xattr.value)
    }

    /// The target of a symbolic link.
    pub fn symlink(&self, nid: Nid) -> Option<&[u8]> {
        let record = self.record(nid).filter(|record| record.inode.kind == FileKind::Symlink)?;
        let len = usize::try_from(record.inode.size).ok()?;
        let at = match record.data {
            Data::Blocks { at, tail: 0 } => at,
            _ => record.body_end,
        };
        self.bytes.as_ref().get(at..at.checked_add(len)?)
    }

    /// Where the bytes of a range of a file are, in order and without gaps; what lies behind the
    /// end of the file is left out. Nothing if it is no file.
    pub fn extents(&self, nid: Nid, range: Range<u64>) -> impl Iterator<Item = FileExtent> {
        let bytes = self.bytes.as_ref();
        let file = self.record(nid).and_then(|record| match record.data {
            Data::Chunks { at, bits, .. } => Some((at, bits, record.inode.size)),
            _ => None,
        });
        let (indexes_at, bits, size) = file.unwrap_or((0, 0, 0));
        let (mut pos, end) = (range.start, range.end.min(size));
        std::iter::from_fn(move || {
            if pos >= end {
                return None;
            }
            let chunk = pos >> bits;
            let chunk_start = chunk << bits;
            let until = end.min(chunk_start.saturating_add(1 << bits));
            let index_at = indexes_at.checked_add(usize::try_from(chunk).ok()?.checked_mul(8)?)?;
            let block = format::u32_at(bytes, index_at.checked_add(4)?)?;
            let at = u64::from(block) * format::BLOCK + (pos - chunk_start);
            let at = (block != format::HOLE).then_some(at);
            let extent = FileExtent { logical: pos, len: until - pos, at };
            pos = until;
            Some(extent)
        })
    }

    fn dir(&self, nid: Nid) -> Option<Dir<'_>> {
        Dir::of(&self.record(nid)?, self.bytes.as_ref())
    }

    fn record(&self, nid: Nid) -> Option<Record> {
        let word = self.starts.get(usize::try_from(nid.0 / 64).ok()?)?;
        if word >> (nid.0 % 64) & 1 == 0 {
            return None;
        }
        Record::parse(self.bytes.as_ref(), nid).ok()
    }
}
