//! What the scheduler is told, and what it answers. One scheduler serves one cluster: nodes of two
//! clusters can't meet in it.

use std::fmt;
use std::time::Duration;

use skimmer_proto::{PieceSet, TaskId};

/// Time since the scheduler started.
pub type Now = Duration;

/// A connected node: one stream, numbered by the shell and never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

/// What the scheduler knows of a node from its certificate and its greeting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// The node's own public key: the same on each of its streams.
    pub key: [u8; 32],
    pub zone: String,
    pub seed: bool,
    /// Bytes per second; 0 while unknown.
    pub upload: u64,
    pub download: u64,
}

/// Shape of a task's blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub pieces: u32,
    /// Of all pieces but the last, in bytes.
    pub piece_len: u64,
}

/// Why pieces are wanted, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    Fault,
    PullThrough,
    Background,
}

/// Why a transfer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// The connection failed or was refused.
    Gone,
    /// Nothing came in time.
    Slow,
    /// The parent hasn't got what it was said to have.
    Absent,
    /// Wrong bytes.
    Corrupt,
    /// The origin or the parent says that the node isn't entitled.
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A node's stream is open; its inventory follows.
    Joined { node: NodeId, info: NodeInfo },
    /// The stream has ended. What was leased or assigned to the node, or assigned from it, is free.
    Left { node: NodeId },
    /// The node serves these pieces; it had them before the stream.
    Announce { node: NodeId, task: TaskId, shape: Shape, pieces: PieceSet },
    /// That was its whole inventory.
    Announced { node: NodeId },
    /// The node lacks these pieces and wants them; adds to what it wanted before.
    Want {
        node: NodeId,
        task: TaskId,
        shape: Shape,
        pieces: PieceSet,
        class: Class,
        /// It may be leased pieces of the origin.
        origin: bool,
    },
    /// The node is reading these from the origin already, which an earlier scheduler or itself decided:
    /// what of it nobody else has or reads counts as leased to it.
    Reading { node: NodeId, task: TaskId, pieces: PieceSet },
    /// The pieces are on the node's disk, and it serves them from now on.
    Arrived { node: NodeId, task: TaskId, pieces: PieceSet },
    /// The node could not get these pieces from there, and goes on wanting them.
    Failed {
        node: NodeId,
        task: TaskId,
        pieces: PieceSet,
        /// `None`: the origin.
        parent: Option<NodeId>,
        fault: Fault,
    },
    /// The node doesn't want these pieces any more, or nothing of the task; it goes on serving what it has.
    Withdraw { node: NodeId, task: TaskId, pieces: Option<PieceSet> },
    /// Time passed.
    Tick,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// `node` fetches the pieces from `parent`, in this order of runs.
    Assign { node: NodeId, task: TaskId, parent: NodeId, pieces: PieceSet, reason: Reason },
    /// `node` fetches the pieces from the origin, and nobody else does.
    Lease { node: NodeId, task: TaskId, pieces: PieceSet, reason: Reason },
    /// The nodes that `node` may ask on its own for whatever they have; replaces the previous set.
    Neighbours { node: NodeId, task: TaskId, peers: Vec<NodeId>, reason: Reason },
    /// Whatever was assigned or leased of these pieces isn't the node's any more.
    Cancel { node: NodeId, task: TaskId, pieces: PieceSet, reason: Reason },
    /// What `node` lacks is on its way to others: it has been heard, and need not look for it elsewhere.
    Queued { node: NodeId, task: TaskId, reason: Reason },
    /// A seed peer is told to get the whole blob.
    Seed { node: NodeId, task: TaskId, reason: Reason },
}

/// Why the scheduler decided so, for people; each decision keeps its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Nobody has the piece, and nobody is fetching it.
    NobodyHasIt,
    /// The lease's holder is gone or gave it back.
    LeaseLost,
    /// The parent has it and is the least busy in the nearest zone.
    LeastBusyParent,
    /// The piece is the rarest that the node lacks.
    RarestPiece,
    /// A reader waits.
    ReaderWaits,
    /// Too many nodes for piece by piece assignment: the node picks among neighbours itself.
    LargeSwarm,
    /// The first nodes want it, and a seed peer is at hand.
    SeedFirst,
    /// Others are getting it.
    OnItsWay,
    /// The node went away, or asked not to be given more.
    ParentGone,
    /// It takes far longer than it should.
    Overdue,
    /// Several nodes couldn't fetch from it.
    Complaints,
    /// It sent wrong bytes.
    WrongBytes,
    /// The origin says so.
    Refused,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NobodyHasIt => "nobody has it or is fetching it",
            Self::LeaseLost => "the lease's holder is gone or gave it back",
            Self::LeastBusyParent => "least busy parent that has it, nearest zone first",
            Self::RarestPiece => "rarest piece that the node lacks",
            Self::ReaderWaits => "a reader waits",
            Self::LargeSwarm => "large swarm: the node picks among its neighbours",
            Self::SeedFirst => "a seed peer is at hand",
            Self::OnItsWay => "it is on its way to others",
            Self::ParentGone => "the parent is gone",
            Self::Overdue => "it takes far longer than it should",
            Self::Complaints => "several nodes couldn't fetch from it",
            Self::WrongBytes => "it sent wrong bytes",
            Self::Refused => "the origin says so",
        })
    }
}
