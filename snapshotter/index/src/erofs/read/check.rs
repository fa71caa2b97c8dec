//! The one check of an image, before anything else looks at it.
//!
//! Everything is reached from the root once; each 32-byte slot of the image belongs to one thing or
//! is zero. So the time is linear in the image, and a tree can't have cycles.

use std::collections::HashMap;

use super::ReadError;
use super::dir::{Dir, DirBlock, DirEntry};
use super::record::{Data, Record};
use crate::erofs::format::{self, FileKind, Nid};

const BLOCK: usize = 512;
const SLOT: usize = 32;

pub(super) struct Found {
    pub(super) inodes: u64,
    pub(super) starts: Vec<u64>,
    pub(super) any_xattrs: bool,
}

pub(super) fn check(bytes: &[u8], data_len: u64) -> Result<Found, ReadError> {
    check_head(bytes, data_len)?;
    let slots = bytes.len() / SLOT;
    let mut check = Check {
        bytes,
        data_len,
        claimed: Bits::new(slots),
        starts: Bits::new(slots),
        inodes: 0,
        links: HashMap::new(),
        any_xattrs: false,
    };
    let root_at = usize::try_from(format::ROOT_AT).unwrap_or(usize::MAX);
    check.claimed.claim(0..root_at / SLOT);
    check.walk()?;
    if let Some((nid, _)) = check.links.iter().filter(|(_, left)| **left != 0).min() {
        return Err(inode_error(*nid, "it has fewer names than it says"));
    }
    if format::u64_at(bytes, format::SUPER_AT + 16) != Some(check.inodes) {
        return Err(ReadError::Head { reason: "it counts other inodes than there are" });
    }
    check.stray()?;
    let Check { inodes, starts, any_xattrs, .. } = check;
    Ok(Found { inodes, starts: starts.words, any_xattrs })
}

/// Superblock and device table, which leave nothing open but the number of inodes.
fn check_head(bytes: &[u8], data_len: u64) -> Result<(), ReadError> {
    let fail = |reason| Err(ReadError::Head { reason });
    let Some(inodes) = format::u64_at(bytes, format::SUPER_AT + 16) else {
        return fail("it is too short");
    };
    if format::u32_at(bytes, format::SUPER_AT) != Some(format::MAGIC) {
        return fail("EROFS' magic number is missing");
    }
    if !bytes.len().is_multiple_of(BLOCK) || !data_len.is_multiple_of(format::BLOCK) {
        return fail("its length or that of the data is not a multiple of 512");
    }
    if [bytes.len() as u64, data_len].iter().any(|len| len / format::BLOCK > u64::from(u32::MAX)) {
        return fail("it or the data is too large");
    }
    let head = format::head(inodes, bytes.len() as u64, data_len);
    if !bytes.starts_with(&head) {
        return fail("the superblock or the device table differs");
    }
    Ok(())
}

struct Check<'a> {
    bytes: &'a [u8],
    data_len: u64,
    /// Slots that belong to something.
    claimed: Bits,
    /// Slots in which an inode starts.
    starts: Bits,
    inodes: u64,
    /// Inodes with several names: how many are still to be found.
    links: HashMap<Nid, u32>,
    any_xattrs: bool,
}

