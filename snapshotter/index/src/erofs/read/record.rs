//! One inode of the image, with every offset in it checked against the image.

use super::Inode;
use super::xattr::Xattrs;
use crate::erofs::format::{self, FileKind, Nid, u16_at, u32_at, u64_at};

/// A parsed inode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    pub(super) inode: Inode,
    /// Where the inode starts.
    pub(super) at: usize,
    /// Where its attributes' entries start; they end at `body_end`.
    pub(super) xattrs_at: usize,
    pub(super) body_end: usize,
    pub(super) data: Data,
}

/// Where an inode's data is; all of it lies within the image.
#[derive(Clone, Copy, Debug)]
pub(super) enum Data {
    None,
    /// In blocks from `at` on, the last `tail` bytes behind the body.
    Blocks {
        at: usize,
        tail: usize,
    },
    /// In `count` chunks of 2^`bits` bytes, whose indexes start at `at`.
    Chunks {
        at: usize,
        bits: u32,
        count: usize,
    },
}

impl Record {
    pub(super) fn parse(bytes: &[u8], nid: Nid) -> Result<Self, &'static str> {
        const SHORT: &str = "it lies outside of the image";
        let at = nid.0.checked_mul(format::SLOT).and_then(|at| usize::try_from(at).ok());
        let at = at.ok_or(SHORT)?;
        let fixed: [u8; format::INODE_LEN] = format::array(bytes, at).ok_or(SHORT)?;
        let (u16_of, u32_of) =
            (|at| u16_at(&fixed, at).unwrap_or(0), |at| u32_at(&fixed, at).unwrap_or(0));
        let mode = u16_of(4);
        let kind = FileKind::from_mode(mode).ok_or("its type is unknown")?;
        let word = u32_of(16);
        let device = matches!(kind, FileKind::CharDevice | FileKind::BlockDevice);
        let inode = Inode {
            nid,
            kind,
            mode: mode & 0o7777,
            uid: u32_of(24),
            gid: u32_of(28),
            size: u64_at(&fixed, 8).unwrap_or(0),
            mtime: (u64_at(&fixed, 32).unwrap_or(0).cast_signed(), u32_of(40)),
            nlink: u32_of(44),
            rdev: if device { word } else { 0 },
            implicit: fixed[48] == 1,
        };
        if inode.mtime.1 >= 1_000_000_000 {
            return Err("its time has more than a second of nanoseconds");
        }
        let reserved = fixed[6..8].iter().chain(&fixed[49..]);
        if reserved.chain([&(fixed[48] & !1)]).any(|b| *b != 0)
            || (inode.implicit && kind != FileKind::Dir)
        {
            return Err("reserved bytes are set");
        }
        if u64::from(u32_of(20)) != nid.0 & u64::from(u32::MAX) {
            return Err("its number is not its own");
        }
        let units = usize::from(u16_of(2));
        let (xattrs_at, body_end) = match units {
            0 => (at + format::INODE_LEN, at + format::INODE_LEN),
            1 => return Err("it has an empty list of attributes"),
            _ => {
                let start = at + format::INODE_LEN + format::XATTR_HEADER_LEN;
                (start, start + (units - 1) * format::XATTR_ENTRY_LEN)
            }
        };
        if body_end > bytes.len() {
            return Err("its attributes lie outside of the image");
        }
        let data = data(bytes, &inode, u16_of(0), word, at, body_end)?;
        Ok(Self { inode, at, xattrs_at, body_end, data })
    }

    pub(super) fn xattrs<'a>(&self, bytes: &'a [u8]) -> Xattrs<'a> {
        Xattrs::new(bytes.get(self.xattrs_at..self.body_end).unwrap_or(&[]))
    }

    /// Where the inode ends, with attributes and what stands behind them.
    pub(super) fn end(&self) -> usize {
        match self.data {
            Data::None => self.body_end,
            Data::Blocks { tail, .. } => self.body_end + tail,
            Data::Chunks { at, count, .. } => at + count * format::CHUNK_LEN,
        }
    }
}

fn data(
    bytes: &[u8],
    inode: &Inode,
    layout: u16,
    word: u32,
    at: usize,
    body_end: usize,
) -> Result<Data, &'static str> {
    const WRONG: &str = "its layout does not fit its type";
    match (inode.kind, layout) {
        (FileKind::CharDevice | FileKind::BlockDevice, format::PLAIN) if inode.size == 0 => {
            Ok(Data::None)
        }
        (FileKind::Fifo | FileKind::File, format::PLAIN) if inode.size == 0 && word == 0 => {
            Ok(Data::None)
        }
        (FileKind::File, format::CHUNKED) if inode.size > 0 => {
            let bits = word & u32::from(format::MAX_CHUNK_BITS);
            if word != bits | u32::from(format::CHUNK_INDEXES) {
                return Err("its chunk format is unknown");
            }
            let bits = bits + u32::from(format::BLOCK_BITS);
            let body = (body_end - at).next_multiple_of(format::CHUNK_LEN);
            let count = usize::try_from(inode.size.div_ceil(1 << bits)).unwrap_or(usize::MAX);
            let start = at + body;
            let end = count.checked_mul(format::CHUNK_LEN).and_then(|len| len.checked_add(start));
            if end.is_none_or(|end| end > bytes.len()) {
                return Err("its chunks lie outside of the image");
            }
            Ok(Data::Chunks { at: start, bits, count })
        }
        (FileKind::Dir | FileKind::Symlink, format::PLAIN | format::INLINE) if inode.size > 0 => {
            let (full, rest) = (inode.size / format::BLOCK, inode.size % format::BLOCK);
            let inlined = layout == format::INLINE;
            if inode.kind == FileKind::Symlink
                && (inode.size > format::MAX_SYMLINK || (inlined && full > 0))
            {
                return Err("its target is too long");
            }
            let blocks = if inlined { full } else { full + u64::from(rest > 0) };
            let start = u64::from(word) * format::BLOCK;
            let end = blocks.checked_mul(format::BLOCK).and_then(|len| len.checked_add(start));
            if end.is_none_or(|end| end > bytes.len() as u64) || (blocks == 0) != (word == 0) {
                return Err("its blocks lie outside of the image");
            }
            let tail = if inlined { usize::try_from(rest).unwrap_or(0) } else { 0 };
            let block = usize::try_from(format::BLOCK).unwrap_or(usize::MAX);
            if inlined && (tail == 0 || body_end % block + tail > block) {
                return Err("its tail does not fit its block");
            }
            if body_end + tail > bytes.len() {
                return Err("its tail lies outside of the image");
            }
            Ok(Data::Blocks { at: usize::try_from(start).unwrap_or(usize::MAX), tail })
        }
        _ => Err(WRONG),
    }
}
