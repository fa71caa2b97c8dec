//! Between the cache's orders, the planner and what the planner wants done.

use std::pin::Pin;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use skimmer_cache::{Blame, Blob, Delivery, FetchError, Order, PieceStream, Urgent};
use skimmer_identity::PeerId;
use skimmer_proto::{Digest, Geometry, PieceSet, PieceTable, TaskId};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use super::rights::Standing;
use super::tasks::{QUEUED_PIECES, Sink, Task};
use super::{DISTRUST, Inner, Joined, Made, State, convert, serve, unix_now};
use crate::member::Member;
use crate::plan::{Action, Event, Fault, Peer, Report, RequestId, Shape};
use crate::transport::{Call, Haves, Reply};

/// Links are looked at this often.
const LOOK: Duration = Duration::from_millis(250);
/// And the book of peers is saved this often at most, if it has changed.
const SAVE: Duration = Duration::from_secs(1);

/// Opens the stream of an order.
pub async fn order(inner: &Arc<Inner>, order: Order) -> Result<PieceStream, FetchError> {
    let Order { blob, geometry, pieces, class, table, urgent } = order;
    let digest = blob.digest;
    if inner.joined().is_none() {
        return Err(inner.failure(digest, Blame::Local, true, "this node is not a member yet"));
    }
    let Standing { scope, proved } = inner.standing(&blob).await;
    let task = TaskId::of(&scope, &digest);
    let (sender, deliveries) = mpsc::channel(QUEUED_PIECES);
    let origin = !blob.origins.is_empty();
    let mut state = inner.state();
    let id = state.next_order;
    state.next_order += 1;
    state.of_blob.entry(digest).or_default().insert(task);
    let known = state.tasks.entry(task);
    let known = known.or_insert_with(|| Task::new(blob.clone(), geometry, scope));
    known.blob = blob;
    known.proved |= proved;
    known.table = table.or_else(|| known.table.take());
    known.orders.insert(id, Sink { left: pieces.clone(), sender });
    known.announced = true;
    let shape = shape(geometry);
    let close = Close { inner: Arc::downgrade(inner), task, id, pieces: pieces.clone() };
    inner.apply(state, Event::Want { task, shape, pieces, class, origin });
    inner.runtime.spawn(hear_urgency(Arc::downgrade(inner), task, shape, urgent, origin));
    Ok(Box::pin(Deliveries { deliveries, _close: close }))
}

async fn hear_urgency(
    inner: Weak<Inner>,
    task: TaskId,
    shape: Shape,
    mut urgent: mpsc::UnboundedReceiver<Urgent>,
    origin: bool,
) {
    while let Some(Urgent { pieces, class }) = urgent.recv().await {
        let Some(inner) = inner.upgrade() else { return };
        let state = inner.state();
        // What has been delivered meanwhile isn't wanted any more.
        let orders = state.tasks.get(&task).into_iter().flat_map(|task| task.orders.values());
        let left = orders.fold(PieceSet::new(), |mut left, sink| {
            left.insert_all(&sink.left);
            left
        });
        let pieces = pieces.intersection(&left);
        inner.apply(state, Event::Want { task, shape, pieces, class, origin });
    }
}

/// The pieces of an order as they come.
struct Deliveries {
    deliveries: mpsc::Receiver<Result<Delivery, FetchError>>,
    _close: Close,
}

impl Stream for Deliveries {
    type Item = Result<Delivery, FetchError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.deliveries.poll_recv(cx)
    }
}

/// Ends an order when its reader goes.
struct Close {
    inner: Weak<Inner>,
    task: TaskId,
    id: u64,
    /// Everything that was ordered.
    pieces: PieceSet,
}

impl Drop for Close {
    fn drop(&mut self) {
        let Some(inner) = self.inner.upgrade() else { return };
        let mut state = inner.state();
        let mut pieces = std::mem::take(&mut self.pieces);
        if let Some(task) = state.tasks.get_mut(&self.task) {
            task.orders.remove(&self.id);
            for other in task.orders.values() {
                pieces.remove_all(&other.left);
            }
            // What was delivered and isn't there was wrong, or the disk is full: it isn't on its way any more.
            pieces.remove_all(&task.have);
        }
        if !pieces.is_empty() {
            inner.apply(state, Event::Unwant { task: self.task, pieces });
        }
    }
}

