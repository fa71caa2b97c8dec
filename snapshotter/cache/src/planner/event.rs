//! What the planner is told, within which limits it decides, and what it answers.

use std::ops::Range;
use std::time::Duration;

use skimmer_proto::PieceSet;

use crate::source::Class;

/// Time since the planner started.
pub type Now = Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobId(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NeedId(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId(pub u64);

/// A source, by its place in [`Limits::sources`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(pub usize);

#[derive(Clone, Debug)]
pub struct Limits {
    /// In order of preference.
    pub sources: Vec<Capacity>,
    /// A blob with so many runs in flight starts no more, except for faults.
    pub per_blob: usize,
    /// Background runs in flight.
    pub background: usize,
    /// Longest run in bytes by class, in the order of [`Class::ALL`]; a run has at least one piece.
    pub run_bytes: [u64; 3],
    /// How often a source may deliver the same piece wrong before it isn't asked for it any more.
    pub wrong: u32,
    /// Wait after a failed run; doubles with each failure in a row, up to `backoff_max`.
    pub backoff: Duration,
    pub backoff_max: Duration,
    /// A fault fails this long after it was asked for, other needs this long after their blob's
    /// last arrival.
    pub deadline: Duration,
}

/// What a source can carry at once.
#[derive(Clone, Copy, Debug)]
pub enum Capacity {
    /// Runs of contiguous pieces, so many at once.
    Ranges {
        connections: usize,
        /// Of these, how many only faults may use.
        reserved: usize,
    },
    /// Whatever is wanted of a blob at once: the source orders and bounds its work itself.
    Pieces,
}

#[derive(Clone, Debug)]
pub enum Event {
    /// Somebody wants absent pieces.
    Need {
        need: NeedId,
        blob: BlobId,
        piece_len: u64,
        pieces: Vec<u32>,
        class: Class,
        /// Whether sources of the kind [`Capacity::Pieces`] take the blob.
        taken: bool,
    },
    /// Sources of the kind [`Capacity::Pieces`] take the blob from now on, or don't.
    Taken {
        blob: BlobId,
        taken: bool,
    },
    /// Nobody waits for this need any more.
    Withdrawn {
        need: NeedId,
    },
    /// A piece is on disk (and verified, where it can be).
    Arrived {
        run: RunId,
        piece: u32,
    },
    /// A piece came, but doesn't match its digest; the run goes on.
    Wrong {
        run: RunId,
        piece: u32,
    },
    Ended {
        run: RunId,
        outcome: Outcome,
    },
    /// Time passed.
    Tick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    Failed { retryable: bool },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Fetch(Run),
    /// Pieces that are in flight there have become more urgent.
    Urge {
        run: RunId,
        pieces: PieceSet,
        class: Class,
    },
    /// Nobody waits for what the run still owes: it is to end.
    Stop {
        run: RunId,
    },
    Satisfied {
        need: NeedId,
    },
    Failed {
        need: NeedId,
        blob: BlobId,
        why: Why,
    },
}

/// A request to a source: pieces of one blob; contiguous ones, if the source takes ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub id: RunId,
    pub blob: BlobId,
    pub source: SourceId,
    pub pieces: PieceSet,
    pub class: Class,
}

impl Run {
    /// From the first piece to the last.
    pub fn range(&self) -> Range<u32> {
        let first = self.pieces.first().unwrap_or(0);
        first..first.saturating_add(self.pieces.len())
    }
}

/// Why a need failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Every source said that asking again is of no use.
    Refused,
    /// Every source delivered this piece wrong too often.
    Wrong {
        piece: u32,
    },
    Deadline,
}
