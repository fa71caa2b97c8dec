//! The stream of one chunk, entered where the index says.

use std::ops::Range;

use super::gzip::Members;
use super::stream::Stream;
use super::zstd::Frames;
use super::{Error, WINDOW_LEN};
use crate::chunk::{Chunk, State};

pub(crate) struct ChunkStream {
    stream: Stream,
}

impl ChunkStream {
    /// `windows`: what [`State::Gzip`] refers to.
    pub(crate) fn new(number: usize, chunk: &Chunk, windows: &[u8]) -> Result<Self, Error> {
        let at = chunk.blob.start;
        let stream = match &chunk.state {
            State::Stored => Stream::Stored { at },
            State::Gzip { window: None, .. } => Stream::Gzip(Members::new(at)),
            State::Gzip { bit, window: Some(range) } => {
                let window = unpack(number, windows, range)?;
                Stream::Gzip(Members::resume(at, *bit, &window))
            }
            State::ZstdFrame => Stream::Zstd(Frames::new(at)?),
        };
        Ok(Self { stream })
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

/// A window from an index: whatever that holds, 32 KiB or an error.
fn unpack(
    chunk: usize,
    windows: &[u8],
    range: &Range<u32>,
) -> Result<Box<[u8; WINDOW_LEN]>, Error> {
    let mut window = Box::new([0; WINDOW_LEN]);
    let packed = windows.get(range.start as usize..range.end as usize).unwrap_or(&[]);
    let len = zstd::bulk::decompress_to_buffer(packed, window.as_mut_slice())
        .map_err(|source| Error::Window { chunk, source })?;
    if len != WINDOW_LEN {
        let (actual, expected) = (len as u64, WINDOW_LEN as u64);
        return Err(Error::ChunkLength { chunk, actual, expected });
    }
    Ok(window)
}
