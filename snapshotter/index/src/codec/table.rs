//! The chunks of a compressed blob, as a pass over it finds them.

use std::ops::Range;

use zstd::bulk::Compressor;

use super::Error;
use super::inflate::WINDOW_LEN;
use super::sparse::{Checkpoint, Scratch};
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
    packer: Option<Packer>,
    /// The last compressed bytes, the latest lowest: a block may start in a byte that is read already.
    recent: u64,
}

struct Start {
    data: u64,
    blob: u64,
    entry: Entry,
}

/// How the chunk that is being decoded is entered.
pub(super) enum Entry {
    State(State),
    Block { bit: u8, checkpoint: Checkpoint },
}

impl Table {
    pub const fn new() -> Self {
        let entry = Entry::State(State::Gzip { bit: 0, window: None });
        let start = Start { data: 0, blob: 0, entry };
        Self { chunks: Vec::new(), windows: Vec::new(), start, packer: None, recent: 0 }
    }

    /// Where in the data the chunk that is being decoded starts.
    pub const fn start(&self) -> u64 {
        self.start.data
    }

    /// What a step read and decoded.
    pub fn follow(&mut self, consumed: &[u8], produced: &[u8]) {
        if let Entry::Block { checkpoint, .. } = &mut self.start.entry {
            checkpoint.follow(consumed, produced);
        }
        let last = consumed.last_chunk::<8>().map_or(consumed, |last| last);
        self.recent = last.iter().fold(self.recent, |recent, byte| recent << 8 | u64::from(*byte));
    }

    /// A chunk starts at bit `bit` of the blob, which is read up to the byte `at`.
    pub fn enter_block(
        &mut self,
        data: u64,
        bit: u64,
        at: u64,
        window: Box<[u8; WINDOW_LEN]>,
    ) -> Result<(), Error> {
        let (blob, end) = (bit / 8, bit.div_ceil(8));
        let bytes = self.recent.to_be_bytes();
        let ahead = usize::try_from(at - blob).map_or(&bytes[..0], |n| &bytes[8 - n.min(8)..]);
        let bit = (bit % 8) as u8;
        let checkpoint = Checkpoint::new(window, bit, ahead);
        self.cut(data, blob, end, Entry::Block { bit, checkpoint })
    }

    /// Ends the chunk at `end` in the blob and starts the next at `blob`: both hold the byte in between
    /// if the cut is inside one.
    pub fn cut(&mut self, data: u64, blob: u64, end: u64, entry: Entry) -> Result<(), Error> {
        let Start { data: from, blob, entry } =
            std::mem::replace(&mut self.start, Start { data, blob, entry });
        // A chunk without data is none: its compressed bytes belong to nobody.
        if data == from {
            return Ok(());
        }
        let state = match entry {
            Entry::State(state) => state,
            Entry::Block { bit, checkpoint } => {
                let window = Some(self.pack(blob, checkpoint)?);
                State::Gzip { bit, window }
            }
        };
        self.chunks.push(Chunk { data: from..data, blob: blob..end, state });
        Ok(())
    }

    fn pack(&mut self, at: u64, checkpoint: Checkpoint) -> Result<Range<u32>, Error> {
        let packer = match &mut self.packer {
            Some(packer) => packer,
            None => self.packer.insert(Packer::new(at)?),
        };
        let window = checkpoint.sparse(&mut packer.scratch);
        let packed = packer.compressor.compress(window.as_slice());
        let packed = packed.map_err(|source| Error::CompressWindow { at, source })?;
        let start = u32::try_from(self.windows.len());
        self.windows.extend_from_slice(&packed);
        match (start, u32::try_from(self.windows.len())) {
            (Ok(start), Ok(end)) => Ok(start..end),
            _ => Err(Error::Windows { limit: u32::MAX }),
        }
    }

    pub fn finish(mut self, data: u64, end: u64) -> Result<(Vec<Chunk>, Vec<u8>), Error> {
        self.cut(data, end, end, Entry::State(State::Stored))?;
        Ok((self.chunks, self.windows))
    }
}

/// Makes windows small.
struct Packer {
    scratch: Scratch,
    compressor: Compressor<'static>,
}

impl Packer {
    /// `at`: where in the blob it is first needed.
    fn new(at: u64) -> Result<Self, Error> {
        let compressor =
            Compressor::new(WINDOW_LEVEL).map_err(|source| Error::CompressWindow { at, source })?;
        Ok(Self { scratch: Scratch::new(), compressor })
    }
}
