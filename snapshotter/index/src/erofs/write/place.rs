//! Where everything goes in the image.

use std::collections::VecDeque;
use std::ops::Range;

use super::chunks::{Chunks, DataFile};
use super::{Copy, WriteError, path_of, usize_of};
use crate::erofs::format;
use crate::erofs::format::Nid;
use crate::tar::display_path;
use crate::tree::{Content, Inode, InodeId, Tree};

/// Largest image: far above what the limits of a tree lead to.
const MAX_IMAGE: u64 = 4 << 30;
/// A value's length has 16 bits, like the count of 4-byte units of all of an inode's attributes.
const MAX_XATTR_VALUE: usize = u16::MAX as usize;
const MAX_XATTRS: usize = (u16::MAX as usize - 1) * 4;

/// The places of all inodes, in the order in which they were given out.
pub(super) struct Plan {
    pub(super) places: Vec<Place>,
    /// By inode of the tree; 0 where it has no name.
    offsets: Vec<u64>,
    /// First block behind the inodes: where blocks of directories and links start.
    pub(super) first_block: u64,
    pub(super) image_len: usize,
    pub(super) data_len: u64,
    pub(super) copies: Vec<Copy>,
}

pub(super) struct Place {
    pub(super) id: InodeId,
    /// Of a directory; the root is its own.
    pub(super) parent: InodeId,
    pub(super) at: u64,
    pub(super) size: u64,
    /// Bytes of the attributes' entries.
    pub(super) xattr_len: usize,
    pub(super) layout: Layout,
}

/// Where an inode's data is. Blocks count from [`Plan::first_block`].
pub(super) enum Layout {
    Empty,
    Plain {
        block: u64,
    },
    /// The last `tail` bytes stand behind the inode.
    Inline {
        block: u64,
        tail: usize,
    },
    Chunked(Chunks),
}

impl Plan {
    pub(super) fn new(tree: &Tree, tar_len: u64) -> Result<Self, WriteError> {
        let mut plan = Self {
            places: Vec::new(),
            offsets: vec![0; tree.inodes_made()],
            first_block: 0,
            image_len: 0,
            data_len: 0,
            copies: Vec::new(),
        };
        let mut space = Space { end: format::ROOT_AT, gaps: Default::default() };
        let mut data = DataFile::new(tar_len)?;
        let mut blocks = 0;
        plan.place(tree, tree.root(), tree.root(), &mut space, &mut blocks, &mut data)?;
        let mut dirs = VecDeque::from([tree.root()]);
        while let Some(dir) = dirs.pop_front() {
            for child in tree.inode(dir).children().into_iter().flatten().map(|(_, child)| *child) {
                if plan.offsets[child.index()] != 0 {
                    continue;
                }
                plan.place(tree, child, dir, &mut space, &mut blocks, &mut data)?;
                if tree.inode(child).is_dir() {
                    dirs.push_back(child);
                }
                if space.end + blocks * format::BLOCK > MAX_IMAGE {
                    let path = path_of(tree, child);
                    return Err(WriteError::ImageTooLarge { path, limit: MAX_IMAGE });
                }
            }
        }
        plan.first_block = space.end.div_ceil(format::BLOCK);
        plan.image_len = usize_of((plan.first_block + blocks) * format::BLOCK);
        (plan.data_len, plan.copies) = data.finish();
        Ok(plan)
    }

    pub(super) fn nid(&self, id: InodeId) -> Nid {
        Nid(self.offsets[id.index()] / format::SLOT)
    }

    fn place(
        &mut self,
        tree: &Tree,
        id: InodeId,
        parent: InodeId,
        space: &mut Space,
        blocks: &mut u64,
        data: &mut DataFile,
    ) -> Result<(), WriteError> {
        let inode = tree.inode(id);
        let xattr_len = xattr_len(inode).map_err(|error| error.of(tree, id))?;
        let body = format::body_len(xattr_len);
        let (at, size, layout) = match &inode.content {
            Content::Dir { .. } => {
                let names = dir_names(inode);
                let runs = dir_blocks(&names);
                let last = runs.last().map_or(0, |run| block_len(&names[run.clone()]));
                let full = (runs.len() as u64).saturating_sub(1);
                space.flat(body, full, last, blocks)
            }
            Content::Symlink { target } => {
                // In one piece, so that a reader can lend it out.
                match fits_inline(body, target.len()) {
                    true => space.flat(body, 0, target.len(), blocks),
                    false => space.plain(body, target.len() as u64, blocks),
                }
            }
            Content::File { size: 0, .. } => (space.take(body), 0, Layout::Empty),
            Content::File { size, data: extents } => {
                let chunks = data.chunks(*size, extents).map_err(|error| error.of(tree, id))?;
                let start = body.next_multiple_of(format::CHUNK_LEN);
                let at = space.take(start + chunks.count() * format::CHUNK_LEN);
                (at, *size, Layout::Chunked(chunks))
            }
            _ => (space.take(body), 0, Layout::Empty),
        };
        self.offsets[id.index()] = at;
        self.places.push(Place { id, parent, at, size, xattr_len, layout });
        Ok(())
    }
}

/// The inodes' part of the image. Gaps that tails leave are filled by inodes without one.
struct Space {
    end: u64,
    /// Gaps by their length in slots; below a block there are 16.
    gaps: [VecDeque<u64>; 16],
}

impl Space {
    /// A place for `len` bytes that may lie across blocks.
    fn take(&mut self, len: usize) -> u64 {
        let slots = len.div_ceil(usize_of(format::SLOT));
        let gap = (slots..self.gaps.len()).find_map(|n| Some((n, self.gaps[n].pop_front()?)));
        if let Some((length, at)) = gap {
            if length > slots {
                self.gaps[length - slots].push_back(at + slots as u64 * format::SLOT);
            }
            return at;
        }
        let at = self.end;
        self.end += slots as u64 * format::SLOT;
        at
    }

