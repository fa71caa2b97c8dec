//! The real scheduler core between the nodes of a bench, without gRPC.

use skimmer_identity::Role;
use skimmer_proto::control::node_message::Message as FromNode;
use skimmer_proto::control::scheduler_message::Message as ToNode;
use skimmer_proto::control::{self as wire, SchedulerMessage};
use skimmer_proto::{Geometry, PieceSet};
use skimmer_scheduler::{self as core, NodeId, NodeInfo, Scheduler};

use super::super::*;
use super::bench::{Bench, Node};

/// Dropping it ends the streams.
pub struct Led {
    job: tokio::task::JoinHandle<()>,
    to_core: mpsc::UnboundedSender<core::Event>,
    streams: Streams,
    seen: watch::Receiver<Seen>,
    holders: Holders,
}

/// A node by the number of its stream.
type Streams = Arc<Mutex<Vec<Arc<Inner>>>>;

/// What the scheduler has come to know.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Nodes that have announced all that they have.
    announced: usize,
}

impl Drop for Led {
    fn drop(&mut self) {
        self.job.abort();
        for inner in self.streams.lock().unwrap().iter() {
            inner.detach();
        }
    }
}

impl Led {
    /// The node attends, and has announced what it has when this returns.
    pub async fn join(&self, node: &Node) {
        let (outbox, mut messages) = mpsc::channel(10_000);
        let seed = node.member.credentials.membership().role == Role::Seed;
        let zone = node.member.credentials.membership().zone;
        let key = *node.peer().public_key();
        let info = NodeInfo { key, zone, seed, upload: 0, download: 0 };
        let number = {
            let mut streams = self.streams.lock().unwrap();
            streams.push(Arc::clone(node.inner()));
            streams.len() - 1
        };
        let id = NodeId(number as u64);
        let mut seen = self.seen.clone();
        let before = seen.borrow().announced;
        self.to_core.send(core::Event::Joined { node: id, info }).unwrap();
        node.inner().attach(&outbox);
        tokio::spawn(attend::announce_all(Arc::clone(node.inner()), outbox));
        let (to_core, streams) = (self.to_core.clone(), Arc::clone(&self.streams));
        let (holders, me) = (Arc::clone(&self.holders), Arc::clone(node.inner()));
        tokio::spawn(async move {
            while let Some(message) = messages.recv().await {
                let message = message.message.unwrap();
                answer_find(&holders, &me, &message);
                let event = event(id, &streams, message);
                if to_core.send(event).is_err() {
                    return;
                }
            }
        });
        seen.wait_for(|seen| seen.announced > before).await.unwrap();
    }

    /// The node's stream ends.
    pub fn lose(&self, node: &PeerId) {
        let streams = self.streams.lock().unwrap();
        let Some(number) = number(&streams, node) else { return };
        streams[number].detach();
        self.to_core.send(core::Event::Left { node: NodeId(number as u64) }).unwrap();
    }

    /// The node says that it has all of the blob, which may be a lie.
    pub fn boast(&self, node: &Node, blob: &BlobRef) {
        let number = number(&self.streams.lock().unwrap(), &node.peer()).unwrap();
        let geometry = Geometry::of(blob.len).unwrap();
        let (pieces, piece_len) = (geometry.pieces(), geometry.piece_len());
        let event = core::Event::Announce {
            node: NodeId(number as u64),
            task: TaskId::of(&skimmer_proto::Scope::Public, &blob.digest),
            shape: core::Shape { pieces, piece_len },
            pieces: PieceSet::all(pieces),
        };
        self.to_core.send(event).unwrap();
    }
}

fn number(streams: &[Arc<Inner>], peer: &PeerId) -> Option<usize> {
    streams.iter().rposition(|inner| inner.me == *peer)
}

/// A scheduler that all nodes attend.
pub async fn lead(bench: &Bench) -> Led {
    let (to_core, mut events) = mpsc::unbounded_channel();
    let streams = Streams::default();
    let (knows, seen) = watch::channel(Seen::default());
    let told = Arc::clone(&streams);
    let mut limits = core::Limits::default();
    if bench.hasty {
        limits.patience = Duration::from_secs(5);
    }
    let job = tokio::spawn(async move {
        let began = Instant::now();
        let mut scheduler = Scheduler::new(limits);
        let mut wait = Duration::from_millis(20);
        loop {
            let event = timeout_or_tick(&mut events, wait).await;
            let announced = matches!(event, core::Event::Announced { .. });
            for action in scheduler.apply(began.elapsed(), event) {
                let streams = told.lock().unwrap().clone();
                let (node, message) = message(&streams, action);
                streams[usize::try_from(node.0).unwrap()]
                    .hear(SchedulerMessage { message: Some(message) });
            }
            if announced {
                knows.send_modify(|seen| seen.announced += 1);
            }
            wait = scheduler.next_wake().map_or(Duration::from_millis(100), |at| {
                at.saturating_sub(began.elapsed()).max(Duration::from_millis(1))
            });
        }
    });
    let led = Led { job, to_core, streams, seen, holders: Holders::default() };
    for node in &bench.nodes {
        led.join(node).await;
    }
    led
}

/// Who has announced a task.
type Holders = Arc<Mutex<HashMap<TaskId, BTreeSet<PeerId>>>>;

