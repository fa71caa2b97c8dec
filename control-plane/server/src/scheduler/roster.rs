//! The connected nodes of a cluster, and the bounded queue to each.
//!
//! Invariant: a node whose queue is full is closed, never waited for; what it missed it learns when
//! it comes again.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use skimmer_identity::{Membership, PeerId, Role};
use skimmer_proto::control::scheduler_message::Message;
use skimmer_proto::control::{self, SchedulerMessage};
use skimmer_scheduler::NodeId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::convert::Hello;

/// Names of nodes that left, kept for the log of decisions.
const MAX_NAMES: usize = 65_536;

/// The end of a stream, from whichever side.
#[derive(Clone, Debug)]
pub struct Closer {
    closed: CancellationToken,
    why: Arc<OnceLock<Status>>,
}

impl Closer {
    /// A stream that ends with `parent` at the latest.
    pub fn under(parent: &CancellationToken) -> Self {
        Self { closed: parent.child_token(), why: Arc::default() }
    }

    /// A stream that ends with this one at the latest.
    pub fn child(&self) -> Self {
        Self::under(&self.closed)
    }

    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Ends the stream at once; the first reason counts.
    pub fn close(&self, why: Status) {
        let _ = self.why.set(why);
        self.closed.cancel();
    }

    pub async fn closed(&self) -> Status {
        self.closed.cancelled().await;
        self.why.get().cloned().unwrap_or_else(|| {
            Status::unavailable("the scheduler stops, or others have begun to share its work")
        })
    }
}

/// A node's side of its stream.
#[derive(Clone, Debug)]
pub struct Seat {
    pub member: Membership,
    pub hello: Hello,
    pub outgoing: mpsc::Sender<SchedulerMessage>,
    pub closer: Closer,
}

#[derive(Default)]
pub struct Roster {
    seats: BTreeMap<NodeId, Seat>,
    by_peer: BTreeMap<PeerId, NodeId>,
    names: BTreeMap<NodeId, PeerId>,
    last: u64,
}

impl Roster {
    /// The peer must not be here.
    pub fn join(&mut self, seat: Seat) -> NodeId {
        self.last += 1;
        let node = NodeId(self.last);
        self.by_peer.insert(seat.member.peer, node);
        self.names.insert(node, seat.member.peer);
        if self.names.len() > MAX_NAMES {
            self.names.pop_first();
        }
        self.seats.insert(node, seat);
        node
    }

    pub fn leave(&mut self, node: NodeId) -> Option<Seat> {
        let seat = self.seats.remove(&node)?;
        self.by_peer.remove(&seat.member.peer);
        Some(seat)
    }

    pub fn get(&self, node: NodeId) -> Option<&Seat> {
        self.seats.get(&node)
    }

    pub fn find(&self, peer: &PeerId) -> Option<NodeId> {
        self.by_peer.get(peer).copied()
    }

    pub fn len(&self) -> usize {
        self.seats.len()
    }

    pub fn peers(&self) -> impl Iterator<Item = &PeerId> {
        self.by_peer.keys()
    }

    pub fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.seats.keys().copied()
    }

    /// Who a node is or was, for people.
    pub fn name(&self, node: NodeId) -> String {
        self.names.get(&node).map_or_else(|| format!("node {}", node.0), ToString::to_string)
    }

    /// What other nodes are told of it.
    pub fn describe(&self, node: NodeId) -> Option<control::Peer> {
        let seat = self.seats.get(&node)?;
        Some(control::Peer {
            id: seat.member.peer.to_bytes().to_vec(),
            addresses: seat.hello.addresses.clone(),
            zone: seat.member.zone.clone(),
            seed: seat.member.role == Role::Seed,
        })
    }

    /// Whether the node is still here afterwards; one whose queue is full is closed.
    pub fn send(&self, node: NodeId, message: Message) -> bool {
        let Some(seat) = self.seats.get(&node) else { return true };
        seat.send(SchedulerMessage { message: Some(message) })
    }
}

impl Seat {
    /// Whether the node is still here afterwards; one whose queue is full is closed.
    pub fn send(&self, message: SchedulerMessage) -> bool {
        match self.outgoing.try_send(message) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                let why = "the node doesn't take its messages; it may connect again";
                self.closer.close(Status::resource_exhausted(why));
                false
            }
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.closer.close(Status::aborted("the stream has ended"));
                false
            }
        }
    }
}