impl Inner {
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn handle(self: &Arc<Self>, event: Event) {
        self.apply(self.state(), event);
    }

    /// Decides and starts what was decided, under the lock: nothing here waits.
    pub(super) fn apply(self: &Arc<Self>, mut state: MutexGuard<'_, State>, event: Event) {
        if let Event::Ended { request, .. } = &event {
            state.requests.remove(request);
        }
        for action in state.planner.apply(self.now(), event) {
            match action {
                Action::Ask { request, task, peer, pieces, class } => {
                    let peer = PeerId::from_public_key(peer.0);
                    self.start(&mut state, request, |inner| async move {
                        inner.ask(request, task, peer, pieces, class).await
                    });
                }
                Action::Origin { request, task, pieces, class, why } => {
                    self.start(&mut state, request, |inner| async move {
                        inner.read_origin(request, task, pieces, class, why).await
                    });
                }
                Action::Abandon { request } => {
                    _ = state.requests.remove(&request).map(|job| job.abort());
                }
                Action::Probe { task, peer } => {
                    let (inner, peer) = (Arc::clone(self), PeerId::from_public_key(peer.0));
                    self.runtime.spawn(async move { inner.probe(task, peer).await });
                }
                Action::Report(report) => self.report(&mut state, report),
                Action::Hopeless { task } => self.give_up(&mut state, task),
            }
        }
        drop(state);
        self.timer.notify_one();
    }

    fn start<F>(
        self: &Arc<Self>,
        state: &mut State,
        request: RequestId,
        work: impl FnOnce(Arc<Self>) -> F,
    ) where
        F: Future<Output = Result<(), Fault>> + Send + 'static,
    {
        let inner = Arc::clone(self);
        let work = work(Arc::clone(self));
        let job = self.runtime.spawn(async move {
            let outcome = work.await;
            inner.handle(Event::Ended { request, outcome });
        });
        state.requests.insert(request, job.abort_handle());
    }

    pub(super) fn report(&self, state: &mut State, report: Report) {
        let Some(message) = convert::report(&state.tasks, report) else { return };
        state.tell(message);
    }

    fn give_up(&self, state: &mut State, task: TaskId) {
        let Some(task) = state.tasks.get(&task) else { return };
        for sink in task.orders.values() {
            let what = "the origin refuses this node, and no peer has the rest";
            let error = self.failure(task.blob.digest, Blame::Refused, true, what);
            // A reader that is behind hears of it when the planner says so again.
            let _ = sink.sender.try_send(Err(error));
        }
    }

    /// A piece of `blob` is on disk.
    pub(super) fn arrived(self: &Arc<Self>, blob: &Arc<Blob>, piece: u32) {
        let mut state = self.state();
        let tasks = state.of_blob.get(&blob.digest()).cloned().unwrap_or_default();
        if tasks.is_empty() {
            drop(state);
            self.notice(blob);
            return;
        }
        let pieces: PieceSet = std::iter::once(piece).collect();
        for id in tasks {
            let downloading = state.planner.is_downloading(&id);
            let Some(task) = state.tasks.get_mut(&id) else { continue };
            if !task.is_vouched(piece) {
                // It didn't come through the swarm, so it came from the origin.
                task.own.insert(piece);
            }
            if task.proved && task.have.is_empty() {
                serve::allow(self, blob, vec![task.scope.clone()]);
            }
            task.have.insert(piece);
            if downloading {
                let pieces = pieces.clone();
                self.apply(state, Event::Stored { task: id, pieces });
                state = self.state();
            } else if task.proved {
                let message = convert::announce(task, &pieces);
                state.tell(message);
            }
        }
    }

    /// A blob that is fetched past the swarm: finds out in which scope it may be served.
    fn notice(self: &Arc<Self>, blob: &Arc<Blob>) {
        let reference = blob.reference();
        if self.joined().is_none() || reference.origins.is_empty() {
            return;
        }
        let (inner, blob) = (Arc::clone(self), Arc::clone(blob));
        self.runtime.spawn(async move {
            let Standing { scope, proved } = inner.standing(&reference).await;
            if !proved {
                return;
            }
            let id = TaskId::of(&scope, &reference.digest);
            let mut task = Task::new(reference, blob.geometry(), scope);
            (task.own, task.have, task.proved) = (blob.present(), blob.present(), true);
            let mut state = inner.state();
            state.of_blob.entry(blob.digest()).or_default().insert(id);
            let known = state.tasks.entry(id).or_insert(task);
            let message = convert::announce(known, &known.have);
            state.tell(message);
        });
    }