impl Check<'_> {
    fn walk(&mut self) -> Result<(), ReadError> {
        let root = self.inode(format::ROOT)?;
        let mut dirs = vec![(root, format::ROOT)];
        while let Some((record, parent)) = dirs.pop() {
            self.dir(&record, parent, &mut dirs)?;
        }
        Ok(())
    }

    fn dir(
        &mut self,
        record: &Record,
        parent: Nid,
        dirs: &mut Vec<(Record, Nid)>,
    ) -> Result<(), ReadError> {
        let nid = record.inode.nid;
        let fail = |reason| ReadError::Dir { nid: nid.0, reason };
        let dir = Dir::of(record, self.bytes).ok_or(fail("it is not a directory"))?;
        let (mut last, mut own, mut subdirs) = (&b""[..], 0, 0_u32);
        for index in 0..dir.block_count() {
            let is_last = index + 1 == dir.block_count();
            let block = dir.block(index).ok_or(fail("a block has no names"))?;
            check_block(&block, is_last).map_err(fail)?;
            for i in 0..block.count {
                let entry = block.entry(i).ok_or(fail("an entry is malformed"))?;
                check_name(entry.name).map_err(fail)?;
                if entry.name <= last {
                    return Err(fail("its names are not in order"));
                }
                last = entry.name;
                let special = match entry.name {
                    b"." => Some(nid),
                    b".." => Some(parent),
                    _ => None,
                };
                if let Some(expected) = special {
                    if entry.nid != expected || entry.kind != FileKind::Dir {
                        return Err(fail("`.` or `..` is not what it should be"));
                    }
                    own += 1;
                    continue;
                }
                subdirs += u32::from(entry.kind == FileKind::Dir);
                self.child(&entry, nid, dirs)?;
            }
        }
        if own != 2 {
            return Err(fail("`.` or `..` is missing"));
        }
        if record.inode.nlink != subdirs.saturating_add(2) {
            return Err(fail("its link count is wrong"));
        }
        Ok(())
    }

    fn child(
        &mut self,
        entry: &DirEntry<'_>,
        dir: Nid,
        dirs: &mut Vec<(Record, Nid)>,
    ) -> Result<(), ReadError> {
        let nid = entry.nid;
        if !self.starts.get(nid) {
            let record = self.inode(nid)?;
            if record.inode.kind == FileKind::Dir {
                dirs.push((record, dir));
            } else if record.inode.nlink != 1 {
                let left = record.inode.nlink.checked_sub(1);
                let left = left.ok_or(inode_error(nid, "its link count is zero"))?;
                self.links.insert(nid, left);
            }
            return self.same_kind(entry, record.inode.kind);
        }
        let left = self.links.get_mut(&nid).and_then(|left| {
            *left = left.checked_sub(1)?;
            Some(())
        });
        left.ok_or(inode_error(nid, "it has more names than it says, or is a directory with two"))?;
        let record = Record::parse(self.bytes, nid).map_err(|reason| inode_error(nid, reason))?;
        self.same_kind(entry, record.inode.kind)
    }

    fn same_kind(&self, entry: &DirEntry<'_>, kind: FileKind) -> Result<(), ReadError> {
        if entry.kind == kind {
            return Ok(());
        }
        Err(inode_error(entry.nid, "a directory says another type than the inode"))
    }

    /// Looks at an inode for the first time.
    fn inode(&mut self, nid: Nid) -> Result<Record, ReadError> {
        let fail = |reason| inode_error(nid, reason);
        let record = Record::parse(self.bytes, nid).map_err(fail)?;
        self.claim(record.at, record.end()).map_err(fail)?;
        self.starts.set(nid);
        self.inodes += 1;
        self.xattrs(&record).map_err(fail)?;
        match record.data {
            Data::None => {}
            Data::Blocks { at, tail } => {
                let size = usize::try_from(record.inode.size).unwrap_or(usize::MAX);
                if size > tail {
                    self.claim(at, at + (size - tail).next_multiple_of(BLOCK)).map_err(fail)?;
                    self.zeros(at + size - tail, BLOCK).map_err(fail)?;
                }
                self.target(&record).map_err(fail)?;
            }
            Data::Chunks { at, bits, count } => {
                self.zeros(record.body_end, format::CHUNK_LEN).map_err(fail)?;
                self.chunks(at, bits, count, record.inode.size).map_err(fail)?;
            }
        }
        self.zeros(record.end(), SLOT).map_err(fail)?;
        Ok(record)
    }

    fn xattrs(&mut self, record: &Record) -> Result<(), &'static str> {
        if record.xattrs_at == record.body_end {
            return Ok(());
        }
        self.any_xattrs = true;
        let header_at = record.at + format::INODE_LEN;
        let header = self.bytes.get(header_at..record.xattrs_at).unwrap_or(&[1]);
        if header.iter().any(|b| *b != 0) {
            return Err("it shares attributes");
        }
        let mut xattrs = record.xattrs(self.bytes);
        let mut last = None;
        for xattr in xattrs.by_ref() {
            if last.is_some_and(|last: super::Xattr<'_>| last.name_bytes().ge(xattr.name_bytes())) {
                return Err("its attributes are not in order");
            }
            last = Some(xattr);
        }
        if xattrs.rest().is_empty() { Ok(()) } else { Err("an attribute is malformed") }
    }

    /// A symbolic link must have a target without NUL.
    fn target(&self, record: &Record) -> Result<(), &'static str> {
        if record.inode.kind != FileKind::Symlink {
            return Ok(());
        }
        let Data::Blocks { at, tail } = record.data else { return Ok(()) };
        let start = if tail == 0 { at } else { record.body_end };
        let len = usize::try_from(record.inode.size).unwrap_or(usize::MAX);
        match self.bytes.get(start..start.saturating_add(len)) {
            Some(target) if !target.contains(&0) => Ok(()),
            _ => Err("its target has a NUL"),
        }
    }

    fn chunks(&self, at: usize, bits: u32, count: usize, size: u64) -> Result<(), &'static str> {
        let indexes = self.bytes.get(at..at + count * format::CHUNK_LEN).unwrap_or(&[]);
        let mut left = size;
        for index in indexes.chunks_exact(format::CHUNK_LEN) {
            let len = left.min(1 << bits);
            left -= len;
            let device = format::u16_at(index, 2);
            let block = format::u32_at(index, 4).unwrap_or(0);
            let expected = if block == format::HOLE { 0 } else { format::DEVICE };
            if index[..2] != [0, 0] || device != Some(expected) {
                return Err("a chunk is on another device");
            }
            let end = u64::from(block) * format::BLOCK + len.next_multiple_of(format::BLOCK);
            if block != format::HOLE && end > self.data_len {
                return Err("a chunk lies outside of the data");
            }
        }
        Ok(())
    }

    fn claim(&mut self, start: usize, end: usize) -> Result<(), &'static str> {
        if end > self.bytes.len() {
            return Err("it lies outside of the image");
        }
        match self.claimed.claim(start / SLOT..end.div_ceil(SLOT)) {
            true => Ok(()),
            false => Err("it overlaps something else"),
        }
    }

    /// What follows up to the next multiple of `unit` must be zero.
    fn zeros(&self, at: usize, unit: usize) -> Result<(), &'static str> {
        match self.bytes.get(at..at.next_multiple_of(unit)) {
            Some(rest) if rest.iter().all(|b| *b == 0) => Ok(()),
            _ => Err("what it leaves of its place is not zero"),
        }
    }

    /// What belongs to nothing must be zero.
    fn stray(&self) -> Result<(), ReadError> {
        for (slot, bytes) in self.bytes.chunks(SLOT).enumerate() {
            if !self.claimed.get(Nid(slot as u64)) && bytes.iter().any(|b| *b != 0) {
                return Err(ReadError::Stray { at: (slot * SLOT) as u64 });
            }
        }
        Ok(())
    }
}

