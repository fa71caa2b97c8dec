//! What the download planner is told, within which limits it decides, and what it answers.

use std::fmt;
use std::time::Duration;

use skimmer_cache::Class;
use skimmer_proto::{PieceSet, TaskId};

/// Time since the planner started.
pub type Now = Duration;

/// Another node: its public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(pub [u8; 32]);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Shape of a task's blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub pieces: u32,
    /// Of all pieces but the last, in bytes.
    pub piece_len: u64,
}

/// Why a transfer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// The connection failed or was refused.
    Gone,
    /// Nothing came in time.
    Slow,
    /// The peer hasn't got what it was said to have.
    Absent,
    /// Wrong bytes.
    Corrupt,
    /// The origin or the peer says that this node isn't entitled.
    Refused,
}

#[derive(Clone, Debug)]
pub struct Limits {
    /// Requests to the origin at once; faults have two more.
    pub origin_requests: usize,
    /// Longest request to the origin, in bytes; at least one piece.
    pub origin_run_bytes: u64,
    /// Pieces asked of one peer and not received, where the scheduler assigned them.
    pub assigned_pieces: u32,
    /// The same, where this node chose them among all that it knows, …
    pub chosen_pieces: u32,
    /// … and among neighbours that the scheduler named: whoever has something new is asked by all of them, and
    /// each piece that waits there delays how soon the next can be passed on.
    pub neighbour_pieces: u32,
    /// Pieces in flight that this node chose itself, over all peers, in one task, …
    pub chosen_total: u32,
    /// … and over all neighbours: a piece that waits behind others somewhere isn't asked of anybody else.
    pub neighbour_total: u32,
    /// Time between two reports of arrivals in one task: the first goes at once, for others wait for it.
    pub batch: Duration,
    /// Time between two looks at a neighbour's have-map: it says by itself what it gets.
    pub probe: Duration,
    /// A fault that the scheduler doesn't answer goes to the origin after this.
    pub fault_patience: Duration,
    /// The same for everything else, if nothing at all has come meanwhile.
    pub patience: Duration,
    /// Without a scheduler: how long a peer is believed to be fetching its stripes before it
    /// has said so, and how long its answer is waited for before the origin is read.
    pub owner_answer: Duration,
    /// Without a scheduler: how long a peer that is fetching may show nothing new.
    pub owner_progress: Duration,
    /// Least wait before a peer that sends nothing is given up, …
    pub stall_min: Duration,
    /// … and the wait while nothing is known of usual times.
    pub stall_first: Duration,
    /// Least wait before a fault is asked of a second peer, and the wait while nothing is known.
    pub hedge_min: Duration,
    pub hedge_first: Duration,
    /// A peer that stalled or was lost isn't chosen for so long; doubles each time.
    pub penalty: Duration,
    /// Nor is it asked at all for so long, which doubles too.
    pub rest: Duration,
    /// A peer that refused isn't asked for that task for so long.
    pub refusal: Duration,
    /// Wait after the origin failed; doubles with each failure in a row, up to 32 times.
    pub origin_backoff: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self {
            origin_requests: 4,
            origin_run_bytes: 4 << 20,
            assigned_pieces: 64,
            chosen_pieces: 4,
            neighbour_pieces: 1,
            chosen_total: 24,
            neighbour_total: 6,
            batch: ms(20),
            probe: ms(500),
            fault_patience: ms(500),
            patience: ms(30_000),
            owner_answer: ms(2_000),
            owner_progress: ms(10_000),
            stall_min: ms(3_000),
            stall_first: ms(15_000),
            hedge_min: ms(30),
            hedge_first: ms(1_000),
            penalty: ms(10_000),
            rest: ms(250),
            refusal: ms(30_000),
            origin_backoff: ms(250),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Pieces that the node lacks are wanted; adds to what was wanted before.
    Want {
        task: TaskId,
        shape: Shape,
        pieces: PieceSet,
        class: Class,
        /// The node may read them from the origin.
        origin: bool,
    },
    /// Nobody wants these any more.
    Unwant {
        task: TaskId,
        pieces: PieceSet,
    },
    /// The scheduler: fetch these from that parent.
    Assigned {
        task: TaskId,
        parent: Peer,
        pieces: PieceSet,
    },
    /// The scheduler: fetch these from the origin; nobody else does.
    Leased {
        task: TaskId,
        pieces: PieceSet,
    },
    /// The scheduler: choose among these; replaces the previous set.
    Neighbours {
        task: TaskId,
        peers: Vec<(Peer, PieceSet)>,
    },
    /// The scheduler: what was assigned or leased of these isn't this node's any more.
    Cancelled {
        task: TaskId,
        pieces: PieceSet,
    },
    /// The scheduler: what is wanted is on its way to others, and then comes here.
    Queued {
        task: TaskId,
    },
    /// A peer has (at least) these, by its own account.
    Has {
        task: TaskId,
        peer: Peer,
        pieces: PieceSet,
        /// It is fetching the blob, as its own question shows.
        active: bool,
    },
    /// These are on their way from the origin to the peer, by its own account; replaces what it said
    /// before. Goes before the [`Event::Has`] of the same message.
    Coming {
        task: TaskId,
        peer: Peer,
        pieces: PieceSet,
    },
    /// Where a peer listens has become known.
    Met {
        peer: Peer,
    },
    /// A piece came whole, and isn't known to be wrong.
    Received {
        request: RequestId,
        piece: u32,
    },
    /// Pieces are on disk and can be served, wherever they came from.
    Stored {
        task: TaskId,
        pieces: PieceSet,
    },
    /// A received piece turned out wrong. Whoever wants it wants it anew.
    Wrong {
        task: TaskId,
        piece: u32,
    },
    /// A request has ended; what it still owes doesn't come.
    Ended {
        request: RequestId,
        outcome: Result<(), Fault>,
    },
    /// A peer is connected.
    PeerUp {
        peer: Peer,
    },
    /// It isn't any more.
    PeerLost {
        peer: Peer,
    },
    /// There is a stream to a scheduler, which knows nothing of this node yet.
    SchedulerUp,
    SchedulerDown,
    /// Time passed.
    Tick,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask `peer` for the pieces.
    Ask { request: RequestId, task: TaskId, peer: Peer, pieces: PieceSet, class: Class },
    /// Ask the origin for the pieces, which are contiguous.
    Origin { request: RequestId, task: TaskId, pieces: PieceSet, class: Class, why: Why },
    /// Nothing more is wanted of this request.
    Abandon { request: RequestId },
    /// Ask `peer` what it has of the task; [`Event::Has`] answers.
    Probe { task: TaskId, peer: Peer },
    /// Tell the scheduler.
    Report(Report),
    /// The origin refuses this node, and nobody else is known to have what it lacks.
    Hopeless { task: TaskId },
}

/// What the scheduler is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    Want {
        task: TaskId,
        shape: Shape,
        pieces: PieceSet,
        class: Class,
        origin: bool,
    },
    /// Wanted, and on their way from the origin already.
    Reading {
        task: TaskId,
        pieces: PieceSet,
    },
    Arrived {
        task: TaskId,
        pieces: PieceSet,
    },
    /// `parent` is `None` for the origin. The pieces are still wanted.
    Failed {
        task: TaskId,
        pieces: PieceSet,
        parent: Option<Peer>,
        fault: Fault,
    },
    /// Not wanted any more; `None`: nothing of the task is.
    Withdraw {
        task: TaskId,
        pieces: Option<PieceSet>,
    },
}

/// Why this node reads the origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Why {
    /// The scheduler leased it the pieces.
    Leased,
    /// A reader waits, and no peer has brought the piece in time.
    ReaderWaits,
    /// There is a scheduler, but it says nothing.
    SchedulerSilent,
    /// There is no scheduler, and of the known peers this node is the one to fetch this stripe.
    StripeOwner,
    /// There is no scheduler and no peer.
    Alone,
}

impl Why {
    pub const ALL: [Self; 5] =
        [Self::Leased, Self::ReaderWaits, Self::SchedulerSilent, Self::StripeOwner, Self::Alone];

    /// The reason code of logs and metrics.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Leased => "leased",
            Self::ReaderWaits => "reader-waits",
            Self::SchedulerSilent => "scheduler-silent",
            Self::StripeOwner => "stripe-owner",
            Self::Alone => "alone",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}
