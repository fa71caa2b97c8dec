//! The stream to a scheduler: opened again whenever it ends, each time with the whole inventory.

use std::sync::{Arc, Weak};
use std::time::Duration;

use skimmer_cache::{BlobKind, BlobRef, Class, Origin};
use skimmer_identity::{PeerId, tls};
use skimmer_proto::control::scheduler_client::SchedulerClient;
use skimmer_proto::control::scheduler_message::Message;
use skimmer_proto::control::{NodeMessage, SchedulerMessage};
use skimmer_proto::{Digest, TaskId};
use skimmer_service::channel;
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio_stream::wrappers::ReceiverStream;

use super::tasks::Task;
use super::{Inner, convert, documents};
use crate::member::Member;
use crate::plan::{Event, Peer};

/// Messages that may wait for the scheduler.
const QUEUED: usize = 16_384;

const RETRY: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("make the TLS configuration")]
    Tls(#[from] tls::Error),
    #[error("reach the scheduler")]
    Reach(#[from] channel::Error),
    #[error("attend at the scheduler {address}")]
    Attend { address: String, source: Box<tonic::Status> },
    #[error("the control plane names no scheduler")]
    None,
}

/// Keeps a stream open while this node is a member.
pub async fn attend(inner: Weak<Inner>, mut members: watch::Receiver<Option<Member>>) {
    let (mut wait, mut attempt) = (RETRY, 0_usize);
    loop {
        let member = members.borrow_and_update().clone();
        let Some(strong) = inner.upgrade() else { return };
        let joined = strong.joined();
        let is_ready = |member: &Member| joined.is_some_and(|joined| member.shares(&joined.member));
        let Some(member) = member.filter(is_ready) else {
            drop(strong);
            tokio::select! {
                changed = members.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(RETRY) => {}
            }
            continue;
        };
        let began = tokio::time::Instant::now();
        let ended = stream(&strong, &member, attempt).await;
        if began.elapsed() > RETRY_MAX {
            wait = RETRY;
        }
        match ended {
            Ok(()) => tracing::info!("the scheduler ended the stream"),
            Err(error) => tracing::info!(
                error = &error as &dyn std::error::Error,
                again_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                "no scheduler"
            ),
        }
        attempt += 1;
        drop(strong);
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RETRY_MAX);
    }
}

/// One stream, from its opening to its end.
async fn stream(inner: &Arc<Inner>, member: &Member, attempt: usize) -> Result<(), Error> {
    let schedulers = &member.schedulers;
    let at = attempt.checked_rem(schedulers.len()).ok_or(Error::None)?;
    let address = &schedulers[at];
    let tls = tls::control_client(member.authority, Some(Arc::clone(&member.credentials)))?;
    let channel = channel::connect(address, tls).await?;
    let failed = |status| Error::Attend { address: address.clone(), source: Box::new(status) };
    let (outbox, messages) = mpsc::channel(QUEUED);
    // The greeting goes before anything that the planner has to say.
    let addresses = inner.joined().map(|joined| reachable((joined.addresses)()));
    let hello = convert::hello(&inner.settings, addresses.unwrap_or_default());
    let _ = outbox.send(hello).await;
    let mut client = SchedulerClient::new(channel);
    let answers = client.attend(ReceiverStream::new(messages)).await.map_err(failed)?;
    let mut answers = answers.into_inner();
    inner.attach(&outbox);
    tracing::info!(scheduler = address, "attending");
    inner.runtime.spawn(announce_all(Arc::clone(inner), outbox));
    let ended = loop {
        match answers.message().await {
            Ok(Some(answer)) => inner.hear(answer),
            Ok(None) => break Ok(()),
            Err(status) => break Err(failed(status)),
        }
        if inner.state().outbox.is_none() {
            break Ok(());
        }
    };
    inner.detach();
    ended
}

/// What others may reach: not this machine's own loopback, unless there is nothing else.
fn reachable(addresses: Vec<String>) -> Vec<String> {
    let is_local = |address: &&String| {
        ["/ip4/127.", "/ip6/::1/", "/ip6/fe80"].iter().any(|local| address.starts_with(local))
    };
    let (local, others): (Vec<_>, Vec<_>) = addresses.iter().partition(is_local);
    let kept = if others.is_empty() { local } else { others };
    kept.into_iter().cloned().collect()
}

/// Everything that this node vouches for and serves; then that this was all.
pub(super) async fn announce_all(inner: Arc<Inner>, outbox: mpsc::Sender<NodeMessage>) {
    inner.state_again(&outbox).await;
    let digests = match inner.cache() {
        Some(cache) => cache.inventory().await.unwrap_or_default(),
        None => Vec::new(),
    };
    for digest in digests {
        inner.recall(digest).await;
        let messages: Vec<NodeMessage> = {
            let state = inner.state();
            let ids = state.of_blob.get(&digest).into_iter().flatten();
            let tasks = ids.filter_map(|id| state.tasks.get(id));
            let served = tasks.filter(|task| task.proved && !task.have.is_empty());
            served.map(|task| convert::announce(task, &task.have)).collect()
        };
        let index = if messages.is_empty() { None } else { inner.restate_index(digest).await };
        for message in messages.into_iter().chain(index) {
            if outbox.send(message).await.is_err() {
                return;
            }
        }
    }
    let cache = inner.cache();
    let listed = cache.map(|cache| spawn_blocking(move || documents::announce_all(&cache)));
    let messages = match listed {
        Some(listed) => listed.await.unwrap_or_default(),
        None => Vec::new(),
    };
    for message in messages {
        if outbox.send(message).await.is_err() {
            return;
        }
    }
    // A stream that is gone needs no end of its inventory.
    let _ = outbox.send(convert::announced()).await;
}

