//! The chunks of a compressed blob, as a pass over it finds them.

use std::ops::Range;

use zstd::bulk::Compressor;

use super::Error;
use super::inflate::WINDOW_LEN;
use crate::chunk::{Chunk, State};

/// zstd's level for windows. Part of the index format.
const WINDOW_LEVEL: i32 = 1;

/// The chunks so far.
pub(super) struct Table {
    chunks: Vec<Chunk>,
    windows: Vec<u8>,
    /// Where the chunk that is being decoded starts.
    start: Start,
    /// Made when the first window comes.
    packer: Option<Compressor<'static>>,
}

/// In the data, in the blob, and how to begin there; the window comes at the chunk's end.
pub(super) struct Start {
    pub data: u64,
    pub blob: u64,
    pub state: State,
}

impl Table {
    pub const fn new() -> Self {
        let start = Start { data: 0, blob: 0, state: State::Gzip { bit: 0, window: None } };
        Self { chunks: Vec::new(), windows: Vec::new(), start, packer: None }
    }

    /// Where in the data the chunk that is being decoded starts.
    pub const fn start(&self) -> u64 {
        self.start.data
    }

    /// Ends the chunk at `end` in the blob and starts the next at `next`: both hold the byte in between if the cut is
    /// inside one. `window`: what the chunk that ends referred to, if anything.
    pub fn cut(
        &mut self,
        end: u64,
        next: Start,
        window: Option<Box<[u8; WINDOW_LEN]>>,
    ) -> Result<(), Error> {
        let (data, blob) = (self.start.data..next.data, self.start.blob..end);
        let mut state = std::mem::replace(&mut self.start, next).state;
        // A chunk without data is none: its compressed bytes belong to nobody.
        if data.is_empty() {
            return Ok(());
        }
        if let (State::Gzip { window: place, .. }, Some(window)) = (&mut state, window) {
            *place = Some(self.pack(blob.start, &window)?);
        }
        self.chunks.push(Chunk { data, blob, state });
        Ok(())
    }

    /// Adds the window of a checkpoint at byte `at` of the blob.
    fn pack(&mut self, at: u64, window: &[u8; WINDOW_LEN]) -> Result<Range<u32>, Error> {
        let failed = |source| Error::CompressWindow { at, source };
        let packer = match &mut self.packer {
            Some(packer) => packer,
            None => self.packer.insert(Compressor::new(WINDOW_LEVEL).map_err(failed)?),
        };
        let packed = packer.compress(window).map_err(failed)?;
        let start = u32::try_from(self.windows.len());
        self.windows.extend_from_slice(&packed);
        match (start, u32::try_from(self.windows.len())) {
            (Ok(start), Ok(end)) => Ok(start..end),
            _ => Err(Error::Windows { limit: u32::MAX }),
        }
    }

    /// The chunks and their windows, of a blob that ends at `end`; `window` as in [`cut`](Self::cut).
    pub fn finish(
        mut self,
        data: u64,
        end: u64,
        window: Option<Box<[u8; WINDOW_LEN]>>,
    ) -> Result<(Vec<Chunk>, Vec<u8>), Error> {
        self.cut(end, Start { data, blob: end, state: State::Stored }, window)?;
        Ok((self.chunks, self.windows))
    }
}
