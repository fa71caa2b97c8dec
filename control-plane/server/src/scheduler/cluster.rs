//! The owner of one cluster's scheduler: takes commands one by one, applies them, performs what follows.
//!
//! Owns: the scheduler, the records, the roster, the tasks' descriptions. Everything that waits (the
//! store, signatures) happens elsewhere, before a command comes or after it was performed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use skimmer_identity::{PeerId, Role};
use skimmer_proto::control::scheduler_message::Message as Out;
use skimmer_proto::control::{self, IndexRecord};
use skimmer_proto::{Digest, TaskId};
use skimmer_scheduler::{Action, Event, Limits, NodeId, NodeInfo, Scheduler};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tonic::Status;

use super::convert::{self, Message, Task};
use super::metrics::Fold;
use super::records::{Outcome, Records, Statement};
use super::roster::{Roster, Seat};

mod views;

pub use views::{Detail, TaskRow};

/// Commands that may wait; a stream whose command doesn't fit waits too.
pub const INBOX: usize = 4096;
/// Tasks that one node may make known; what it says of more is refused.
const TASKS_PER_NODE: u32 = 10_000;
/// Holders that an answer names.
const MAX_HOLDERS: usize = 16;
const SWEEP: Duration = Duration::from_secs(30);

pub enum Command {
    /// A node's stream is open. Answered with its number.
    Join {
        seat: Box<Seat>,
        answer: oneshot::Sender<NodeId>,
    },
    Said {
        node: NodeId,
        message: Message,
    },
    /// A record that was checked: its signature, its signer's membership.
    Published {
        node: NodeId,
        task: Task,
        statement: Statement,
    },
    Left {
        node: NodeId,
    },
    /// All of the cluster's peers that are out.
    Blocked {
        peers: BTreeSet<PeerId>,
    },
    ListPeers {
        answer: oneshot::Sender<BTreeSet<PeerId>>,
    },
    ListTasks {
        answer: oneshot::Sender<Vec<TaskRow>>,
    },
    ShowTask {
        id: TaskId,
        answer: oneshot::Sender<Option<Detail>>,
    },
}

/// What the owner wants done that takes time.
#[derive(Debug)]
pub enum Errand {
    Revoke { peers: Vec<PeerId>, reason: String },
    Note(String),
}

pub struct Owner {
    scheduler: Scheduler,
    records: Records,
    roster: Roster,
    tasks: BTreeMap<TaskId, Known>,
    /// Tasks that a node made known.
    made_known: BTreeMap<NodeId, u32>,
    blocked: BTreeSet<PeerId>,
    /// Nodes whose queues overflowed and who have yet to be taken out.
    lost: VecDeque<NodeId>,
    metrics: Fold,
    errands: mpsc::Sender<Errand>,
    epoch: u64,
    start: Instant,
    next_sweep: Instant,
}

struct Known {
    task: Task,
    by: NodeId,
}

impl Owner {
    pub fn new(limits: Limits, metrics: Fold, errands: mpsc::Sender<Errand>, epoch: u64) -> Self {
        let start = Instant::now();
        Self {
            scheduler: Scheduler::new(limits),
            records: Records::default(),
            roster: Roster::default(),
            tasks: BTreeMap::new(),
            made_known: BTreeMap::new(),
            blocked: BTreeSet::new(),
            lost: VecDeque::new(),
            metrics,
            errands,
            epoch,
            start,
            next_sweep: start + SWEEP,
        }
    }

