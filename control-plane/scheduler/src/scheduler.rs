//! The scheduler of one cluster: takes events, keeps the facts, and answers with actions.
//!
//! Owns: nodes, tasks, wake-ups. Does not own: time, connections, names (the shell numbers nodes).
//!
//! Every event first changes facts ([`facts`], [`failures`]) and marks the nodes and tasks it touched; then those, and
//! only those, are looked at again: leases of the origin ([`lease`]), neighbours ([`graph`]), assignments ([`matching`]).
//!
//! Invariants:
//! - A piece is leased to one node at a time, and only while no node has it.
//! - A piece is assigned only from a parent that has it, to a child that wants it and isn't getting it.

mod facts;
mod failures;
mod graph;
mod lease;
mod matching;
mod sweep;

use std::collections::BTreeMap;
use std::time::Duration;

use skimmer_proto::{PieceSet, TaskId};

use crate::event::{Action, Event, NodeId, Now, Reason};
use crate::fetch::{Fetch, MAX_RUN};
use crate::limits::Limits;
use crate::node::Nodes;
use crate::task::{Mode, Peer, Task};
use crate::view::{Decision, PeerView, TaskDetail, TaskView, What};

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    now: Now,
    nodes: Nodes,
    tasks: Vec<Option<Task>>,
    free_tasks: Vec<u32>,
    by_id: BTreeMap<TaskId, u32>,
    /// Leases are granted.
    settled: bool,
    last_join: Now,
    wakes: BTreeMap<Now, Vec<u32>>,
    next_sweep: Option<Now>,
    /// Leases of all tasks.
    leases: u32,
    /// Nodes and tasks to look at before the event is over.
    dirty_nodes: Vec<u32>,
    dirty_tasks: Vec<u32>,
    /// From a decision to the first byte, and from the last byte to the report, together.
    lead: Duration,
    /// Of the middle one of the nodes' uploads, in bytes per second.
    typical: u64,
    /// Assignments that the tasks which are assigned directly may need, in thousandths per second.
    rate: u64,
    actions: Vec<Action>,
}

impl Scheduler {
    /// A scheduler that knows nothing yet: it grants leases after `limits.settle`, or when the nodes have announced.
    pub fn new(limits: Limits) -> Self {
        Self {
            now: Now::ZERO,
            nodes: Nodes::default(),
            tasks: Vec::new(),
            free_tasks: Vec::new(),
            by_id: BTreeMap::new(),
            settled: limits.settle.is_zero(),
            last_join: Now::ZERO,
            wakes: BTreeMap::new(),
            next_sweep: None,
            leases: 0,
            dirty_nodes: Vec::new(),
            dirty_tasks: Vec::new(),
            lead: limits.lead,
            typical: 0,
            rate: 0,
            actions: Vec::new(),
            limits,
        }
    }

    /// What follows from `event`, in the order in which it is to be done. Events of nodes that haven't joined, or
    /// that name pieces their task doesn't have, change nothing.
    pub fn apply(&mut self, now: Now, event: Event) -> Vec<Action> {
        self.now = self.now.max(now);
        self.learn(event);
        self.wake();
        self.decide();
        std::mem::take(&mut self.actions)
    }

    /// When [`Event::Tick`] is due, if nothing else comes before.
    pub fn next_wake(&self) -> Option<Now> {
        let settle = (!self.settled && self.nodes.len() > 0).then(|| self.settles_at());
        let wake = self.wakes.keys().next().copied();
        [settle, wake, self.next_sweep].into_iter().flatten().min()
    }

    fn learn(&mut self, event: Event) {
        match event {
            Event::Joined { node, info } => self.joined(node, info),
            Event::Left { node } => self.left(node),
            Event::Announce { node, task, shape, pieces } => {
                self.announce(node, task, shape, &pieces);
            }
            Event::Announced { node } => self.announced(node),
            Event::Want { node, task, shape, pieces, class, origin } => {
                self.want(node, task, shape, &pieces, class, origin);
            }
            Event::Reading { node, task, pieces } => self.reading(node, task, &pieces),
            Event::Arrived { node, task, pieces } => self.arrived(node, task, &pieces),
            Event::Failed { node, task, pieces, parent, fault } => {
                self.failed(node, task, &pieces, parent, fault);
            }
            Event::Withdraw { node, task, pieces } => self.withdraw(node, task, pieces.as_ref()),
            Event::Tick => {}
        }
    }

