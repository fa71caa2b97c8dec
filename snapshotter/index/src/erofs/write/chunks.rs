//! Which blocks of the data file hold a file.

use super::Copy;
use super::WriteError;
use super::place::Fault;
use crate::erofs::format::{BLOCK, HOLE, MAX_CHUNK_BITS};
use crate::tar::Extent;

/// Addresses have 32 bits and count blocks; the last one means a hole.
const MAX_DATA: u64 = (u32::MAX as u64) * BLOCK;
/// Largest file, holes included.
const MAX_FILE: u64 = 16 << 40;
/// Chunks of one sparse file: at least these …
const FEW_CHUNKS: u64 = 256;
/// … and never more than these.
const MANY_CHUNKS: u64 = 65_536;

/// The data file: the stream, and what is appended for files that are not in one piece there.
pub(super) struct DataFile {
    /// The stream's part, in whole blocks.
    stream_len: u64,
    end: u64,
    copies: Vec<Copy>,
}

/// The blocks of one file, one chunk after the other.
pub(super) enum Chunks {
    /// In one piece, from this block on.
    Run {
        first: u32,
        bits: u16,
        count: usize,
    },
    Each {
        blocks: Vec<u32>,
        bits: u16,
    },
}

impl Chunks {
    /// Bits of the chunk size above those of the block size.
    pub(super) fn bits(&self) -> u16 {
        match self {
            Self::Run { bits, .. } | Self::Each { bits, .. } => *bits,
        }
    }

    pub(super) fn count(&self) -> usize {
        match self {
            Self::Run { count, .. } => *count,
            Self::Each { blocks, .. } => blocks.len(),
        }
    }

    /// The first block of each chunk.
    pub(super) fn blocks(&self) -> Box<dyn Iterator<Item = u32> + '_> {
        match self {
            Self::Each { blocks, .. } => Box::new(blocks.iter().copied()),
            Self::Run { first, bits, count } => {
                // A second chunk starts only where the address space still has one.
                Box::new(
                    (0..*count as u64).map(move |i| {
                        u32::try_from(u64::from(*first) + (i << bits)).unwrap_or(HOLE)
                    }),
                )
            }
        }
    }
}

impl DataFile {
    pub(super) fn new(tar_len: u64) -> Result<Self, WriteError> {
        let whole = tar_len.checked_next_multiple_of(BLOCK).filter(|len| *len <= MAX_DATA);
        let stream_len = whole.ok_or_else(|| WriteError::DataTooLarge {
            path: "the archive itself".to_owned(),
            len: tar_len,
            limit: MAX_DATA,
        })?;
        Ok(Self { stream_len, end: stream_len, copies: Vec::new() })
    }

    pub(super) fn finish(self) -> (u64, Vec<Copy>) {
        (self.end, self.copies)
    }

    /// Finds the blocks of a file of `size` bytes, not 0, making room behind the stream if need be.
    pub(super) fn chunks(&mut self, size: u64, extents: &[Extent]) -> Result<Chunks, Fault> {
        self.check(size, extents)?;
        if let [one] = extents
            && one.len == size
            && one.at.is_multiple_of(BLOCK)
        {
            let first = u32::try_from(one.at / BLOCK).map_err(|_| Fault::Data)?;
            let bits = chunk_bits(size, 1);
            let count = usize::try_from(size.div_ceil(BLOCK << bits)).map_err(|_| Fault::Data)?;
            return Ok(Chunks::Run { first, bits, count });
        }
        let stored: u64 = extents.iter().map(|extent| extent.len).sum();
        let wanted = (4 * extents.len() as u64).saturating_add(stored >> 16);
        let most = match extents {
            [] => 1,
            _ => wanted.clamp(FEW_CHUNKS, MANY_CHUNKS),
        };
        let bits = chunk_bits(size, most);
        let chunk_len = BLOCK << bits;
        let mut blocks = Vec::new();
        let (mut start, mut rest) = (0, extents);
        while start < size {
            let end = size.min(start + chunk_len);
            while rest.first().is_some_and(|extent| extent.logical + extent.len <= start) {
                rest = &rest[1..];
            }
            blocks.push(self.chunk(start, end, rest)?);
            start = end;
        }
        Ok(Chunks::Each { blocks, bits })
    }

    /// The first block of the chunk `start..end` of a file; `extents` end behind `start`.
    fn chunk(&mut self, start: u64, end: u64, extents: &[Extent]) -> Result<u32, Fault> {
        let Some(first) = extents.first().filter(|extent| extent.logical < end) else {
            return Ok(HOLE);
        };
        if first.logical <= start && first.logical + first.len >= end {
            let at = first.at + (start - first.logical);
            if at.is_multiple_of(BLOCK) {
                return u32::try_from(at / BLOCK).map_err(|_| Fault::Data);
            }
        }
        let to = self.end;
        let len = (end - start).next_multiple_of(BLOCK);
        self.end = to.saturating_add(len);
        if self.end > MAX_DATA {
            return Err(Fault::DataTooLarge { len: self.end, limit: MAX_DATA });
        }
        for extent in extents.iter().take_while(|extent| extent.logical < end) {
            let from = extent.logical.max(start);
            let until = (extent.logical + extent.len).min(end);
            self.copies.push(Copy {
                from: extent.at + (from - extent.logical),
                to: to + (from - start),
                len: until - from,
            });
        }
        u32::try_from(to / BLOCK).map_err(|_| Fault::Data)
    }

    /// Extents must be ascending, within the file and within the stream.
    fn check(&self, size: u64, extents: &[Extent]) -> Result<(), Fault> {
        if size > MAX_FILE {
            return Err(Fault::FileTooLarge { len: size, limit: MAX_FILE });
        }
        let mut end = 0;
        for extent in extents {
            let stream_end = extent.at.checked_add(extent.len);
            if extent.len == 0
                || extent.logical < end
                || stream_end.is_none_or(|end| end > self.stream_len)
            {
                return Err(Fault::Data);
            }
            end = extent.logical.checked_add(extent.len).ok_or(Fault::Data)?;
        }
        if end > size { Err(Fault::Data) } else { Ok(()) }
    }
}

/// The smallest chunks of which `most` hold `size` bytes, or the largest that there are.
fn chunk_bits(size: u64, most: u64) -> u16 {
    let enough = |bits: &u16| size.div_ceil(BLOCK << bits) <= most;
    (0..MAX_CHUNK_BITS).find(enough).unwrap_or(MAX_CHUNK_BITS)
}
