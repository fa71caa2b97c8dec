//! Chunks: the spans of a layer's data that decode on their own.

use std::ops::Range;

use crate::codec::{ChunkStream, Error};
use crate::index::LayerIndex;

/// A span of a layer's data that can be decoded from a span of the blob alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// In the decoded data; never empty.
    pub data: Range<u64>,
    /// In the blob. Neighbours share a byte where one ends and the next starts inside it.
    pub blob: Range<u64>,
    pub state: State,
}

/// What decoding a chunk starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Stored,
    /// At a deflate block whose first bit is `bit` of the first byte (0 is the lowest), behind the 32
    /// KiB that this range of [`LayerIndex::windows`] holds, zstd-compressed. Without a window: at the
    /// start of a member.
    Gzip {
        bit: u8,
        window: Option<Range<u32>>,
    },
    /// At the start of a frame.
    ZstdFrame,
}

/// Decodes chunks, one after the other, whose compressed bytes are pushed in, in order. Nothing is allocated in
/// proportion to a chunk; a zstd window may take 128 MiB until the chunk's end.
pub struct ChunkDecoder {
    chunk: usize,
    expected: u64,
    left: u64,
    stream: ChunkStream,
}

impl Default for ChunkDecoder {
    fn default() -> Self {
        Self { chunk: 0, expected: 0, left: 0, stream: ChunkStream::new() }
    }
}

impl ChunkDecoder {
    /// What is pushed from now on is `chunk`'s.
    pub fn enter(&mut self, index: &LayerIndex, chunk: usize) -> Result<(), Error> {
        let found = index.chunks.get(chunk).ok_or(Error::NoChunk { chunk })?;
        let expected = found.data.end - found.data.start;
        (self.chunk, self.expected, self.left) = (chunk, expected, expected);
        self.stream.enter(chunk, found, &index.windows)
    }

    /// The next bytes of the chunk's [`Chunk::blob`]; what they decode to goes to `out`, never more
    /// than the chunk's length in total, and at most as much at a time as there is `room`, which isn't empty.
    pub fn push(
        &mut self,
        bytes: &[u8],
        room: &mut [u8],
        out: &mut dyn FnMut(&[u8]),
    ) -> Result<(), Error> {
        self.stream.push(bytes, room, &mut self.left, out)
    }

    /// The chunk's end. Fails if less came out than it is long.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.stream.leave();
        let Self { chunk, expected, left, .. } = *self;
        if left == 0 {
            return Ok(());
        }
        Err(Error::ChunkLength { chunk, actual: expected - left, expected })
    }
}

/// Bytes that [`decode_chunk`] decodes at a time.
const ROOM: usize = 128 << 10;

/// Decodes chunk `chunk` from the bytes of its [`Chunk::blob`] to the end of `out`, which is cleared
/// first and then holds [`Chunk::data`]. Memory is allocated as bytes come out.
pub fn decode_chunk(
    index: &LayerIndex,
    chunk: usize,
    compressed: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    out.clear();
    let found = index.chunks.get(chunk).ok_or(Error::NoChunk { chunk })?;
    let (actual, expected) = (compressed.len() as u64, found.blob.end - found.blob.start);
    if actual != expected {
        return Err(Error::CompressedLength { chunk, actual, expected });
    }
    let mut decoder = ChunkDecoder::default();
    decoder.enter(index, chunk)?;
    let mut room = vec![0; ROOM];
    decoder.push(compressed, &mut room, &mut |bytes| out.extend_from_slice(bytes))?;
    decoder.finish()
}
