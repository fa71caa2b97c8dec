//! Whole nodes in one process: real caches and planners, links in memory, a scripted origin, and the
//! real scheduler core where there is one.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use skimmer_cache::{BlobKind, ByteStream, Class, Config, Origin, Sources};
use skimmer_identity::{Authority, Credentials, Key, Membership, Role, Trust};
use skimmer_proto::control::node_message::Message as FromNode;
use skimmer_proto::control::scheduler_message::Message as ToNode;
use skimmer_proto::control::{self as wire, SchedulerMessage};
use skimmer_proto::{Geometry, PieceSet};
use skimmer_scheduler::{self as core, NodeId, NodeInfo, Scheduler};

use super::*;
use crate::transport::memory::Network;

const MIB: usize = 1 << 20;

/// An origin that counts what it serves.
#[derive(Default)]
struct Store {
    blobs: Mutex<HashMap<Digest, Bytes>>,
    served: AtomicU64,
    /// Every byte from here on is wrong.
    lies: std::sync::atomic::AtomicBool,
    down: std::sync::atomic::AtomicBool,
}

#[async_trait]
impl Source for Store {
    fn name(&self) -> &'static str {
        "registry"
    }

    async fn fetch(
        &self,
        blob: &BlobRef,
        range: Range<u64>,
        _: Class,
    ) -> Result<ByteStream, FetchError> {
        let error = |text: &str| FetchError {
            digest: blob.digest,
            from: "the store".to_owned(),
            blame: Blame::Registry,
            retryable: true,
            source: text.into(),
        };
        if self.down.load(Ordering::Relaxed) {
            return Err(error("it is down"));
        }
        let all = self.blobs.lock().unwrap().get(&blob.digest).cloned();
        let all = all.ok_or_else(|| error("no such blob"))?;
        self.served.fetch_add(range.end - range.start, Ordering::Relaxed);
        let at = |n: u64| usize::try_from(n).unwrap();
        let mut bytes = all.slice(at(range.start)..at(range.end)).to_vec();
        if self.lies.load(Ordering::Relaxed) {
            bytes.iter_mut().for_each(|byte| *byte ^= 1);
        }
        let parts: Vec<_> = bytes.chunks(100_001).map(Bytes::copy_from_slice).map(Ok).collect();
        Ok(futures::stream::iter(parts).boxed())
    }
}

/// Everything is public.
struct Open;

#[async_trait]
impl Rights for Open {
    async fn is_public(&self, _: &BlobRef) -> Option<bool> {
        Some(true)
    }

    async fn authorization(&self, _: &Origin) -> Option<String> {
        None
    }
}

struct Node {
    swarm: Swarm,
    cache: Cache,
    member: Member,
    _members: watch::Sender<Option<Member>>,
    _dir: tempfile::TempDir,
}

struct Bench {
    network: Arc<Network>,
    authority: Authority,
    origin: Arc<Store>,
    nodes: Vec<Node>,
}

impl Bench {
    fn new() -> Self {
        let authority = Authority::create("c", unix_now()).unwrap();
        let (network, origin) = (Network::new(), Arc::default());
        Self { network, authority, origin, nodes: Vec::new() }
    }

    async fn with_nodes(count: usize) -> Self {
        let mut bench = Self::new();
        for _ in 0..count {
            bench.add(Role::Peer, Arc::clone(&bench.origin) as _).await;
        }
        bench
    }

