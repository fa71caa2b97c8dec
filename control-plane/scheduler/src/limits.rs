//! The scheduler's bounds and patience. Every queue, list and set in the crate is bounded by one of them.

use std::time::Duration;

/// The defaults suit a cluster of up to some ten thousand nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Transfers assigned from one parent at a time. Two hide the way to the scheduler and back, the third
    /// is for short ones.
    pub uploads: u32,
    /// Transfers assigned to one child at a time.
    pub downloads: u32,
    /// The same two where the node hasn't told its rate: nothing but the reports paces such a link, so that one more
    /// is on its way while links between nodes are being made.
    pub untold: u32,
    /// From a decision to its first byte and from the last byte to the report, until it is known better.
    pub lead: Duration,
    /// Transfers a parent or a child may have at a time if a reader waits for the last of them.
    pub urgent: u32,
    /// Leases at a time: over all tasks, so many in any case; of one task, up to the second as long as that doesn't
    /// slow its origin down. Each beyond what keeps the origin busy delays all others: a piece that
    /// shares the origin's link with fifteen others is there, and can be passed on, fifteen pieces' time later.
    pub leases: (u32, u32),
    /// The most pieces in an assignment; large blobs get longer ones.
    pub run: u32,
    /// Assignments per second, over all tasks, up to which pieces are assigned one by one. Tasks that would
    /// exceed it get neighbour graphs.
    pub rate: u64,
    /// Pieces × nodes of a task up to which pieces are assigned one by one; bounds memory at 1/4 byte each.
    pub cells: u64,
    /// Neighbours of a node in a graph: it gets new ones below the first, and never more than the second.
    pub degree: (u32, u32),
    /// Edges of a graph that lead into a zone from all others.
    pub zone_edges: u32,
    /// Copies in a zone up to which a piece is assigned in a graph as well; beyond, the nodes do without.
    pub spread: u32,
    /// What a node with an unknown rate is taken for, in bytes per second, where a guess is needed.
    pub assumed_rate: u64,
    /// After a start, how long leases wait for nodes to announce what they have.
    pub settle: Duration,
    /// Leases are granted earlier if no node has joined for so long and all have announced.
    pub quiet: Duration,
    /// A transfer without an end is taken back after so long.
    pub patience: Duration,
    /// How long a node is given no lease after a failed one; doubles with each failure in a row.
    pub backoff: Duration,
    /// How often a node that is given nothing hears that it will be: well below what a node waits before it goes to the
    /// origin unasked.
    pub reassure: Duration,
    /// How often overdue transfers and starving nodes are looked for.
    pub sweep: Duration,
    /// Tasks, or reports of wrong bytes, after which a node isn't used as a parent anywhere.
    pub strikes: u32,
    /// Parents that one node may have quarantined for others; what it says beyond concerns itself alone.
    pub accusations: u32,
    /// How long a node's strikes and accusations outlast its stream.
    pub memory: Duration,
    /// Tasks a node may be part of; announcements of more are ignored.
    pub tasks_per_node: usize,
    /// Decisions kept per task.
    pub decisions: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            uploads: 3,
            downloads: 3,
            untold: 4,
            lead: Duration::from_millis(5),
            urgent: 16,
            leases: (4, 16),
            run: 16,
            rate: 50_000,
            cells: 1 << 30,
            degree: (8, 10),
            zone_edges: 2,
            spread: 16,
            assumed_rate: 32 << 20,
            settle: Duration::from_secs(10),
            quiet: Duration::from_millis(500),
            patience: Duration::from_secs(30),
            backoff: Duration::from_millis(500),
            reassure: Duration::from_secs(10),
            sweep: Duration::from_millis(500),
            strikes: 3,
            accusations: 8,
            memory: Duration::from_secs(3600),
            tasks_per_node: 10_000,
            decisions: 64,
        }
    }
}
