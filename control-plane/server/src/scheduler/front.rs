//! What the nodes of one cluster that attend here have to say to the other schedulers.
//!
//! Owns: a link to each other scheduler, opened again whenever it ends; the nodes' side of what comes
//! back over them. Does not own: tasks (each is its owner's, see [`super::ring`]).
//!
//! Invariant: a scheduler with an open link was told of every node that attends here before anything
//! that the node said. A node that came while a link was down has to come again when it is up.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context as _;
use skimmer_control_store::Scheduler;
use skimmer_identity::{Credentials, Key, PeerId, Role, tls};
use skimmer_manager::Manager;
use skimmer_proto::TaskId;
use skimmer_proto::control::relay_message::Message;
use skimmer_proto::control::scheduler_client::SchedulerClient;
use skimmer_proto::control::{
    NodeMessage, RelayAnswer, RelayJoined, RelayLeft, RelayMessage, RelayOpen, RelaySaid,
};
use skimmer_service::channel;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::convert;
use super::ring::Ring;
use super::roster::Seat;
use crate::clock::unix_now;

/// Messages that may wait for another scheduler; a node whose message doesn't fit waits too.
const QUEUE: usize = 4096;
const RETRY: Duration = Duration::from_millis(300);
/// How long a node that comes waits for links that aren't open yet.
const PATIENCE: Duration = Duration::from_secs(3);

pub struct Front {
    ring: Arc<Ring>,
    state: Mutex<State>,
    /// Sent to whenever a link has opened.
    opened: tokio::sync::watch::Sender<()>,
}

#[derive(Default)]
struct State {
    /// By the scheduler's id.
    open: BTreeMap<String, mpsc::Sender<RelayMessage>>,
    seats: BTreeMap<PeerId, Seat>,
}

/// What a link is made of.
struct Link {
    manager: Arc<Manager>,
    cluster: String,
    to: Scheduler,
}

impl Front {
    /// Links to all other schedulers of `ring`, for the cluster with this id, until `end`.
    pub fn new(
        ring: Arc<Ring>,
        manager: &Arc<Manager>,
        cluster: &str,
        end: &CancellationToken,
    ) -> Arc<Self> {
        let opened = tokio::sync::watch::Sender::new(());
        let front = Arc::new(Self { ring, state: Mutex::default(), opened });
        for to in front.ring.others() {
            let (manager, cluster) = (Arc::clone(manager), cluster.to_owned());
            let link = Link { manager, cluster, to: to.clone() };
            let kept = link.keep(Arc::downgrade(&front));
            tokio::spawn(end.clone().run_until_cancelled_owned(kept));
        }
        front
    }

    /// A node attends here. Waits for links that are being opened.
    pub async fn join(&self, seat: Seat) {
        let mut opened = self.opened.subscribe();
        let others = self.ring.others().count();
        let all =
            async { while self.state().open.len() < others && opened.changed().await.is_ok() {} };
        // Those that can't be reached have the node come again once they can.
        let _ = tokio::time::timeout(PATIENCE, all).await;
        let joined = RelayJoined {
            peer: seat.member.peer.to_bytes().to_vec(),
            zone: seat.member.zone.clone(),
            seed: seat.member.role == Role::Seed,
            hello: Some(convert::to_hello(&seat.hello)),
        };
        let links: Vec<_> = {
            let mut state = self.state();
            state.seats.insert(seat.member.peer, seat);
            state.open.values().cloned().collect()
        };
        tell(&links, Message::Joined(joined)).await;
    }

    /// The node's stream has ended, unless another has taken its place.
    pub async fn leave(&self, peer: PeerId) {
        let links: Vec<_> = {
            let mut state = self.state();
            if state.seats.get(&peer).is_none_or(|seat| !seat.closer.is_closed()) {
                return;
            }
            state.seats.remove(&peer);
            state.open.values().cloned().collect()
        };
        tell(&links, Message::Left(RelayLeft { peer: peer.to_bytes().to_vec() })).await;
    }

    /// Passes on what the node said of `task`, or of none. Whether this scheduler has to hear it, too.
    pub async fn pass(&self, peer: PeerId, task: Option<TaskId>, message: &NodeMessage) -> bool {
        let owner = task.and_then(|task| self.ring.elsewhere(&task));
        if task.is_some() && owner.is_none() {
            return true;
        }
        let links: Vec<_> = {
            let state = self.state();
            let open = state.open.iter();
            open.filter(|(id, _)| owner.is_none_or(|owner| owner == *id))
                .map(|(_, link)| link.clone())
                .collect()
        };
        let (peer, message) = (peer.to_bytes().to_vec(), Some(message.clone()));
        tell(&links, Message::Said(RelaySaid { peer, message })).await;
        owner.is_none()
    }

    /// Whoever attends was unknown there: it has to come again.
    fn open(&self, id: &str, link: mpsc::Sender<RelayMessage>) {
        let mut state = self.state();
        state.open.insert(id.to_owned(), link);
        for seat in state.seats.values() {
            let why = "another scheduler can be reached again; connect again";
            seat.closer.close(Status::aborted(why));
        }
        drop(state);
        self.opened.send_replace(());
    }

    fn shut(&self, id: &str) {
        self.state().open.remove(id);
    }

    fn hear(&self, answer: RelayAnswer) {
        let Ok(peer) = PeerId::from_bytes(&answer.peer) else { return };
        let state = self.state();
        let Some(seat) = state.seats.get(&peer) else { return };
        if !answer.closed.is_empty() {
            seat.closer.close(Status::aborted(answer.closed));
        }
        if let Some(message) = answer.message {
            seat.send(message);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A link that has ended needs to be told nothing.
async fn tell(links: &[mpsc::Sender<RelayMessage>], message: Message) {
    for link in links {
        let _ = link.send(RelayMessage { message: Some(message.clone()) }).await;
    }
}

impl Link {
    async fn keep(self, front: Weak<Front>) {
        loop {
            let Some(strong) = front.upgrade() else { return };
            if let Err(error) = self.open(&strong).await {
                let error = format!("{error:#}");
                tracing::info!(scheduler = self.to.address, error, "no link to another scheduler");
            }
            strong.shut(&self.to.id);
            drop(strong);
            tokio::time::sleep(RETRY).await;
        }
    }

    /// One link, from its opening to its end.
    async fn open(&self, front: &Front) -> anyhow::Result<()> {
        let key = Key::generate()?;
        let certificate =
            self.manager.admit_scheduler(&self.cluster, key.peer(), unix_now()).await?;
        let credentials = Credentials::new(key, &certificate)?;
        let root = self.manager.root().fingerprint();
        let tls = tls::control_client(root, Some(credentials))?;
        let channel = channel::connect(&self.to.address, tls).await?;
        let (outbox, messages) = mpsc::channel(QUEUE);
        let schedulers = front.ring.ids().map(str::to_owned).collect();
        let message = Some(Message::Open(RelayOpen { schedulers }));
        outbox.send(RelayMessage { message }).await?;
        let mut client = SchedulerClient::new(channel);
        let mut answers = client.relay(ReceiverStream::new(messages)).await?.into_inner();
        answers.message().await?.context("the other scheduler ended the stream")?;
        tracing::info!(scheduler = self.to.address, cluster = self.cluster, "linked");
        front.open(&self.to.id, outbox);
        while let Some(answer) = answers.message().await? {
            front.hear(answer);
        }
        Ok(())
    }
}