    async fn add(&mut self, role: Role, origin: Arc<dyn Source>) {
        let key = Key::generate().unwrap();
        let (me, now) = (key.peer(), unix_now());
        let (cluster, zone) = ("c".to_owned(), "z".to_owned());
        let membership =
            Membership { peer: me, cluster, zone, role, not_before: now, not_after: now + 3600 };
        let certificate = self.authority.issue(&membership).unwrap();
        let trust = Arc::new(Trust::new(Duration::ZERO));
        trust.set_authority("c", self.authority.certificate_der()).unwrap();
        let member = Member {
            credentials: Credentials::new(key, &certificate).unwrap(),
            trust,
            cluster: "c".to_owned(),
            authority: [0; 32],
            schedulers: Vec::new(),
        };
        let network = Arc::clone(&self.network);
        let make: MakeTransport = Box::new(move |_, serve| {
            let transport = network.join(membership.clone(), serve);
            Box::pin(async { Ok(Made { transport, addresses: Box::new(Vec::new) }) })
        });
        let settings = Settings {
            manager: String::new(),
            upload: 0,
            download: 0,
            grace: Duration::ZERO,
            limits: Limits::default(),
        };
        let mut registry = Registry::default();
        let swarm =
            Swarm::new(settings, me, Arc::clone(&origin), Arc::new(Open), make, &mut registry);
        let dir = tempfile::tempdir().unwrap();
        let config = Config { quota_bytes: Some(1 << 40), ..Config::new(dir.path().to_owned()) };
        let sources = Sources { pieces: Some(Arc::new(swarm.clone())), ranges: origin };
        let cache = Cache::open(config, sources, &mut registry).unwrap();
        let (members, receiver) = watch::channel(Some(member.clone()));
        swarm.start(&cache, receiver);
        while swarm.inner.joined().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.nodes.push(Node { swarm, cache, member, _members: members, _dir: dir });
    }

