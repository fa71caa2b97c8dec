//! Compression formats of layer blobs: telling them apart, and decoding one from end to end while
//! noting where it can be entered again.
//!
//! Incremental: bytes are pushed in, decoded bytes come out, memory stays bounded whatever the input
//! says. The chunks depend on the blob alone, never on how it was cut into pushes.

mod chunk_stream;
mod decoder;
mod gzip;
mod inflate;
mod stored;
mod stream;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod zstd;

use crate::chunk::Chunk;
pub(crate) use chunk_stream::ChunkStream;
pub use decoder::{Decoder, SPAN};
use inflate::WINDOW_LEN;

/// How a layer blob is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all: the blob is the tar.
    Stored,
    Gzip,
    Zstd,
}

impl Compression {
    /// By a blob's first bytes (4 are enough), as containerd does: a media type is only a hint.
    pub fn sniff(head: &[u8]) -> Self {
        if head.starts_with(&gzip::MAGIC) {
            return Self::Gzip;
        }
        let skippable = matches!(head, [first, rest @ ..]
            if first & 0xf0 == zstd::SKIPPABLE[0] && rest.starts_with(&zstd::SKIPPABLE[1..]));
        if skippable || head.starts_with(&zstd::MAGIC) { Self::Zstd } else { Self::Stored }
    }
}

/// Offsets are in the compressed blob.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("inflate: damaged near byte {at} of the blob")]
    Inflate { at: u64, source: inflate::Error },
    #[error("gzip header at byte {at} of the blob: {reason}")]
    Header { at: u64, reason: &'static str },
    #[error("gzip member ending at byte {at} of the blob does not match its checksum")]
    Checksum { at: u64 },
    #[error("neither another gzip member nor padding at byte {at} of the blob")]
    Garbage { at: u64 },
    #[error("zstd: damaged near byte {at} of the blob: {reason}")]
    Zstd { at: u64, reason: &'static str },
    #[error("the blob ends at byte {at}, inside its compressed stream")]
    Truncated { at: u64 },
    #[error("the blob decodes to more than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("chunk {chunk} decodes to {actual} bytes, expected {expected}")]
    ChunkLength { chunk: usize, actual: u64, expected: u64 },
    #[error("chunk {chunk} needs {expected} compressed bytes, got {actual}")]
    CompressedLength { chunk: usize, actual: u64, expected: u64 },
    #[error("the layer has no chunk {chunk}")]
    NoChunk { chunk: usize },
    #[error("decompress the window of chunk {chunk}")]
    Window { chunk: usize, source: std::io::Error },
    #[error("compress the window at byte {at} of the blob")]
    CompressWindow { at: u64, source: std::io::Error },
    #[error("the windows of the layer are more than {limit} bytes")]
    Windows { limit: u32 },
    #[error("out of memory")]
    Memory,
}

/// What one step of a stream did.
struct Step {
    consumed: usize,
    produced: usize,
    event: Event,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Event {
    None,
    /// A deflate block that isn't its member's first starts at bit `bit` of the blob.
    Block {
        bit: u64,
    },
    /// A member or frame that isn't inside a chunk by necessity starts at this byte of the blob.
    Start {
        at: u64,
    },
}

/// What [`Decoder::finish`] returns.
#[derive(Debug, PartialEq, Eq)]
pub struct Decoded {
    pub compression: Compression,
    pub blob_len: u64,
    pub data_len: u64,
    pub chunks: Vec<Chunk>,
    /// The windows that [`crate::chunk::State::Gzip`] refers to.
    pub windows: Vec<u8>,
}