    pub(super) fn wrong(self: &Arc<Self>, blob: Digest, piece: u32) {
        let tasks = self.state().of_blob.get(&blob).cloned().unwrap_or_default();
        for task in tasks {
            if let Some(task) = self.state().tasks.get_mut(&task) {
                task.values.remove(&piece);
            }
            self.handle(Event::Wrong { task, piece });
        }
    }

    /// The whole is right: whoever vouched for something else lied.
    pub(super) fn proved(self: &Arc<Self>, blob: &Arc<Blob>, table: &Arc<PieceTable>) {
        let mut state = self.state();
        let suspects = state.suspects.remove(&blob.digest()).unwrap_or_default();
        state.distrusted.remove(&blob.digest());
        let mut scopes = Vec::new();
        for id in state.of_blob.get(&blob.digest()).cloned().unwrap_or_default() {
            let Some(task) = state.tasks.get_mut(&id) else { continue };
            task.table = Some(Arc::clone(table));
            task.values.clear();
            task.have = PieceSet::all(task.geometry.pieces());
            if task.proved {
                scopes.push(task.scope.clone());
                let message = convert::announce(task, &task.have);
                state.tell(message);
            }
        }
        for lie in suspects.iter().filter(|value| table.value(value.piece) != Some(&value.value)) {
            self.blame(&mut state, lie);
        }
        drop(state);
        serve::allow(self, blob, scopes);
    }

    /// Reports who vouched for a wrong value.
    fn blame(&self, state: &mut State, lie: &skimmer_identity::SignedValue) {
        let Some(joined) = self.joined() else { return };
        let Ok(signer) = lie.check(&joined.member.trust, super::unix_now()) else { return };
        if signer.peer == self.me {
            // It passed on what its origin gave it.
            return;
        }
        let blob = state.tasks.get(&lie.task).map(|task| &task.blob);
        let fault = if blob.is_some_and(|blob| self.rights.is_claimed(blob)) {
            tracing::info!(peer = %signer.peer, piece = lie.piece, "a node has another file under this digest");
            Fault::Absent
        } else {
            tracing::warn!(peer = %signer.peer, piece = lie.piece, "a node vouched for a wrong piece");
            Fault::Corrupt
        };
        let parent = Some(Peer(*signer.peer.public_key()));
        let pieces = std::iter::once(lie.piece).collect();
        let failed = Report::Failed { task: lie.task, pieces, parent, fault };
        self.report(state, failed);
    }

    /// The whole is wrong; which piece is, shows when it has been read from the origin.
    pub(super) fn disproved(&self, blob: Digest) {
        let mut state = self.state();
        let mut values = Vec::new();
        for id in state.of_blob.get(&blob).cloned().unwrap_or_default() {
            if let Some(task) = state.tasks.get_mut(&id) {
                values.extend(std::mem::take(&mut task.values).into_values());
            }
        }
        if !values.is_empty() {
            state.suspects.insert(blob, values);
            state.distrusted.insert(blob, Instant::now() + DISTRUST);
        }
        let now = Instant::now();
        state.distrusted.retain(|_, until| *until > now);
        let kept: std::collections::HashSet<Digest> = state.distrusted.keys().copied().collect();
        state.suspects.retain(|blob, _| kept.contains(blob));
    }

    pub(super) fn forgotten(self: &Arc<Self>, blob: Digest) {
        self.indexes.forget(&blob);
        let mut state = self.state();
        for id in state.of_blob.get(&blob).cloned().unwrap_or_default() {
            let Some(task) = state.tasks.get_mut(&id) else { continue };
            (task.have, task.own) = (PieceSet::new(), PieceSet::new());
            task.values.clear();
            task.table = None;
            if task.orders.is_empty() {
                state.tasks.remove(&id);
                if let Some(tasks) = state.of_blob.get_mut(&blob) {
                    tasks.remove(&id);
                }
            }
        }
        state.of_blob.retain(|_, tasks| !tasks.is_empty());
    }
}

pub const fn shape(geometry: Geometry) -> Shape {
    Shape { pieces: geometry.pieces(), piece_len: geometry.piece_len() }
}