    /// Every node linked with every other.
    async fn link(&self) {
        for node in &self.nodes {
            for other in &self.nodes {
                if node.member.peer() != other.member.peer() {
                    let transport = Arc::clone(&node.swarm.inner.joined().unwrap().transport);
                    transport.connect(&other.member.peer(), &[]).await.unwrap();
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(600)).await;
    }

    fn blob(&self, len: usize, seed: u8) -> (BlobRef, Vec<u8>) {
        let mut state = u64::from(seed) + 1;
        let content: Vec<u8> = (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_le_bytes()[7]
            })
            .collect();
        let digest = Digest::of(&content);
        self.origin.blobs.lock().unwrap().insert(digest, content.clone().into());
        let origins = vec![Origin { host: "r".to_owned(), repository: "a".to_owned() }];
        (BlobRef { digest, len: len as u64, kind: BlobKind::Blob, origins }, content)
    }

    fn served(&self) -> u64 {
        self.origin.served.load(Ordering::Relaxed)
    }

    /// All nodes pull the blob through at once.
    async fn burst(&self, blob: &BlobRef, content: &[u8]) {
        let pulls = self.nodes.iter().map(|node| pulled(&node.cache, blob));
        for got in self.within(futures::future::join_all(pulls)).await {
            assert!(got == content, "wrong bytes");
        }
    }

    /// What `work` comes to, within a time that is ample.
    async fn within<T>(&self, work: impl Future<Output = T>) -> T {
        let done = tokio::time::timeout(Duration::from_secs(60), work).await;
        done.unwrap_or_else(|_| {
            let planners =
                self.nodes.iter().map(|node| format!("{:?}", node.swarm.inner.state().planner));
            panic!("stuck:\n{}", planners.collect::<Vec<_>>().join("\n"))
        })
    }
}

async fn pulled(cache: &Cache, blob: &BlobRef) -> Vec<u8> {
    let blob = cache.blob(blob.clone()).unwrap();
    let mut pull = blob.pull_through(Class::PullThrough);
    let mut all = Vec::new();
    while let Some(part) = pull.next().await.unwrap() {
        all.extend_from_slice(&part);
    }
    all
}

fn table(content: &[u8]) -> PieceTable {
    let geometry = Geometry::of(content.len() as u64).unwrap();
    let value = |piece| {
        let span = geometry.span(piece);
        let range = usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap();
        skimmer_proto::piece_table::piece_value(geometry, piece, &content[range])
    };
    let values = (0..geometry.pieces()).map(value).collect();
    let [diff_id, index] = [Digest::of(b"tar"), Digest::of(b"index")];
    PieceTable::new(geometry, Digest::of(content), diff_id, index, values).unwrap()
}

/// The real scheduler core between the nodes of a bench, without gRPC. Dropping it ends the streams.
struct Led {
    job: tokio::task::JoinHandle<()>,
}

impl Drop for Led {
    fn drop(&mut self) {
        self.job.abort();
    }
}

fn lead(bench: &Bench) -> Led {
    let (to_core, mut events) = mpsc::unbounded_channel();
    let inners: Vec<_> = bench.nodes.iter().map(|node| Arc::clone(&node.swarm.inner)).collect();
    let roles: Vec<_> =
        bench.nodes.iter().map(|n| n.member.credentials.membership().role).collect();
    for (n, inner) in inners.iter().enumerate() {
        let (outbox, mut messages) = mpsc::channel(10_000);
        let seed = roles[n] == Role::Seed;
        let info = NodeInfo { zone: "z".to_owned(), seed, upload: 0, download: 0 };
        let node = NodeId(n as u64);
        to_core.send(core::Event::Joined { node, info }).unwrap();
        inner.attach(&outbox);
        tokio::spawn(attend::announce_all(Arc::clone(inner), outbox));
        let (to_core, peers) = (to_core.clone(), inners.iter().map(|i| i.me).collect::<Vec<_>>());
        tokio::spawn(async move {
            while let Some(message) = messages.recv().await {
                let event = event(node, &peers, message.message.unwrap());
                if to_core.send(event).is_err() {
                    return;
                }
            }
        });
    }
    let job = tokio::spawn(async move {
        let began = Instant::now();
        let mut scheduler = Scheduler::new(core::Limits::default());
        let mut wait = Duration::from_millis(20);
        loop {
            let event = timeout_or_tick(&mut events, wait).await;
            for action in scheduler.apply(began.elapsed(), event) {
                let (node, message) = message(&inners, action);
                inners[usize::try_from(node.0).unwrap()]
                    .hear(SchedulerMessage { message: Some(message) });
            }
            wait = scheduler.next_wake().map_or(Duration::from_millis(100), |at| {
                at.saturating_sub(began.elapsed()).max(Duration::from_millis(1))
            });
        }
    });
    Led { job }
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

fn event(node: NodeId, peers: &[PeerId], message: FromNode) -> core::Event {
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
            let parent = parent.and_then(|peer| peers.iter().position(|p| *p == peer));
            let parent = parent.map(|n| NodeId(n as u64));
            let task = convert::task_id(&failed.task).unwrap();
            core::Event::Failed { node, task, pieces: pieces_of(failed.pieces), parent, fault }
        }
        FromNode::Announced(_) => core::Event::Announced { node },
        FromNode::Withdraw(w) => {
            core::Event::Withdraw { node, task: convert::task_id(&w.task).unwrap() }
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
        core::Action::Seed { node, .. } => (node, ToNode::Welcome(wire::Welcome { epoch: 1 })),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_under_a_scheduler_takes_each_byte_from_the_origin_once() {
    let bench = Bench::with_nodes(5).await;
    let _led = lead(&bench);
    let (blob, content) = bench.blob(20 * MIB + 5, 1);
    bench.burst(&blob, &content).await;
    assert_eq!(bench.served(), content.len() as u64);
    for node in &bench.nodes {
        let blob = node.cache.blob(blob.clone()).unwrap();
        let [_, peers] = blob.fetched_via();
        assert!(peers > 0, "something came from peers");
        blob.prove(table(&content)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "known defect: with the origin down, a node that comes later waits though a peer has the blob"]
async fn who_comes_later_needs_no_origin() {
    let mut bench = Bench::with_nodes(1).await;
    let (blob, content) = bench.blob(5 * MIB, 2);
    bench.burst(&blob, &content).await;
    bench.nodes[0].cache.blob(blob.clone()).unwrap().prove(table(&content)).unwrap();
    bench.origin.down.store(true, Ordering::Relaxed);
    bench.add(Role::Peer, Arc::clone(&bench.origin) as _).await;
    let _led = lead(&bench);
    // Until the scheduler knows who has what.
    tokio::time::sleep(Duration::from_millis(200)).await;
    bench.burst(&blob, &content).await;
    // A reader's fault, verified against a table that it trusts.
    bench.add(Role::Peer, Arc::clone(&bench.origin) as _).await;
    bench.link().await;
    let lazy = bench.nodes[2].cache.blob(blob.clone()).unwrap();
    lazy.set_table(Arc::new(table(&content))).unwrap();
    let fault = lazy.ensure(MIB as u64..2 * MIB as u64, Class::Fault);
    bench.within(fault).await.unwrap();
    let mut read = vec![0; MIB];
    lazy.read_at(&mut read, MIB as u64).unwrap();
    assert!(read == content[MIB..2 * MIB]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_scheduler_nodes_share_the_stripes() {
    let bench = Bench::with_nodes(3).await;
    bench.link().await;
    let (blob, content) = bench.blob(16 * MIB, 3);
    bench.burst(&blob, &content).await;
    assert_eq!(bench.served(), content.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduler_that_goes_in_the_middle_is_not_missed() {
    let bench = Bench::with_nodes(3).await;
    bench.link().await;
    let led = lead(&bench);
    let (blob, content) = bench.blob(64 * MIB, 4);
    let burst = bench.burst(&blob, &content);
    let end = async {
        while bench.served() < 8 << 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(led);
        for node in &bench.nodes {
            node.swarm.inner.detach();
        }
    };
    futures::join!(burst, end);
    let most = content.len() as u64 * 5 / 4;
    assert!(bench.served() <= most, "{} of {}", bench.served(), content.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_vouches_for_wrong_bytes_is_found_out_and_the_blob_comes_right() {
    let mut bench = Bench::with_nodes(1).await;
    let liar = Arc::new(Store::default());
    bench.add(Role::Peer, Arc::clone(&liar) as _).await;
    let (blob, content) = bench.blob(MIB, 5);
    liar.blobs.lock().unwrap().insert(blob.digest, content.clone().into());
    liar.lies.store(true, Ordering::Relaxed);
    bench.link().await;
    // The liar has everything, and vouches for it.
    let wrong = pulled(&bench.nodes[1].cache, &blob).await;
    assert!(wrong != content);
    bench.origin.down.store(true, Ordering::Relaxed);
    let victim = &bench.nodes[0];
    let got = pulled(&victim.cache, &blob).await;
    assert!(got == wrong, "signed, so it is taken, unread until the whole matches");
    let held = victim.cache.blob(blob.clone()).unwrap();
    held.distrust().await.unwrap();
    bench.origin.down.store(false, Ordering::Relaxed);
    assert!(!victim.swarm.takes(&blob), "the origin alone is asked now");
    assert!(pulled(&victim.cache, &blob).await == content);
    let (outbox, mut told) = mpsc::channel(100);
    victim.swarm.inner.attach(&outbox);
    held.prove(table(&content)).unwrap();
    let accused = bench.nodes[1].member.peer().to_bytes().to_vec();
    let mut seen = false;
    while let Ok(message) = told.try_recv() {
        seen |= matches!(message.message, Some(FromNode::Failed(f)) if f.parent == accused);
    }
    assert!(seen, "its signer is reported");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_believed_from_a_seed_or_two_nodes() {
    let bench = {
        let mut bench = Bench::with_nodes(3).await;
        bench.add(Role::Seed, Arc::clone(&bench.origin) as _).await;
        bench
    };
    let (blob, content) = bench.blob(MIB, 6);
    let table = table(&content);
    let digest = Digest::of(&table.encode());
    let record = |n: usize| {
        let credentials = &bench.nodes[n].member.credentials;
        let certificate = credentials.certificate();
        skimmer_identity::statement::sign_index(
            credentials.key(),
            &certificate,
            &blob.digest,
            &digest,
        )
    };
    let inner = &bench.nodes[0].swarm.inner;
    for (signers, expected) in [
        (vec![], false),
        (vec![1], false),
        (vec![1, 1], false),
        (vec![1, 2], true),
        (vec![3], true),
    ] {
        let records: Vec<_> = signers.iter().map(|n| record(*n)).collect();
        let believed = inner.believable(&blob, &records).map(|(table, _)| table);
        assert_eq!(believed, expected.then_some(digest), "{signers:?}");
    }
    let mut forged = record(3);
    forged.table = vec![0; 32];
    assert_eq!(inner.believable(&blob, &[forged]), None);
}
