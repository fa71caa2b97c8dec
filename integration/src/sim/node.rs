//! A simulated node: the real download planner, and what its shell does with messages in both directions.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use skimmer_proto::{PieceSet, TaskId};
use skimmer_scheduler as scheduler;
use skimmer_scheduler::NodeId;
use skimmer_swarm::plan::check::Check;
use skimmer_swarm::plan::{self, Action, Event, Peer, Planner, Report};

use super::network::RequestKey;
use super::{Oddity, Setup};

/// A node and what it has.
pub struct Node {
    pub oddity: Oddity,
    pub zone: u32,
    /// Of its links, in bytes per second.
    pub rate: u64,
    pub alive: bool,
    pub dead: bool,
    /// The scheduler knows that it is gone.
    pub gone: bool,
    /// On disk, by task.
    pub have: Vec<PieceSet>,
    /// Tasks that it has begun to pull.
    pub begun: usize,
    /// When it had everything.
    pub done: Option<Duration>,
    /// Nodes that it is linked with.
    pub links: BTreeSet<u32>,
    /// Requests to the origin so far.
    pub origin_requests: u32,
    /// Where links serve in turn: pieces whose first byte has come, and when their last leaves the parent.
    pub down_queue: VecDeque<(RequestKey, u32, Duration)>,
    /// One of them is coming in.
    pub down_busy: bool,
    /// When its planner is to be woken.
    pub tick: Option<Duration>,
    planner: Planner,
    check: Option<Check>,
}

impl Node {
    pub fn new(number: u32, oddity: Oddity, setup: &Setup) -> Self {
        let limits = setup.planner.clone();
        let whole = if oddity == Oddity::Complete { setup.all() } else { PieceSet::new() };
        Self {
            oddity,
            zone: number % setup.zones.max(1),
            rate: if let Oddity::Slow(part) = oddity { setup.rate / part } else { setup.rate },
            alive: false,
            dead: false,
            gone: false,
            have: vec![whole; setup.tasks],
            begun: 0,
            done: (oddity == Oddity::Complete).then_some(Duration::ZERO),
            links: BTreeSet::new(),
            origin_requests: 0,
            down_queue: VecDeque::new(),
            down_busy: false,
            tick: None,
            check: setup.checked.then(|| Check::new(limits.clone())),
            planner: Planner::new(peer(number), setup.seed ^ u64::from(number), limits),
        }
    }

    /// One event through the planner.
    pub fn apply(&mut self, now: Duration, event: Event) -> anyhow::Result<Vec<Action>> {
        let copy = self.check.is_some().then(|| event.clone());
        let actions = self.planner.apply(now, event);
        if let Some((check, event)) = self.check.as_mut().zip(copy) {
            check.step(now, &event, &actions)?;
        }
        Ok(actions)
    }

    pub fn next_wake(&self, now: Duration) -> Option<Duration> {
        self.planner.next_wake(now)
    }

    /// Tasks of which it has everything.
    pub fn complete(&self, pieces: u32) -> usize {
        self.have.iter().filter(|have| have.len() == pieces).count()
    }
}

/// Node `number`'s key.
pub fn key(number: u32) -> [u8; 32] {
    let mut key = [0; 32];
    key[..4].copy_from_slice(&number.to_le_bytes());
    key
}

pub fn peer(number: u32) -> Peer {
    Peer(key(number))
}

/// The node's number.
pub fn number(peer: Peer) -> u32 {
    let [a, b, c, d, ..] = peer.0;
    u32::from_le_bytes([a, b, c, d])
}

pub fn id(number: u32) -> NodeId {
    NodeId(u64::from(number))
}

/// What a scheduler's action means to the planner of the node that it is for; `None`: nothing.
pub fn heard(action: scheduler::Action) -> Option<Event> {
    let peer_of = |node: NodeId| Some(peer(u32::try_from(node.0).ok()?));
    Some(match action {
        scheduler::Action::Assign { task, parent, pieces, .. } => {
            Event::Assigned { task, parent: peer_of(parent)?, pieces }
        }
        scheduler::Action::Lease { task, pieces, .. } => Event::Leased { task, pieces },
        scheduler::Action::Neighbours { task, peers, .. } => {
            let peers = peers.into_iter().filter_map(peer_of);
            Event::Neighbours { task, peers: peers.map(|peer| (peer, PieceSet::new())).collect() }
        }
        scheduler::Action::Cancel { task, pieces, .. } => Event::Cancelled { task, pieces },
        scheduler::Action::Queued { task, .. } => Event::Queued { task },
        // Every node of the simulation wants everything by itself.
        scheduler::Action::Seed { .. } => return None,
    })
}

/// For whom an action is.
pub fn addressee(action: &scheduler::Action) -> anyhow::Result<u32> {
    let (scheduler::Action::Assign { node, .. }
    | scheduler::Action::Lease { node, .. }
    | scheduler::Action::Neighbours { node, .. }
    | scheduler::Action::Cancel { node, .. }
    | scheduler::Action::Queued { node, .. }
    | scheduler::Action::Seed { node, .. }) = action;
    Ok(u32::try_from(node.0)?)
}

/// A planner's report as the scheduler gets it.
pub fn reported(node: NodeId, report: Report) -> scheduler::Event {
    match report {
        Report::Want { task, shape, pieces, class, origin } => {
            let shape = scheduler::Shape { pieces: shape.pieces, piece_len: shape.piece_len };
            let class = match class {
                plan::Class::Fault => scheduler::Class::Fault,
                plan::Class::PullThrough => scheduler::Class::PullThrough,
                plan::Class::Background => scheduler::Class::Background,
            };
            scheduler::Event::Want { node, task, shape, pieces, class, origin }
        }
        Report::Reading { task, pieces } => scheduler::Event::Reading { node, task, pieces },
        Report::Arrived { task, pieces } => scheduler::Event::Arrived { node, task, pieces },
        Report::Failed { task, pieces, parent, fault } => {
            let parent = parent.map(|peer| id(number(peer)));
            let fault = match fault {
                plan::Fault::Gone => scheduler::Fault::Gone,
                plan::Fault::Slow => scheduler::Fault::Slow,
                plan::Fault::Absent => scheduler::Fault::Absent,
                plan::Fault::Corrupt => scheduler::Fault::Corrupt,
                plan::Fault::Refused => scheduler::Fault::Refused,
            };
            scheduler::Event::Failed { node, task, pieces, parent, fault }
        }
        Report::Withdraw { task, pieces } => scheduler::Event::Withdraw { node, task, pieces },
    }
}

/// The task's id.
pub fn task_id(task: usize) -> TaskId {
    TaskId::from_bytes([u8::try_from(task).unwrap_or(u8::MAX).wrapping_add(7); 32])
}

pub fn task_number(task: &TaskId) -> usize {
    usize::from(task.as_bytes()[0].wrapping_sub(7))
}
