//! Directories: blocks of entries, each followed by its names, all in order of the names.

use super::record::{Data, Record};
use crate::erofs::format::{self, DIRENT_LEN, FileKind, Nid};

const BLOCK: usize = 512;

/// A name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    pub name: &'a [u8],
    pub nid: Nid,
    pub kind: FileKind,
    /// The position behind this entry.
    pub next: u64,
}

/// Where a directory's blocks are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dir<'a> {
    blocks: &'a [u8],
    tail: &'a [u8],
}

impl<'a> Dir<'a> {
    pub(super) fn of(record: &Record, bytes: &'a [u8]) -> Option<Self> {
        if record.inode.kind != FileKind::Dir {
            return None;
        }
        let Data::Blocks { at, tail } = record.data else { return None };
        let size = usize::try_from(record.inode.size).ok()?;
        let blocks = bytes.get(at..at.checked_add(size.checked_sub(tail)?)?)?;
        let tail = bytes.get(record.body_end..record.body_end.checked_add(tail)?)?;
        Some(Self { blocks, tail })
    }

    pub(super) fn block_count(&self) -> usize {
        self.blocks.len().div_ceil(BLOCK) + usize::from(!self.tail.is_empty())
    }

    pub(super) fn block(&self, index: usize) -> Option<DirBlock<'a>> {
        let start = index.checked_mul(BLOCK)?;
        let bytes = match self.blocks.get(start..) {
            Some(rest) if !rest.is_empty() => &rest[..rest.len().min(BLOCK)],
            _ if start == self.blocks.len() => self.tail,
            _ => return None,
        };
        DirBlock::new(index, bytes)
    }

    pub(super) fn find(&self, name: &[u8]) -> Option<DirEntry<'a>> {
        // The last block whose first name is not behind the one that is looked for.
        let (mut low, mut high) = (0, self.block_count());
        while high - low > 1 {
            let middle = low.midpoint(high);
            match self.block(middle)?.entry(0)?.name <= name {
                true => low = middle,
                false => high = middle,
            }
        }
        let block = self.block(low)?;
        let (mut low, mut high) = (0, block.count);
        while low < high {
            let middle = low.midpoint(high);
            let entry = block.entry(middle)?;
            match entry.name.cmp(name) {
                std::cmp::Ordering::Equal => return Some(entry),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }
}

/// One block of a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirBlock<'a> {
    index: usize,
    bytes: &'a [u8],
    pub(super) count: usize,
}

impl<'a> DirBlock<'a> {
    fn new(index: usize, bytes: &'a [u8]) -> Option<Self> {
        let names_at = usize::from(format::u16_at(bytes, 8)?);
        let count = names_at / DIRENT_LEN;
        (count > 0 && names_at.is_multiple_of(DIRENT_LEN) && names_at < bytes.len())
            .then_some(Self { index, bytes, count })
    }

    /// Where the names end: before the block's padding. The last name of a block has no other end.
    pub(super) fn names_end(&self) -> usize {
        let last = (self.count - 1) * DIRENT_LEN;
        let start = format::u16_at(self.bytes, last + 8).map_or(0, usize::from);
        let name = self.bytes.get(start..).unwrap_or(&[]);
        start + name.iter().position(|b| *b == 0).unwrap_or(name.len())
    }

    pub(super) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub(super) fn name_at(&self, i: usize) -> Option<usize> {
        format::u16_at(self.bytes, i.checked_mul(DIRENT_LEN)? + 8).map(usize::from)
    }

    pub(super) fn entry(&self, i: usize) -> Option<DirEntry<'a>> {
        if i >= self.count {
            return None;
        }
        let at = i * DIRENT_LEN;
        let fixed: [u8; DIRENT_LEN] = format::array(self.bytes, at)?;
        let end = if i + 1 < self.count { self.name_at(i + 1)? } else { self.names_end() };
        let next = if i + 1 < self.count {
            self.index * BLOCK + at + DIRENT_LEN
        } else {
            (self.index + 1) * BLOCK
        };
        if fixed[11] != 0 {
            return None;
        }
        Some(DirEntry {
            name: self.bytes.get(self.name_at(i)?..end)?,
            nid: Nid(format::u64_at(&fixed, 0)?),
            kind: FileKind::from_dirent(fixed[10])?,
            next: next as u64,
        })
    }
}

/// A directory's entries in order.
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    dir: Option<Dir<'a>>,
    at: u64,
}

impl<'a> Entries<'a> {
    pub(super) fn new(dir: Option<Dir<'a>>, from: u64) -> Self {
        Self { dir, at: from }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = DirEntry<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let at = usize::try_from(self.at).ok()?;
        let entry = self.dir?.block(at / BLOCK)?.entry(at % BLOCK / DIRENT_LEN)?;
        self.at = entry.next;
        Some(entry)
    }
}
