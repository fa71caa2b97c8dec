//! Blobs that aren't compressed: any cut will do.

use crate::chunk::{Chunk, State};

/// The smallest piece is as long: chunks finer than that would save no transfer.
pub(super) const CHUNK_LEN: u64 = 256 << 10;

/// The chunks of a blob of `len` bytes.
pub(super) fn chunks(len: u64) -> Vec<Chunk> {
    (0..len.div_ceil(CHUNK_LEN))
        .map(|i| {
            let span = i * CHUNK_LEN..((i + 1) * CHUNK_LEN).min(len);
            Chunk { data: span.clone(), blob: span, state: State::Stored }
        })
        .collect()
}