    /// Nodes whose time has come are to be looked at.
    fn wake(&mut self) {
        while let Some(entry) = self.wakes.first_entry().filter(|entry| *entry.key() <= self.now) {
            let (at, numbers) = entry.remove_entry();
            for number in numbers {
                if let Some(node) = self.nodes.get_mut(number).filter(|n| n.wake == Some(at)) {
                    node.wake = None;
                    self.touch_node(number);
                }
            }
        }
        if !self.settled && self.settles_at() <= self.now && self.nodes.len() > 0 {
            self.settled = true;
            self.touch_all_tasks();
        }
        if self.next_sweep.is_some_and(|at| at <= self.now) {
            self.sweep();
        }
    }

    fn decide(&mut self) {
        while let Some(task) = self.dirty_tasks.pop() {
            self.grant_leases(task);
            self.forget(task);
        }
        let mut nodes = std::mem::take(&mut self.dirty_nodes);
        for &node in &nodes {
            if let Some(node) = self.nodes.get_mut(node) {
                node.dirty = false;
            }
            self.refresh(node);
        }
        for &node in &nodes {
            self.fill_up(node);
            self.fill_down(node);
        }
        nodes.clear();
        if self.dirty_nodes.is_empty() {
            self.dirty_nodes = nodes;
        }
    }

    fn settles_at(&self) -> Now {
        if self.nodes.unannounced == 0 {
            (self.last_join + self.limits.quiet).min(self.limits.settle)
        } else {
            self.limits.settle
        }
    }

    fn task(&self, task: u32) -> Option<&Task> {
        self.tasks.get(task as usize)?.as_ref()
    }

    fn task_mut(&mut self, task: u32) -> Option<&mut Task> {
        self.tasks.get_mut(task as usize)?.as_mut()
    }

    fn touch_node(&mut self, number: u32) {
        if let Some(node) = self.nodes.get_mut(number)
            && !std::mem::replace(&mut node.dirty, true)
        {
            self.dirty_nodes.push(number);
        }
    }

    fn touch_task(&mut self, number: u32) {
        self.dirty_tasks.push(number);
    }

    fn touch_all_tasks(&mut self) {
        self.dirty_tasks.extend(self.by_id.values());
    }

    fn note(&mut self, task: u32, node: NodeId, what: What, reason: Reason) {
        let (at, most) = (self.now, self.limits.decisions);
        if let Some(task) = self.task_mut(task) {
            if task.decisions.len() >= most {
                task.decisions.pop_front();
            }
            task.decisions.push_back(Decision { at, node, what, reason });
        }
    }

    fn cancel(&mut self, task: u32, slot: u32, pieces: PieceSet, reason: Reason) {
        let Some((id, node)) = self.task(task).and_then(|t| Some((t.id, t.peer(slot)?.id))) else {
            return;
        };
        let what = What::Cancelled { first: pieces.first().unwrap_or(0), pieces: pieces.len() };
        self.note(task, node, what, reason);
        self.actions.push(Action::Cancel { node, task: id, pieces, reason });
    }
}

/// Views: they change nothing.
impl Scheduler {
    /// Connected nodes.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// In the order of their ids.
    pub fn tasks(&self) -> Vec<TaskView> {
        self.by_id.values().filter_map(|task| Some(view(self.task(*task)?))).collect()
    }

    pub fn task_detail(&self, id: &TaskId) -> Option<TaskDetail> {
        let task = self.task(*self.by_id.get(id)?)?;
        let mut peers: Vec<PeerView> = task.slots().map(|(_, peer)| self.peer_view(peer)).collect();
        peers.sort_by_key(|peer| peer.node);
        Some(TaskDetail {
            task: view(task),
            peers,
            decisions: task.decisions.iter().copied().collect(),
        })
    }

    fn peer_view(&self, peer: &Peer) -> PeerView {
        let on_the_way = |leased: bool| {
            let fetches = peer.fetches.iter().filter(|fetch| fetch.parent.is_none() == leased);
            fetches.map(Fetch::left).sum::<u32>()
        };
        let (leased, assigned) = (on_the_way(true), on_the_way(false));
        PeerView {
            node: peer.id,
            have: peer.have.len(),
            want: peer.lack.len() + leased + assigned,
            leased,
            assigned,
            quarantined: peer.muted,
        }
    }
}

fn view(task: &Task) -> TaskView {
    let complete = task.slots().filter(|(_, peer)| task.is_complete(peer)).count();
    TaskView {
        id: task.id,
        shape: task.shape,
        peers: task.count,
        complete: u32::try_from(complete).unwrap_or(u32::MAX),
        wanting: task.wanting,
        graph: task.mode == Mode::Graph,
        from_origin: task.from_origin,
        from_peers: task.from_peers,
        across: task.across,
    }
}

/// Pieces in one assignment of a blob of `pieces`: short enough that a node gets hundreds of them.
fn run_of(pieces: u32, most: u32) -> u32 {
    (pieces / 512).clamp(1, most.clamp(1, MAX_RUN))
}

#[cfg(test)]
mod tests;