    /// A place for an inode whose data is `full` blocks and `last` bytes, those behind the inode if
    /// they can be.
    fn flat(
        &mut self,
        body: usize,
        full: u64,
        last: usize,
        blocks: &mut u64,
    ) -> (u64, u64, Layout) {
        let size = full * format::BLOCK + last as u64;
        // A tail may not lie across blocks.
        let crosses = |at: u64| {
            let tail = at + body as u64;
            tail / format::BLOCK != (tail + last as u64 - 1) / format::BLOCK
        };
        // The root's place is fixed.
        let is_root = self.end == format::ROOT_AT;
        if !fits_inline(body, last) || (is_root && crosses(self.end)) {
            return self.plain(body, size, blocks);
        }
        let mut at = self.end;
        while crosses(at) {
            at += format::SLOT;
        }
        let slots = usize_of((at - self.end) / format::SLOT);
        if slots > 0 {
            self.gaps[slots].push_back(self.end);
        }
        self.end = (at + (body + last) as u64).next_multiple_of(format::SLOT);
        let block = *blocks;
        *blocks += full;
        (at, size, Layout::Inline { block, tail: last })
    }

    /// A place for an inode whose data is in blocks only.
    fn plain(&mut self, body: usize, size: u64, blocks: &mut u64) -> (u64, u64, Layout) {
        let block = *blocks;
        *blocks += size.div_ceil(format::BLOCK);
        (self.take(body), size, Layout::Plain { block })
    }
}

/// Whether a tail can stand behind a body within one block: bodies start at slots, so where a tail
/// starts within its slot is given.
fn fits_inline(body: usize, tail: usize) -> bool {
    let (slot, block) = (usize_of(format::SLOT), usize_of(format::BLOCK));
    tail > 0 && tail < block && body % slot + tail <= block
}

/// A directory's names in order, with `.` and `..`, which belong to no inode here.
pub(super) fn dir_names(inode: &Inode) -> Vec<(&[u8], Option<InodeId>)> {
    let children = inode.children().into_iter().flatten();
    let mut names: Vec<_> = children.map(|(name, id)| (name.as_slice(), Some(*id))).collect();
    for special in [&b"."[..], b".."] {
        let at = names.partition_point(|(name, _)| *name < special);
        names.insert(at, (special, None));
    }
    names
}

/// Which names go to which block.
pub(super) fn dir_blocks(names: &[(&[u8], Option<InodeId>)]) -> Vec<Range<usize>> {
    let (mut out, mut start, mut used) = (Vec::new(), 0, 0);
    for (i, (name, _)) in names.iter().enumerate() {
        let len = format::DIRENT_LEN + name.len();
        if used + len > usize_of(format::BLOCK) {
            out.push(start..i);
            (start, used) = (i, 0);
        }
        used += len;
    }
    out.push(start..names.len());
    out
}

fn block_len(names: &[(&[u8], Option<InodeId>)]) -> usize {
    names.iter().map(|(name, _)| format::DIRENT_LEN + name.len()).sum()
}

/// Index of the prefix and the name behind it.
pub(super) fn split_xattr(name: &[u8]) -> Option<(u8, &[u8])> {
    format::XATTR_PREFIXES.into_iter().find_map(|(index, prefix)| {
        let suffix = name.strip_prefix(prefix)?;
        (suffix.is_empty() == format::is_whole_name(index)).then_some((index, suffix))
    })
}

/// Something wrong with an inode whose path is yet to be found.
pub(super) enum Fault {
    Xattr { name: Vec<u8>, len: usize, limit: usize },
    XattrKind { name: Vec<u8> },
    Xattrs { len: usize },
    Data,
    DataTooLarge { len: u64, limit: u64 },
    FileTooLarge { len: u64, limit: u64 },
}

impl Fault {
    pub(super) fn of(self, tree: &Tree, id: InodeId) -> WriteError {
        let path = path_of(tree, id);
        match self {
            Self::Xattr { name, len, limit } => {
                WriteError::Xattr { path, name: display_path(&name), len, limit }
            }
            Self::XattrKind { name } => WriteError::XattrKind { path, name: display_path(&name) },
            Self::Xattrs { len } => WriteError::Xattrs { path, len, limit: MAX_XATTRS },
            Self::Data => WriteError::Data { path },
            Self::DataTooLarge { len, limit } => WriteError::DataTooLarge { path, len, limit },
            Self::FileTooLarge { len, limit } => WriteError::FileTooLarge { path, len, limit },
        }
    }
}

/// Bytes of the entries of an inode's attributes.
fn xattr_len(inode: &Inode) -> Result<usize, Fault> {
    let mut total = 0;
    for (name, value) in &inode.xattrs {
        let Some((_, suffix)) = split_xattr(name).filter(|(_, suffix)| !suffix.contains(&0)) else {
            return Err(Fault::XattrKind { name: name.clone() });
        };
        for (len, limit) in [(suffix.len(), format::MAX_NAME), (value.len(), MAX_XATTR_VALUE)] {
            if len > limit {
                return Err(Fault::Xattr { name: name.clone(), len, limit });
            }
        }
        let len = format::XATTR_ENTRY_LEN + suffix.len() + value.len();
        total += len.next_multiple_of(format::XATTR_ENTRY_LEN);
    }
    if total > MAX_XATTRS - format::XATTR_HEADER_LEN {
        return Err(Fault::Xattrs { len: total });
    }
    Ok(total)
}
