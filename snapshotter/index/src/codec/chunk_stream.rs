//! The streams of chunks, entered where the index says.

use std::ops::Range;

use zstd::bulk::Decompressor;

use super::stream::Stream;
use super::zstd::Frames;
use super::{Error, WINDOW_LEN};
use crate::chunk::{Chunk, State};

pub(crate) struct ChunkStream {
    stream: Stream,
    unpacker: Unpacker,
}

impl ChunkStream {
    /// Of nothing yet.
    pub(crate) fn new() -> Self {
        Self { stream: Stream::Stored { at: 0 }, unpacker: Unpacker::new() }
    }

    /// Goes to the start of a chunk. `windows`: what [`State::Gzip`] refers to.
    pub(crate) fn enter(
        &mut self,
        number: usize,
        chunk: &Chunk,
        windows: &[u8],
    ) -> Result<(), Error> {
        let at = chunk.blob.start;
        match &chunk.state {
            State::Stored => self.stream = Stream::Stored { at },
            State::Gzip { bit, window } => {
                let members = self.stream.members();
                match window {
                    None => members.restart(at),
                    Some(range) => {
                        members.resume(at, *bit, self.unpacker.unpack(number, windows, range)?);
                    }
                }
            }
            State::ZstdFrame => self.stream = Stream::Zstd(Frames::new(at)?),
        }
        Ok(())
    }

    /// Leaves a chunk: what may be large isn't kept for the next.
    pub(crate) fn leave(&mut self) {
        if let Stream::Zstd(_) = self.stream {
            self.stream = Stream::Stored { at: 0 };
        }
    }

    /// Decodes `input` until it is used up or `left` is zero, by way of `room`.
    pub(crate) fn push(
        &mut self,
        mut input: &[u8],
        room: &mut [u8],
        left: &mut u64,
        out: &mut dyn FnMut(&[u8]),
    ) -> Result<(), Error> {
        let mut more = false;
        while !input.is_empty() || more {
            let room_len = usize::try_from(*left).map_or(room.len(), |left| left.min(room.len()));
            if room_len == 0 {
                return Ok(());
            }
            let step = self.stream.step(input, &mut room[..room_len], false)?;
            input = &input[step.consumed..];
            *left -= step.produced as u64;
            out(&room[..step.produced]);
            // A full room may have left something inside the stream: that comes without input.
            more = step.produced == room_len;
        }
        Ok(())
    }
}

/// Unpacks windows.
struct Unpacker {
    /// Made when the first window comes.
    decompressor: Option<Decompressor<'static>>,
    window: Box<[u8; WINDOW_LEN]>,
}

impl Unpacker {
    fn new() -> Self {
        Self { decompressor: None, window: Box::new([0; WINDOW_LEN]) }
    }

    /// A window from an index: whatever that holds, 32 KiB or an error.
    fn unpack(
        &mut self,
        chunk: usize,
        windows: &[u8],
        range: &Range<u32>,
    ) -> Result<&[u8; WINDOW_LEN], Error> {
        let failed = |source| Error::Window { chunk, source };
        let decompressor = match &mut self.decompressor {
            Some(decompressor) => decompressor,
            None => self.decompressor.insert(Decompressor::new().map_err(failed)?),
        };
        let packed = windows.get(range.start as usize..range.end as usize).unwrap_or(&[]);
        let len = decompressor
            .decompress_to_buffer(packed, self.window.as_mut_slice())
            .map_err(failed)?;
        if len != WINDOW_LEN {
            let (actual, expected) = (len as u64, WINDOW_LEN as u64);
            return Err(Error::ChunkLength { chunk, actual, expected });
        }
        Ok(&self.window)
    }
}