/// The planner's alarm clock, and the watch on links.
pub async fn tick(inner: Weak<Inner>) {
    let (mut looked, mut saved) = (Instant::now(), Instant::now());
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let now = strong.now();
        let due = strong.state().planner.next_wake(now).map(|due| due.saturating_sub(now));
        let wait = due.unwrap_or(LOOK).min(LOOK);
        let slept = timeout(wait, strong.timer.notified()).await.is_err();
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            strong.look_at_links(unix_now());
            for peer in strong.book.take_new() {
                strong.handle(Event::Met { peer: Peer(*peer.public_key()) });
            }
            if saved.elapsed() >= SAVE {
                saved = Instant::now();
                let inner = Arc::clone(&strong);
                strong.runtime.spawn_blocking(move || inner.book.save());
            }
        }
        if slept {
            strong.handle(Event::Tick);
        }
    }
}

/// Opens the transport when this node has become a member.
pub async fn follow_members(inner: Weak<Inner>, mut members: watch::Receiver<Option<Member>>) {
    loop {
        let member = members.borrow_and_update().clone();
        let Some(strong) = inner.upgrade() else { return };
        let known = strong.joined();
        match (member, known) {
            (Some(member), None) => strong.join(member).await,
            (Some(member), Some(known)) if member.shares(&known.member) => {
                strong.renewed(member, &known);
            }
            (Some(member), Some(known)) => tracing::error!(
                joined = known.member.cluster,
                enrolled = member.cluster,
                "this node has enrolled in another cluster; skimmerd must be restarted to join it"
            ),
            (None, _) => {}
        }
        drop(strong);
        if members.changed().await.is_err() {
            return;
        }
    }
}

impl Inner {
    async fn join(self: &Arc<Self>, member: Member) {
        let server = Arc::new(serve::Server::of(self));
        match (self.make)(member.clone(), server).await {
            Ok(Made { transport, addresses }) => {
                let addresses = Arc::from(addresses);
                self.set_joined(Joined { member, transport, addresses });
            }
            Err(error) => tracing::error!(
                error = &*error as &dyn std::error::Error,
                "the swarm's transport could not be opened; the node goes on alone"
            ),
        }
    }

    /// The membership has a new certificate: what bears the old one is said again.
    fn renewed(self: &Arc<Self>, member: Member, known: &Joined) {
        let (transport, addresses) = (Arc::clone(&known.transport), Arc::clone(&known.addresses));
        self.set_joined(Joined { member, transport, addresses });
        let outbox = self.state().outbox.clone();
        if let Some(outbox) = outbox {
            let inner = Arc::clone(self);
            self.runtime.spawn(async move { inner.state_again(&outbox).await });
        }
    }

    fn set_joined(&self, joined: Joined) {
        let mut known = self.joined.write().unwrap_or_else(PoisonError::into_inner);
        *known = Some(Arc::new(joined));
    }

    /// Asks a peer what it has of a task.
    async fn probe(self: &Arc<Self>, task: TaskId, peer: PeerId) {
        let Some(joined) = self.joined() else { return };
        if joined.transport.connect(&peer, &self.addresses(&peer)).await.is_err() {
            self.handle(Event::PeerLost { peer: Peer(*peer.public_key()) });
            return;
        }
        if !self.state().linked.contains(&peer) {
            self.look_at_links(unix_now());
        }
        let call = Call::Haves { task, haves: self.haves(&task) };
        if let Ok(Reply::Haves(haves)) = joined.transport.call(&peer, call).await {
            self.hear_haves(task, Peer(*peer.public_key()), haves, false);
        }
    }

    /// What this node tells others that it has.
    pub(super) fn haves(&self, task: &TaskId) -> Haves {
        let state = self.state();
        let pieces = state.tasks.get(task).map(|task| task.have.clone()).unwrap_or_default();
        Haves { pieces, coming: state.planner.coming(task) }
    }

    /// What another one says; `active` if it is fetching, as its question shows.
    pub(super) fn hear_haves(
        self: &Arc<Self>,
        task: TaskId,
        peer: Peer,
        haves: Haves,
        active: bool,
    ) {
        let Haves { pieces, coming } = haves;
        self.handle(Event::Coming { task, peer, pieces: coming });
        self.handle(Event::Has { task, peer, pieces, active });
    }
}