    /// Until nobody can send commands any more.
    pub async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        loop {
            let wake = self.scheduler.next_wake().map(|at| self.start + at);
            let wake = wake.map_or(self.next_sweep, |at| at.min(self.next_sweep));
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => self.obey(command),
                    None => return,
                },
                () = tokio::time::sleep_until(wake) => self.apply(Event::Tick),
            }
            while let Some(node) = self.lost.pop_front() {
                self.metrics.overflow();
                self.leave(node);
            }
            if Instant::now() >= self.next_sweep {
                self.sweep();
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Join { seat, answer } => {
                let node = self.join(*seat);
                // The stream has ended meanwhile.
                if answer.send(node).is_err() {
                    self.leave(node);
                }
            }
            Command::Said { node, message } => {
                self.metrics.message();
                if self.roster.get(node).is_some() {
                    self.hear(node, message);
                }
            }
            Command::Published { node, task, statement } => {
                self.metrics.message();
                if self.roster.get(node).is_some() && self.know(node, &task) {
                    self.publish(node, &task, statement);
                }
            }
            Command::Left { node } => self.leave(node),
            Command::Blocked { peers } => self.block(peers),
            Command::ListPeers { answer } => {
                let _ = answer.send(self.roster.peers().copied().collect());
            }
            Command::ListTasks { answer } => {
                let _ = answer.send(self.task_rows());
            }
            Command::ShowTask { id, answer } => {
                let _ = answer.send(self.detail(&id));
            }
        }
    }

    fn join(&mut self, seat: Seat) -> NodeId {
        let (peer, closer) = (seat.member.peer, seat.closer.clone());
        if let Some(before) = self.roster.find(&peer) {
            if let Some(seat) = self.roster.get(before) {
                seat.closer.close(Status::aborted("the node has connected again"));
            }
            self.leave(before);
        }
        let info = NodeInfo {
            key: *peer.public_key(),
            zone: seat.member.zone.clone(),
            seed: seat.member.role == Role::Seed,
            upload: seat.hello.upload,
            download: seat.hello.download,
        };
        let node = self.roster.join(seat);
        self.send(node, Out::Welcome(control::Welcome { epoch: self.epoch }));
        if !self.blocked.is_empty() {
            self.send(node, blocked(&self.blocked));
        }
        self.apply(Event::Joined { node, info });
        if self.blocked.contains(&peer) {
            closer.close(Status::permission_denied("the node was revoked"));
        }
        self.count();
        node
    }

    fn leave(&mut self, node: NodeId) {
        if self.roster.leave(node).is_none() {
            return;
        }
        self.records.left(node);
        self.made_known.remove(&node);
        self.apply(Event::Left { node });
        self.count();
    }

    fn hear(&mut self, node: NodeId, message: Message) {
        match message {
            Message::Announce { task, pieces } => {
                if self.know(node, &task) {
                    self.apply(Event::Announce { node, task: task.id, shape: task.shape, pieces });
                }
            }
            Message::Announced => self.apply(Event::Announced { node }),
            Message::Want { task, pieces, class, origin } => {
                if self.know(node, &task) {
                    let (task, shape) = (task.id, task.shape);
                    self.apply(Event::Want { node, task, shape, pieces, class, origin });
                }
            }
            Message::Reading { task, pieces } => self.apply(Event::Reading { node, task, pieces }),
            Message::Arrived { task, pieces } => self.apply(Event::Arrived { node, task, pieces }),
            Message::Failed { task, pieces, parent, fault, detail } => {
                let name = self.roster.name(node);
                tracing::info!(node = name, %task, ?fault, detail, "a transfer failed");
                let parent = match parent {
                    None => None,
                    Some(peer) => match self.roster.find(&peer) {
                        Some(parent) => Some(parent),
                        // Gone already, and with it what was assigned from it.
                        None => return,
                    },
                };
                self.apply(Event::Failed { node, task, pieces, parent, fault });
            }
            Message::Withdraw { task, pieces } => {
                if pieces.is_none() {
                    self.records.withdraw(&task, node);
                }
                self.apply(Event::Withdraw { node, task, pieces });
            }
            Message::Find { task } if task.len == 0 => {
                let holders = self.whole_holders(&task.id);
                self.answer(node, task.id, Vec::new(), &holders);
            }
            Message::Find { task } => {
                if self.know(node, &task) {
                    let (records, holders) = self.records.find(task.id, node);
                    self.answer(node, task.id, records, &holders);
                }
            }
            // Checked on the way, it comes as another command.
            Message::Publish { .. } => self.metrics.refused(),
        }
    }

    /// Whether what the node says of the task may be used.
    fn know(&mut self, node: NodeId, task: &Task) -> bool {
        if let Some(known) = self.tasks.get_mut(&task.id) {
            if known.task.len == task.len {
                if known.task.origin.is_none() {
                    known.task.origin.clone_from(&task.origin);
                }
                return true;
            }
            tracing::info!(
                node = self.roster.name(node),
                blob = %task.blob,
                says = task.len,
                known = known.task.len,
                "nodes differ on the length of a blob"
            );
            self.metrics.refused();
            return false;
        }
        let made_known = self.made_known.entry(node).or_default();
        if *made_known >= TASKS_PER_NODE {
            self.metrics.refused();
            return false;
        }
        *made_known += 1;
        self.tasks.insert(task.id, Known { task: task.clone(), by: node });
        true
    }

    fn publish(&mut self, node: NodeId, task: &Task, statement: Statement) {
        match self.records.publish(task.id, node, statement) {
            Outcome::Known => {}
            Outcome::Agreed => self.tell_finders(task.id),
            Outcome::Disputed(tables) => {
                let what = format!(
                    "nodes disagree on how blob {} decodes: {} piece tables are signed; none is used until \
                     more nodes have read the layer",
                    task.blob,
                    tables.len()
                );
                self.run_errand(Errand::Note(what));
                self.purge(task, &tables, "nodes disagree on it");
            }
            Outcome::Convicted { tables, signers } => {
                self.purge(task, &tables, "it is wrong");
                let reason = format!("signed a wrong piece table of blob {}", task.blob);
                self.block(self.blocked.iter().chain(&signers).copied().collect());
                self.run_errand(Errand::Revoke { peers: signers, reason });
                self.tell_finders(task.id);
            }
        }
    }

    fn tell_finders(&mut self, task: TaskId) {
        let (records, holders) = self.records.agreed(&task);
        for finder in self.records.finders(&task).collect::<Vec<_>>() {
            self.answer(finder, task, records.clone(), &holders);
        }
    }

    fn purge(&mut self, task: &Task, tables: &[Digest], reason: &str) {
        for table in tables {
            let purge = control::Purge {
                task: Some(convert::to_task(task)),
                table: table.as_bytes().to_vec(),
                reason: reason.to_owned(),
            };
            for node in self.roster.nodes().collect::<Vec<_>>() {
                self.send(node, Out::Purge(purge.clone()));
            }
        }
    }

    /// Those that are new are out at once, and everybody is told.
    fn block(&mut self, peers: BTreeSet<PeerId>) {
        let new: BTreeSet<PeerId> = peers.difference(&self.blocked).copied().collect();
        self.blocked = peers;
        for peer in &new {
            self.records.block(peer);
            if let Some(node) = self.roster.find(peer) {
                if let Some(seat) = self.roster.get(node) {
                    seat.closer.close(Status::permission_denied("the node was revoked"));
                }
                self.leave(node);
            }
        }
        if !new.is_empty() {
            for node in self.roster.nodes().collect::<Vec<_>>() {
                self.send(node, blocked(&new));
            }
        }
    }

    /// Holders in the node's own zone come first.
    fn answer(&mut self, to: NodeId, task: TaskId, records: Vec<IndexRecord>, holders: &[NodeId]) {
        let zone = self.roster.get(to).map(|seat| seat.member.zone.clone()).unwrap_or_default();
        let others = holders.iter().filter(|holder| **holder != to);
        let mut holders: Vec<control::Peer> =
            others.filter_map(|holder| self.roster.describe(*holder)).collect();
        holders.sort_by_key(|holder| holder.zone != zone);
        holders.truncate(MAX_HOLDERS);
        let len = self.tasks.get(&task).map_or(0, |known| known.task.len);
        let task = task.as_bytes().to_vec();
        self.send(to, Out::Found(control::Found { task, records, holders, len }));
    }

    fn apply(&mut self, event: Event) {
        for action in self.scheduler.apply(self.start.elapsed(), event) {
            self.metrics.action(&action);
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        let (node, message) = match action {
            Action::Assign { node, task, parent, pieces, .. } => {
                let Some(parent) = self.roster.describe(parent) else { return };
                let (task, pieces) = (task.as_bytes().to_vec(), Some(convert::to_pieces(&pieces)));
                (node, Out::Assign(control::Assign { task, parent: Some(parent), pieces }))
            }
            Action::Lease { node, task, pieces, .. } => {
                let (task, pieces) = (task.as_bytes().to_vec(), Some(convert::to_pieces(&pieces)));
                (node, Out::Lease(control::Lease { task, pieces, epoch: self.epoch }))
            }
            Action::Neighbours { node, task, peers, .. } => {
                // What they have they tell on the links between them.
                let peers = peers.iter().filter_map(|peer| self.roster.describe(*peer));
                let neighbour = |peer| control::Neighbour { peer: Some(peer), pieces: None };
                let (task, neighbours) = (task.as_bytes().to_vec(), peers.map(neighbour).collect());
                (node, Out::Neighbours(control::Neighbours { task, neighbours }))
            }
            Action::Cancel { node, task, pieces, .. } => {
                let (task, pieces) = (task.as_bytes().to_vec(), Some(convert::to_pieces(&pieces)));
                (node, Out::Cancel(control::Cancel { task, pieces }))
            }
            Action::Queued { node, task, .. } => {
                (node, Out::Queued(control::Queued { task: task.as_bytes().to_vec() }))
            }
            Action::Seed { node, task, .. } => {
                let Some(known) = self.tasks.get(&task) else { return };
                (node, Out::Seed(control::Seed { task: Some(convert::to_task(&known.task)) }))
            }
        };
        self.send(node, message);
    }

    fn send(&mut self, node: NodeId, message: Out) {
        if !self.roster.send(node, message) && !self.lost.contains(&node) {
            self.lost.push_back(node);
        }
    }

    fn run_errand(&self, errand: Errand) {
        if let Err(error) = self.errands.try_send(errand) {
            tracing::error!(%error, "too much to write down at once");
        }
    }

    /// Forgets tasks that nobody has or wants any more.
    fn sweep(&mut self) {
        self.next_sweep = Instant::now() + SWEEP;
        let live: BTreeSet<TaskId> =
            self.scheduler.tasks().into_iter().map(|task| task.id).collect();
        let records = &self.records;
        self.tasks.retain(|id, _| live.contains(id) || records.knows(id));
        self.made_known.clear();
        for known in self.tasks.values().filter(|known| self.roster.get(known.by).is_some()) {
            *self.made_known.entry(known.by).or_default() += 1;
        }
        self.count();
    }

    fn count(&self) {
        self.metrics.size(self.roster.len(), self.tasks.len());
    }
}

fn blocked(peers: &BTreeSet<PeerId>) -> Out {
    let peers = peers.iter().map(|peer| peer.to_bytes().to_vec()).collect();
    Out::Blocked(control::Blocked { peers })
}

#[cfg(test)]
mod tests;