/// Offsets of the names of a block: they follow the entries and one another; zeros fill the block.
fn check_block(block: &DirBlock<'_>, is_last: bool) -> Result<(), &'static str> {
    let mut end = block.count * format::DIRENT_LEN;
    for i in 0..block.count {
        let entry = block.entry(i).ok_or("an entry is malformed")?;
        if block.name_at(i) != Some(end) {
            return Err("its names are not where they should be");
        }
        end += entry.name.len();
    }
    let padding = block.bytes().get(end..).unwrap_or(&[1]);
    if padding.iter().any(|b| *b != 0) || (is_last && !padding.is_empty()) {
        return Err("a block does not end with its names");
    }
    Ok(())
}

fn check_name(name: &[u8]) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > format::MAX_NAME {
        return Err("a name is empty or too long");
    }
    if name.iter().any(|b| matches!(b, 0 | b'/')) {
        return Err("a name has a slash or a NUL");
    }
    Ok(())
}

fn inode_error(nid: Nid, reason: &'static str) -> ReadError {
    ReadError::Inode { nid: nid.0, reason }
}

/// One bit for each slot of the image.
struct Bits {
    words: Vec<u64>,
}

impl Bits {
    fn new(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(64)] }
    }

    fn get(&self, nid: Nid) -> bool {
        let word = usize::try_from(nid.0 / 64).ok().and_then(|i| self.words.get(i));
        word.is_some_and(|word| word >> (nid.0 % 64) & 1 == 1)
    }

    fn set(&mut self, nid: Nid) {
        let word = usize::try_from(nid.0 / 64).ok().and_then(|i| self.words.get_mut(i));
        if let Some(word) = word {
            *word |= 1 << (nid.0 % 64);
        }
    }

    /// Sets all bits of a range; false if one of them was set.
    fn claim(&mut self, range: std::ops::Range<usize>) -> bool {
        for slot in range {
            let nid = Nid(slot as u64);
            if self.get(nid) {
                return false;
            }
            self.set(nid);
        }
        true
    }
}
