//! One interface to the compressed streams.

use super::gzip::Members;
use super::inflate::WINDOW_LEN;
use super::zstd::Frames;
use super::{Error, Event, Step};

pub(crate) enum Stream {
    Stored { at: u64 },
    Gzip(Members),
    Zstd(Frames),
}

impl Stream {
    pub(super) fn step(
        &mut self,
        input: &[u8],
        room: &mut [u8],
        stop_at_block: bool,
    ) -> Result<Step, Error> {
        match self {
            Self::Stored { at } => {
                let len = input.len().min(room.len());
                room[..len].copy_from_slice(&input[..len]);
                *at += len as u64;
                Ok(Step { consumed: len, produced: len, event: Event::None })
            }
            Self::Gzip(members) => members.step(input, room, stop_at_block),
            Self::Zstd(frames) => frames.step(input, room),
        }
    }

    /// The one for gzip, in place of another.
    pub(super) fn members(&mut self) -> &mut Members {
        loop {
            match self {
                Self::Gzip(members) => return members,
                _ => *self = Self::Gzip(Members::new(0)),
            }
        }
    }

    /// Where the last complete member or frame ended.
    pub(super) const fn end(&self) -> u64 {
        match self {
            Self::Stored { at } => *at,
            Self::Gzip(members) => members.end(),
            Self::Zstd(frames) => frames.end(),
        }
    }

    /// Whether the blob may end here.
    pub(super) const fn is_complete(&self) -> bool {
        match self {
            Self::Stored { .. } => true,
            Self::Gzip(members) => members.is_complete(),
            Self::Zstd(frames) => frames.is_complete(),
        }
    }

    /// Makes this point a checkpoint: only gzip can be entered inside a member.
    pub(super) fn set_checkpoint(&mut self) {
        if let Self::Gzip(members) = self {
            members.set_checkpoint();
        }
    }

    /// What the data behind the last checkpoint referred back to, if that is one.
    pub(super) fn take_window(&mut self) -> Option<Box<[u8; WINDOW_LEN]>> {
        match self {
            Self::Gzip(members) => members.take_window(),
            Self::Stored { .. } | Self::Zstd(_) => None,
        }
    }
}
