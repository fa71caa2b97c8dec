//! A transfer that was given to a node: a lease of the origin, or an assignment.

use std::time::Duration;

use skimmer_proto::PieceSet;

use crate::event::Now;

/// A run of pieces on its way to a child.
#[derive(Clone, Debug)]
pub struct Fetch {
    /// The parent's slot; `None`: a lease of the origin.
    pub parent: Option<u32>,
    /// The first piece.
    start: u32,
    /// Bit `i`: piece `start + i` is on its way.
    left: u64,
    /// Bytes of the whole run.
    pub bytes: u64,
    pub since: Now,
    /// When it should have been reported.
    pub due: Now,
    /// A reader waits for it.
    pub urgent: bool,
}

impl Fetch {
    /// `len` pieces from `start` on; at most [`MAX_RUN`].
    pub fn new(parent: Option<u32>, start: u32, len: u32, bytes: u64, since: Now) -> Self {
        let left = u64::MAX >> (64 - len.clamp(1, MAX_RUN));
        Self { parent, start, left, bytes, since, due: since, urgent: false }
    }

    /// Whether it was on its way.
    pub fn take(&mut self, piece: u32) -> bool {
        let Some(bit) = piece.checked_sub(self.start).filter(|bit| *bit < 64) else { return false };
        let there = self.left & (1 << bit) != 0;
        self.left &= !(1 << bit);
        there
    }

    pub const fn is_over(&self) -> bool {
        self.left == 0
    }

    /// It should have been reported, and half as long again has passed. Nobody knows how long a lease takes.
    pub fn is_late(&self, now: Now, lead: Duration) -> bool {
        self.parent.is_some() && now > self.due + lead + (self.due.saturating_sub(self.since)) / 2
    }

    pub const fn left(&self) -> u32 {
        self.left.count_ones()
    }

    pub fn pieces(&self) -> impl Iterator<Item = u32> + use<> {
        let (start, left) = (self.start, self.left);
        (0..64).filter(move |bit| left & (1 << bit) != 0).map(move |bit| start + bit)
    }

    pub fn set(&self) -> PieceSet {
        self.pieces().collect()
    }
}

/// The most pieces in a run.
pub const MAX_RUN: u32 = 64;
