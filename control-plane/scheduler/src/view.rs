//! What people are shown of the tasks: who has what, and why it was decided so.

use std::fmt;

use skimmer_proto::TaskId;

use crate::event::{NodeId, Now, Reason, Shape};

/// One line of `skimmer task list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskView {
    pub id: TaskId,
    pub shape: Shape,
    /// Nodes that have or want any of it.
    pub peers: u32,
    /// Nodes that have all of it.
    pub complete: u32,
    /// Nodes that want more of it.
    pub wanting: u32,
    /// Nodes pick among neighbours themselves.
    pub graph: bool,
    /// Pieces that were leased and arrived, since the scheduler started.
    pub from_origin: u64,
    /// Pieces that came from other nodes.
    pub from_peers: u64,
    /// Pieces that were assigned from one zone into another.
    pub across: u64,
}

/// `skimmer task show`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskDetail {
    pub task: TaskView,
    pub peers: Vec<PeerView>,
    /// The latest, oldest first.
    pub decisions: Vec<Decision>,
}

/// A node's part in a task, in pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerView {
    pub node: NodeId,
    pub have: u32,
    /// All that it lacks and wants, on its way or not.
    pub want: u32,
    /// On their way from the origin.
    pub leased: u32,
    /// On their way from other nodes.
    pub assigned: u32,
    /// Other nodes don't fetch from it.
    pub quarantined: bool,
}

/// Something that was decided for a node, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub at: Now,
    pub node: NodeId,
    pub what: What,
    pub reason: Reason,
}

/// What was decided. Its display form is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Assigned { parent: NodeId, first: u32, pieces: u32 },
    Leased { first: u32, pieces: u32 },
    Cancelled { first: u32, pieces: u32 },
    Neighbours { count: u32 },
    Seed,
    Quarantined,
    NotEntitled,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let run = |f: &mut fmt::Formatter<'_>, first: u32, pieces: u32| match pieces {
            1 => write!(f, "piece {first}"),
            _ => write!(f, "{pieces} pieces from {first} on"),
        };
        match *self {
            Self::Assigned { parent, first, pieces } => {
                write!(f, "assigned ")?;
                run(f, first, pieces)?;
                write!(f, " from node {}", parent.0)
            }
            Self::Leased { first, pieces } => {
                write!(f, "leased ")?;
                run(f, first, pieces)?;
                write!(f, " of the origin")
            }
            Self::Cancelled { first, pieces } => {
                write!(f, "taken back ")?;
                run(f, first, pieces)
            }
            Self::Neighbours { count } => write!(f, "given {count} neighbours"),
            Self::Seed => write!(f, "told to get the whole blob"),
            Self::Quarantined => write!(f, "quarantined: nobody fetches from it"),
            Self::NotEntitled => write!(f, "not entitled at the origin: gets no leases"),
        }
    }
}