impl Inner {
    pub(super) fn attach(self: &Arc<Self>, outbox: &mpsc::Sender<NodeMessage>) {
        let mut state = self.state();
        state.outbox = Some(outbox.clone());
        self.metrics.scheduler.set(1);
        self.apply(state, Event::SchedulerUp);
        self.give_up_waits();
    }

    pub(super) fn detach(self: &Arc<Self>) {
        let mut state = self.state();
        state.outbox = None;
        self.metrics.scheduler.set(0);
        self.apply(state, Event::SchedulerDown);
    }

    /// Tasks of a blob that was fetched before the process started.
    async fn recall(self: &Arc<Self>, digest: Digest) {
        if self.state().of_blob.contains_key(&digest) {
            return;
        }
        let Some(cache) = self.cache() else { return };
        let Some(held) = self.held(cache, digest).await else { return };
        let (blob, table) = (Arc::clone(&held.blob), held.table.clone());
        // Without a table a blob counts only whole: what was proved then is right for good.
        if table.is_none() && !blob.is_verified() {
            return;
        }
        let known = move || {
            let have = table.as_ref().map_or_else(|| blob.present(), |table| blob.verified(table));
            (blob.scopes(), have, blob.reference())
        };
        let Ok((scopes, have, reference)) = spawn_blocking(known).await else {
            return;
        };
        let mut state = self.state();
        for scope in scopes {
            let id = TaskId::of(&scope, &digest);
            state.of_blob.entry(digest).or_default().insert(id);
            let mut task = Task::new(reference.clone(), held.blob.geometry(), scope);
            (task.table, task.have, task.proved) = (held.table.clone(), have.clone(), true);
            if task.table.is_none() {
                task.own = have.clone();
            }
            state.tasks.entry(id).or_insert(task);
        }
    }

    /// What the scheduler says. A message that makes no sense is passed over.
    pub(super) fn hear(self: &Arc<Self>, message: SchedulerMessage) {
        let Some(message) = message.message else { return };
        let known = match message {
            Message::Assign(assign) => self.meet_parent(assign.parent).and_then(|parent| {
                let task = convert::task_id(&assign.task)?;
                let pieces = convert::pieces(assign.pieces)?;
                self.handle(Event::Assigned { task, parent, pieces });
                Some(())
            }),
            Message::Lease(lease) => convert::task_id(&lease.task).and_then(|task| {
                let pieces = convert::pieces(lease.pieces)?;
                self.handle(Event::Leased { task, pieces });
                Some(())
            }),
            Message::Cancel(cancel) => convert::task_id(&cancel.task).and_then(|task| {
                let pieces = convert::pieces(cancel.pieces)?;
                self.handle(Event::Cancelled { task, pieces });
                Some(())
            }),
            Message::Queued(queued) => convert::task_id(&queued.task).map(|task| {
                self.handle(Event::Queued { task });
            }),
            Message::Neighbours(near) => convert::task_id(&near.task).map(|task| {
                let peers = near.neighbours.into_iter().filter_map(|neighbour| {
                    let pieces = convert::pieces(neighbour.pieces).unwrap_or_default();
                    Some((self.meet_parent(neighbour.peer)?, pieces))
                });
                let peers = peers.collect();
                self.handle(Event::Neighbours { task, peers });
            }),
            Message::Seed(seed) => {
                let origin = seed.task.as_ref().and_then(convert::origin);
                convert::task(seed.task).map(|(digest, len, _)| self.seed(digest, len, origin))
            }
            Message::Blocked(blocked) => {
                self.block(blocked.peers);
                Some(())
            }
            Message::Found(found) => {
                self.found(found);
                Some(())
            }
            Message::Purge(purge) => {
                self.purge(purge);
                Some(())
            }
            Message::Welcome(_) => Some(()),
        };
        if known.is_none() {
            tracing::info!("a message of the scheduler makes no sense here");
        }
    }

    fn meet_parent(&self, peer: Option<skimmer_proto::control::Peer>) -> Option<Peer> {
        Some(Peer(*self.meet(&peer?)?.public_key()))
    }

    /// These nodes are out.
    fn block(&self, peers: Vec<Vec<u8>>) {
        let Some(joined) = self.joined() else { return };
        for peer in peers.iter().filter_map(|peer| PeerId::from_bytes(peer).ok()) {
            tracing::info!(%peer, "blocked");
            joined.member.trust.block(peer);
            joined.transport.block(&peer);
            self.state().watch.note_blocked(peer);
        }
    }

    /// Others want this blob, and this node is to get it first.
    fn seed(self: &Arc<Self>, digest: Digest, len: u64, origin: Option<Origin>) {
        let Some(cache) = self.cache() else { return };
        let origins = Vec::from_iter(origin);
        self.runtime.spawn(async move {
            let reference = BlobRef { digest, len, kind: BlobKind::Blob, origins };
            let opened = spawn_blocking(move || cache.blob(reference)).await;
            let Ok(Ok(blob)) = opened else { return };
            let mut pull = blob.pull_through(Class::PullThrough);
            loop {
                match pull.next().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return,
                    Err(error) => {
                        let error = &error as &dyn std::error::Error;
                        tracing::info!(blob = %digest, error, "not seeded");
                        return;
                    }
                }
            }
        });
    }
}