/// Answers a node that doesn't know the length of what it looks for, as the scheduler's shell does.
fn answer_find(holders: &Holders, node: &Arc<Inner>, message: &FromNode) {
    let id_of = |task: &Option<wire::Task>| {
        let (digest, len, scope) = convert::task(task.clone()).unwrap();
        (TaskId::of(&scope, &digest), len)
    };
    match message {
        FromNode::Announce(announce) => {
            let (id, _) = id_of(&announce.task);
            holders.lock().unwrap().entry(id).or_default().insert(node.me);
        }
        FromNode::Find(find) if id_of(&find.task).1 == 0 => {
            let (id, _) = id_of(&find.task);
            let peers = holders.lock().unwrap().get(&id).cloned().unwrap_or_default();
            let peer = |id: PeerId| wire::Peer { id: id.to_bytes().to_vec(), ..Default::default() };
            let holders = peers.into_iter().map(peer).collect();
            let (task, records) = (id.as_bytes().to_vec(), Vec::new());
            let found = ToNode::Found(wire::Found { task, records, holders, len: 0 });
            node.hear(SchedulerMessage { message: Some(found) });
        }
        _ => {}
    }
}

async fn timeout_or_tick(
    events: &mut mpsc::UnboundedReceiver<core::Event>,
    wait: Duration,
) -> core::Event {
    match tokio::time::timeout(wait, events.recv()).await {
        Ok(Some(event)) => event,
        _ => core::Event::Tick,
    }
}

fn event(node: NodeId, streams: &Streams, message: FromNode) -> core::Event {
    let task_of = |task: Option<wire::Task>| {
        let (digest, len, scope) = convert::task(task).unwrap();
        let geometry = Geometry::of(len).unwrap();
        let (pieces, piece_len) = (geometry.pieces(), geometry.piece_len());
        (TaskId::of(&scope, &digest), core::Shape { pieces, piece_len })
    };
    let pieces_of = |pieces| convert::pieces(pieces).unwrap_or_default();
    match message {
        FromNode::Announce(a) => {
            let (task, shape) = task_of(a.task);
            core::Event::Announce { node, task, shape, pieces: pieces_of(a.pieces) }
        }
        FromNode::Want(want) => {
            let (task, shape) = task_of(want.task.clone());
            let class = match want.class() {
                wire::Class::Fault => core::Class::Fault,
                wire::Class::Background => core::Class::Background,
                _ => core::Class::PullThrough,
            };
            let (pieces, origin) = (pieces_of(want.pieces), want.origin);
            core::Event::Want { node, task, shape, pieces, class, origin }
        }
        FromNode::Arrived(arrived) => {
            let task = convert::task_id(&arrived.task).unwrap();
            core::Event::Arrived { node, task, pieces: pieces_of(arrived.pieces) }
        }
        FromNode::Failed(failed) => {
            let fault = match failed.fault() {
                wire::Fault::Slow => core::Fault::Slow,
                wire::Fault::Absent => core::Fault::Absent,
                wire::Fault::Corrupt => core::Fault::Corrupt,
                wire::Fault::Refused => core::Fault::Refused,
                _ => core::Fault::Gone,
            };
            let parent = PeerId::from_bytes(&failed.parent).ok();
            let parent = parent.and_then(|peer| number(&streams.lock().unwrap(), &peer));
            let parent = parent.map(|n| NodeId(n as u64));
            let task = convert::task_id(&failed.task).unwrap();
            core::Event::Failed { node, task, pieces: pieces_of(failed.pieces), parent, fault }
        }
        FromNode::Announced(_) => core::Event::Announced { node },
        FromNode::Withdraw(w) => {
            let pieces = w.pieces.map(|pieces| pieces_of(Some(pieces)));
            core::Event::Withdraw { node, task: convert::task_id(&w.task).unwrap(), pieces }
        }
        _ => core::Event::Tick,
    }
}

fn message(inners: &[Arc<Inner>], action: core::Action) -> (NodeId, ToNode) {
    let peer = |node: NodeId| wire::Peer {
        id: inners[usize::try_from(node.0).unwrap()].me.to_bytes().to_vec(),
        ..wire::Peer::default()
    };
    let runs = |pieces: skimmer_proto::PieceSet| Some(wire::Pieces { runs: pieces.to_wire() });
    let id = |task: TaskId| task.as_bytes().to_vec();
    match action {
        core::Action::Assign { node, task, parent, pieces, .. } => {
            let parent = Some(peer(parent));
            (node, ToNode::Assign(wire::Assign { task: id(task), parent, pieces: runs(pieces) }))
        }
        core::Action::Lease { node, task, pieces, .. } => {
            (node, ToNode::Lease(wire::Lease { task: id(task), pieces: runs(pieces), epoch: 1 }))
        }
        core::Action::Cancel { node, task, pieces, .. } => {
            (node, ToNode::Cancel(wire::Cancel { task: id(task), pieces: runs(pieces) }))
        }
        core::Action::Neighbours { node, task, peers, .. } => {
            let near =
                |node| wire::Neighbour { peer: Some(peer(node)), pieces: runs(PieceSet::new()) };
            let neighbours = peers.into_iter().map(near).collect();
            (node, ToNode::Neighbours(wire::Neighbours { task: id(task), neighbours }))
        }
        core::Action::Queued { node, task, .. } => {
            (node, ToNode::Queued(wire::Queued { task: id(task) }))
        }
        core::Action::Seed { node, .. } => (node, ToNode::Welcome(wire::Welcome { epoch: 1 })),
    }
}
