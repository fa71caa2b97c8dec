//! The layer index: what a layer blob must be accompanied by to be mounted and read in parts.

mod format;
#[cfg(test)]
mod tests;

use std::ops::Range;

use crate::chunk::Chunk;
use crate::codec::Compression;
use crate::erofs::Copy;

pub use format::Error;
pub(crate) use format::MAX_DATA_LEN;

/// The index of one layer blob, byte-identical wherever it is built. Its name is the SHA-256 of its
/// encoded bytes, which the blob's piece table holds.
///
/// Encoded (integers little-endian):
///
/// | bytes | what |
/// |---|---|
/// | 8 | magic `SKINDEX1`; the digit is the version |
/// | 1 | compression: 0 stored, 1 gzip, 2 zstd |
/// | 1 | layout: 0 tar, 1 TOC |
/// | 6 | zero |
/// | 8 | length of the blob |
/// | 8 | length of the tar, or of the assigned layout |
/// | 8 | length of the data file |
/// | 4 × 16 | of each section, in the order below: length here, length decompressed |
/// | … | inodes: the EROFS image, one zstd frame |
/// | … | chunks: the columns below, one zstd frame |
/// | … | copies: the columns below, one zstd frame |
/// | … | windows: one zstd frame per window, in the order of their chunks |
///
/// Nothing precedes, separates or follows the sections. Numbers in columns are LEB128, signed ones
/// zigzag-encoded; each column holds one number per chunk (or copy), all of one column first:
/// - chunks: their number; gap between the previous chunk's data and this one's; data length; blob
///   start less the previous chunk's blob end (signed); blob length; and for gzip 0 without a window,
///   else 1 + bit; length of the window, for the chunks that have one;
/// - copies: their number; `from` less the end of the previous `from` (signed); `to` less the end
///   of the previous `to`; length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerIndex {
    pub compression: Compression,
    pub layout: Layout,
    pub blob_len: u64,
    /// Length of what the chunks decode to; see [`Layout`].
    pub tar_len: u64,
    /// Length of the data file: `tar_len` rounded up to 512, and the overflow area.
    pub data_len: u64,
    /// The EROFS image. Not checked here: see [`crate::erofs`]'s reader.
    pub inodes: Vec<u8>,
    /// What the overflow area holds, by `to`; neither sources nor targets overlap.
    pub copies: Vec<Copy>,
    pub chunks: Vec<Chunk>,
    /// What [`crate::chunk::State::Gzip`] refers to.
    pub windows: Vec<u8>,
}

/// What the data file's offsets below `tar_len` are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Those of the tar stream, which the chunks tile.
    Tar,
    /// Assigned by the order of a TOC, each file at a multiple of 512; chunks may leave gaps, which
    /// are zeros.
    Toc,
}

impl LayerIndex {
    /// The chunks, in runs, that must be decoded before `range` of the data file can be read: those it
    /// touches, and for what it touches of the overflow area those the copies come from. Sorted,
    /// disjoint, not adjacent.
    pub fn chunks_covering(&self, range: Range<u64>) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        if range.is_empty() {
            return runs;
        }
        if range.start < self.tar_len {
            runs.push(self.touching(range.start..range.end.min(self.tar_len)));
        }
        let first = self.copies.partition_point(|copy| copy.to + copy.len <= range.start);
        for copy in self.copies[first..].iter().take_while(|copy| copy.to < range.end) {
            let start = range.start.max(copy.to) - copy.to;
            let end = range.end.min(copy.to + copy.len) - copy.to;
            runs.push(self.touching(copy.from + start..copy.from + end));
        }
        runs.retain(|run| !run.is_empty());
        runs.sort_unstable_by_key(|run| run.start);
        runs.dedup_by(|next, run| {
            let joins = next.start <= run.end;
            if joins {
                run.end = run.end.max(next.end);
            }
            joins
        });
        runs
    }

    /// What decoding chunk `chunk` adds to the overflow area: the parts of the copies that come from
    /// it. To be written before the chunk counts as present.
    pub fn copies_from(&self, chunk: usize) -> Vec<Copy> {
        let Some(Chunk { data, .. }) = self.chunks.get(chunk) else { return Vec::new() };
        let part = |copy: &Copy| {
            let start = data.start.max(copy.from);
            let end = data.end.min(copy.from + copy.len);
            let to = copy.to + start.checked_sub(copy.from)?;
            (start < end).then(|| Copy { from: start, to, len: end - start })
        };
        self.copies.iter().filter_map(part).collect()
    }

    /// The bytes of the blob that the chunks of `run` decode from.
    pub fn blob_range(&self, run: Range<usize>) -> Range<u64> {
        match self.chunks.get(run).unwrap_or(&[]) {
            [] => 0..0,
            [first, .., last] => first.blob.start..last.blob.end,
            [only] => only.blob.clone(),
        }
    }

    /// The chunks that `range`, below `tar_len`, touches.
    fn touching(&self, range: Range<u64>) -> Range<usize> {
        let first = self.chunks.partition_point(|chunk| chunk.data.end <= range.start);
        let end = self.chunks.partition_point(|chunk| chunk.data.start < range.end);
        first..end.max(first)
    }
}
