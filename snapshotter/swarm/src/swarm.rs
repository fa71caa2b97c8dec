//! This node in the swarm: a source of pieces to the cache, a server of pieces to other nodes.
//!
//! Owns: the download planner and its clock, tasks and orders, requests in flight, the membership, the
//! scheduler stream.
//! Does not own: bytes (the cache's), connections (the transport's), decisions (the planner's).
//!
//! Invariants:
//! - Nothing is served in a scope that this node hasn't proved, nor to whom hasn't shown a grant.
//! - Before a trusted table exists, a piece is used and passed on only with a checked signed value.
//! - Without a membership the swarm takes no blob, and the node works as if it were alone.

mod attend;
mod book;
mod convert;
mod documents;
mod drive;
mod indexes;
mod kept;
mod links;
mod metrics;
mod rights;
mod serve;
mod tasks;
mod transfer;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::BoxFuture;
use prometheus_client::registry::Registry;
use skimmer_cache::{
    Blame, Blob, BlobRef, Cache, FetchError, Order, PieceSource, PieceStream, Source, WeakCache,
};
use skimmer_identity::PeerId;
use skimmer_proto::control::NodeMessage;
use skimmer_proto::{Digest, PieceTable, TaskId};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

pub use self::rights::Rights;

use self::metrics::Metrics;
use self::tasks::Task;
use crate::member::{self, Member};
use crate::plan::{Event, Limits, Peer, Planner, RequestId};
use crate::transport::{Link, PieceTransport, Serve};

/// How long a blob whose whole was wrong is had from the origin alone.
const DISTRUST: Duration = Duration::from_secs(600);

/// Makes the transport of a member.
pub type MakeTransport = Box<
    dyn Fn(Member, Arc<dyn Serve>) -> BoxFuture<'static, Result<Made, TransportError>>
        + Send
        + Sync,
>;

/// A transport, and where it listens.
pub struct Made {
    pub transport: Arc<dyn PieceTransport>,
    /// Multiaddrs, at the moment of asking.
    pub addresses: Box<dyn Fn() -> Vec<String> + Send + Sync>,
}

pub type TransportError = Box<dyn std::error::Error + Send + Sync>;

#[derive(Clone, Debug)]
pub struct Settings {
    /// The manager's `host:port`, for grants.
    pub manager: String,
    /// Bytes per second; 0: unknown.
    pub upload: u64,
    pub download: u64,
    pub grace: Duration,
    pub limits: Limits,
    /// Where the peers that it knows are kept over a restart.
    pub book: Option<PathBuf>,
}

/// Cheap to clone; all clones are one node.
#[derive(Clone)]
pub struct Swarm {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    settings: Settings,
    me: PeerId,
    origin: Arc<dyn Source>,
    rights: Arc<dyn Rights>,
    make: MakeTransport,
    metrics: Metrics,
    runtime: Handle,
    started: Instant,
    timer: Notify,
    joined: RwLock<Option<Arc<Joined>>>,
    cache: OnceLock<WeakCache>,
    state: Mutex<State>,
    book: book::Book,
    known: rights::Known,
    /// Grants that peers have shown, and those that were shown to them.
    shown: serve::Shown,
    indexes: indexes::Found,
}

/// This node as a member.
pub(crate) struct Joined {
    member: Member,
    transport: Arc<dyn PieceTransport>,
    addresses: Arc<dyn Fn() -> Vec<String> + Send + Sync>,
}

struct State {
    planner: Planner,
    tasks: HashMap<TaskId, Task>,
    of_blob: HashMap<Digest, BTreeSet<TaskId>>,
    requests: HashMap<RequestId, AbortHandle>,
    /// To the scheduler, while there is a stream.
    outbox: Option<mpsc::Sender<NodeMessage>>,
    linked: BTreeSet<PeerId>,
    watch: links::Watch,
    /// Blobs that turned out wrong, and until when they aren't taken.
    distrusted: HashMap<Digest, Instant>,
    /// Who vouched for pieces of a blob that turned out wrong.
    suspects: HashMap<Digest, Vec<skimmer_identity::SignedValue>>,
    next_order: u64,
}

/// A peer as `skimmer peers` shows it.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    pub link: Link,
}

/// How this node stands in the swarm.
#[derive(Clone, Debug)]
pub struct Status {
    pub peer: PeerId,
    /// Empty: not a member.
    pub cluster: String,
    pub scheduler: bool,
    pub peers: Vec<PeerStatus>,
}

impl Swarm {
    /// Must be called within a tokio runtime. `me` is the node's own key's peer id.
    pub fn new(
        settings: Settings,
        me: PeerId,
        origin: Arc<dyn Source>,
        rights: Arc<dyn Rights>,
        make: MakeTransport,
        registry: &mut Registry,
    ) -> Self {
        let peer = Peer(*me.public_key());
        let seed = peer.0.iter().fold(7, |hash: u64, byte| hash.rotate_left(9) ^ u64::from(*byte));
        let book = book::Book::open(settings.book.clone());
        let mut planner = Planner::new(peer, seed, settings.limits.clone());
        for peer in book.take_new() {
            let met = Event::Met { peer: Peer(*peer.public_key()) };
            // Nothing is wanted yet, so nothing is to be done.
            let _ = planner.apply(Duration::ZERO, met);
        }
        let state = State {
            planner,
            tasks: HashMap::new(),
            of_blob: HashMap::new(),
            requests: HashMap::new(),
            outbox: None,
            linked: BTreeSet::new(),
            watch: links::Watch::default(),
            distrusted: HashMap::new(),
            suspects: HashMap::new(),
            next_order: 0,
        };
        let inner = Inner {
            settings,
            me,
            origin,
            rights,
            make,
            metrics: Metrics::register(registry),
            runtime: Handle::current(),
            started: Instant::now(),
            timer: Notify::new(),
            joined: RwLock::default(),
            cache: OnceLock::new(),
            state: Mutex::new(state),
            book,
            known: rights::Known::default(),
            shown: serve::Shown::default(),
            indexes: indexes::Found::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Serves what `cache` has, and joins when `members` says that this node is a member.
    pub fn start(&self, cache: &Cache, members: watch::Receiver<Option<Member>>) {
        // A second start changes nothing.
        let _ = self.inner.cache.set(cache.downgrade());
        let inner = &self.inner;
        inner.runtime.spawn(drive::tick(Arc::downgrade(inner)));
        inner.runtime.spawn(drive::follow_members(Arc::downgrade(inner), members.clone()));
        inner.runtime.spawn(attend::attend(Arc::downgrade(inner), members));
    }

    pub fn status(&self) -> Status {
        let joined = self.inner.joined();
        let links = joined.as_ref().map(|joined| joined.transport.links()).unwrap_or_default();
        Status {
            peer: self.inner.me,
            cluster: joined.map(|joined| joined.member.cluster.clone()).unwrap_or_default(),
            scheduler: self.inner.state().outbox.is_some(),
            peers: links.into_iter().map(|link| PeerStatus { link }).collect(),
        }
    }
}

#[async_trait]
impl PieceSource for Swarm {
    fn name(&self) -> &'static str {
        "swarm"
    }

    fn takes(&self, blob: &BlobRef) -> bool {
        let member = self.inner.joined();
        member.is_some_and(|joined| joined.member.is_valid(self.inner.settings.grace))
            && !self.inner.is_distrusted(blob.digest)
    }

    async fn fetch(&self, order: Order) -> Result<PieceStream, FetchError> {
        drive::order(&self.inner, order).await
    }

    fn wrong(&self, blob: &BlobRef, piece: u32) {
        self.inner.wrong(blob.digest, piece);
    }

    fn arrived(&self, blob: &Arc<Blob>, piece: u32) {
        self.inner.arrived(blob, piece);
    }

    fn proved(&self, blob: &Arc<Blob>, table: &Arc<PieceTable>) {
        self.inner.proved(blob, table);
    }

    fn disproved(&self, blob: &BlobRef) {
        self.inner.disproved(blob.digest);
    }

    fn forgotten(&self, blob: Digest) {
        self.inner.forgotten(blob);
    }
}

impl State {
    /// A message to the scheduler, if there is a stream. A scheduler that doesn't keep up loses it,
    /// and is told everything anew.
    fn tell(&mut self, message: NodeMessage) {
        let kept_up = self.outbox.as_ref().is_none_or(|outbox| outbox.try_send(message).is_ok());
        if !kept_up {
            tracing::info!("the scheduler doesn't keep up; its stream is opened anew");
            self.outbox = None;
        }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn joined(&self) -> Option<Arc<Joined>> {
        self.joined.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn cache(&self) -> Option<Cache> {
        self.cache.get().and_then(WeakCache::upgrade)
    }

    fn is_distrusted(&self, blob: Digest) -> bool {
        self.state().distrusted.get(&blob).is_some_and(|until| *until > Instant::now())
    }

    /// Where a peer listens, by the latest word.
    fn addresses(&self, peer: &PeerId) -> Vec<String> {
        self.book.addresses(peer)
    }

    fn meet(&self, peer: &skimmer_proto::control::Peer) -> Option<PeerId> {
        let id = PeerId::from_bytes(&peer.id).ok()?;
        if id != self.me {
            self.book.note(id, peer.addresses.clone());
        }
        Some(id)
    }

    fn failure(&self, blob: Digest, blame: Blame, retryable: bool, what: &str) -> FetchError {
        let from = "the swarm".to_owned();
        FetchError { digest: blob, from, blame, retryable, source: what.into() }
    }
}

pub(crate) use member::unix_now;

#[cfg(test)]
mod tests;
