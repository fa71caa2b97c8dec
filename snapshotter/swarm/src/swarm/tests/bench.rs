//! Nodes with everything real but the network and the origin; some of them misbehave when told to.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use skimmer_cache::source::memory::Memory;
use skimmer_cache::{BlobKind, Class, Config, Origin, Sources};
use skimmer_identity::{Authority, Credentials, Key, Membership, Role, Trust};
use skimmer_proto::{Geometry, PieceSet};
use tokio::task::JoinHandle;

use super::super::*;
use crate::transport::memory::Network;
use crate::transport::{Call, Haves, Held, PieceReader, Refusal, Reply, Request};

pub const MIB: usize = 1 << 20;

/// More than ample: what isn't done by then is stuck.
const STUCK: Duration = Duration::from_secs(120);

/// Everything is public.
struct Open;

/// A repository whose blobs are only said to be there.
pub const CLAIMED: &str = "claimed";

#[async_trait]
impl Rights for Open {
    async fn is_public(&self, _: &BlobRef) -> Option<bool> {
        Some(true)
    }

    async fn authorization(&self, _: &Origin, _: Option<Digest>) -> Option<String> {
        None
    }

    fn is_claimed(&self, blob: &BlobRef) -> bool {
        blob.origins.iter().any(|origin| origin.repository == CLAIMED)
    }
}

/// How a node serves others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Honest,
    /// Sends a piece, then nothing more.
    Stalls,
    /// Sends wrong bytes under right signatures.
    Garbles,
    /// Breaks the link in the middle of each second piece.
    Closes,
    /// Says that it has everything, and has nothing.
    Boasts,
    /// Takes a long time over each piece.
    Dawdles,
}

pub struct Node {
    pub swarm: Swarm,
    pub cache: Cache,
    pub member: Member,
    pub manner: Arc<Mutex<Manner>>,
    pub members: watch::Sender<Option<Member>>,
    _dir: Option<tempfile::TempDir>,
}

impl Node {
    pub fn peer(&self) -> PeerId {
        self.member.peer()
    }

    pub fn inner(&self) -> &Arc<Inner> {
        &self.swarm.inner
    }

    /// The whole blob, which the node goes on pulling as long as the job isn't aborted.
    pub fn pull(&self, blob: &BlobRef) -> JoinHandle<Vec<u8>> {
        let (cache, blob) = (self.cache.clone(), blob.clone());
        tokio::spawn(async move { pulled(&cache, &blob).await })
    }

    pub fn behave(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }
}

pub struct Bench {
    pub network: Arc<Network>,
    pub authority: Authority,
    pub origin: Arc<Memory>,
    pub nodes: Vec<Node>,
    /// Nodes and scheduler give up what stalls after seconds. On a busy machine that hits others too.
    pub hasty: bool,
    /// The test is over: who stalls may stop.
    over: Arc<AtomicBool>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

impl Bench {
    pub fn new() -> Self {
        let authority = Authority::create("c", unix_now()).unwrap();
        let (network, origin) = (Network::new(), Arc::default());
        let over = Arc::default();
        Self { network, authority, origin, nodes: Vec::new(), hasty: false, over }
    }

    pub async fn with_nodes(count: usize) -> Self {
        Self::new().and_nodes(count).await
    }

    pub async fn hasty(count: usize) -> Self {
        let mut bench = Self::new();
        bench.hasty = true;
        bench.and_nodes(count).await
    }

    async fn and_nodes(mut self, count: usize) -> Self {
        for _ in 0..count {
            self.add(Role::Peer).await;
        }
        self
    }

    pub async fn add(&mut self, role: Role) -> &Node {
        let dir = tempfile::tempdir().unwrap();
        let node = self.open(role, Arc::clone(&self.origin), dir.path().to_owned()).await;
        self.nodes.push(Node { _dir: Some(dir), ..node });
        self.nodes.last().unwrap()
    }

    /// A node over a cache directory that may have been another's before.
    pub async fn open(&self, role: Role, origin: Arc<Memory>, root: PathBuf) -> Node {
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
        let manner = Arc::new(Mutex::new(Manner::Honest));
        let (network, over) = (Arc::clone(&self.network), Arc::clone(&self.over));
        let told = Arc::clone(&manner);
        let make: MakeTransport = Box::new(move |_, serve| {
            let (manner, over) = (Arc::clone(&told), Arc::clone(&over));
            let serve = Moody { me, serve, manner, over, network: Arc::clone(&network) };
            let transport = network.join(membership.clone(), Arc::new(serve));
            Box::pin(async { Ok(Made { transport, addresses: Box::new(Vec::new) }) })
        });
        let mut limits = Limits::default();
        if self.hasty {
            limits.stall_first = Duration::from_secs(3);
            limits.stall_min = Duration::from_secs(2);
        }
        let settings = Settings {
            manager: String::new(),
            upload: 0,
            download: 0,
            grace: Duration::ZERO,
            limits,
            book: None,
        };
        let mut registry = Registry::default();
        let swarm =
            Swarm::new(settings, me, Arc::clone(&origin) as _, Arc::new(Open), make, &mut registry);
        let config = Config { quota_bytes: Some(1 << 40), ..Config::new(root) };
        let sources = Sources { pieces: Some(Arc::new(swarm.clone())), ranges: origin };
        let cache = Cache::open(config, sources, &mut registry).unwrap();
        let (members, receiver) = watch::channel(Some(member.clone()));
        swarm.start(&cache, receiver);
        while swarm.inner.joined().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Node { swarm, cache, member, manner, members, _dir: None }
    }

    /// Every node linked with every other, as far as there is a way; and aware of it.
    pub async fn link(&self) {
        for node in &self.nodes {
            let transport = Arc::clone(&node.inner().joined().unwrap().transport);
            for other in self.nodes.iter().filter(|other| other.peer() != node.peer()) {
                // There may be a wall.
                let _ = transport.connect(&other.peer(), &[]).await;
            }
            let linked = || transport.links().iter().map(|link| link.peer).collect();
            self.until(|| node.inner().state().linked == linked()).await;
        }
    }

    /// As if the machine were off.
    pub fn kill(&mut self, n: usize) {
        let node = self.nodes.remove(n);
        self.network.leave(&node.peer());
    }

    /// A blob of the origin.
    pub fn blob(&self, len: usize, seed: u8) -> (BlobRef, Vec<u8>) {
        let mut state = u64::from(seed) + 1;
        let content: Vec<u8> = (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_le_bytes()[7]
            })
            .collect();
        let digest = Digest::of(&content);
        self.origin.put(digest, content.clone());
        let origins = vec![Origin { host: "r".to_owned(), repository: "a".to_owned() }];
        (BlobRef { digest, len: len as u64, kind: BlobKind::Blob, origins }, content)
    }

    pub fn served(&self) -> u64 {
        self.origin.served()
    }

    /// All nodes pull the blob through at once.
    pub async fn burst(&self, blob: &BlobRef, content: &[u8]) {
        let pulls: Vec<_> = self.nodes.iter().map(|node| node.pull(blob)).collect();
        self.all_right(pulls, content).await;
    }

    /// The pulls end with the right bytes.
    pub async fn all_right(&self, pulls: Vec<JoinHandle<Vec<u8>>>, content: &[u8]) {
        for got in self.within(futures::future::join_all(pulls)).await {
            assert!(got.unwrap() == content, "wrong bytes");
        }
    }

    /// The first node pulls the blob, and has proved that it is right.
    pub async fn one_has(&self, blob: &BlobRef, content: &[u8]) {
        self.all_right(vec![self.nodes[0].pull(blob)], content).await;
        self.nodes[0].cache.blob(blob.clone()).unwrap().prove(table(content)).unwrap();
    }

    pub async fn until(&self, done: impl Fn() -> bool) {
        let wait = async {
            while !done() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        self.within(wait).await;
    }

    /// What `work` comes to, within a time that is ample.
    pub async fn within<T>(&self, work: impl Future<Output = T>) -> T {
        // Not dropped before the planners have been shown.
        let mut work = std::pin::pin!(work);
        let done = tokio::time::timeout(STUCK, work.as_mut()).await;
        done.unwrap_or_else(|_| {
            let planners = self.nodes.iter().map(|n| format!("{:?}", n.inner().state().planner));
            panic!("stuck:\n{}", planners.collect::<Vec<_>>().join("\n"))
        })
    }
}

pub async fn pulled(cache: &Cache, blob: &BlobRef) -> Vec<u8> {
    let blob = cache.blob(blob.clone()).unwrap();
    let mut pull = blob.pull_through(Class::PullThrough);
    let mut all = Vec::new();
    while let Some(part) = pull.next().await.unwrap() {
        all.extend_from_slice(&part);
    }
    all
}

pub fn table(content: &[u8]) -> PieceTable {
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

/// A node's server, as it is told to behave.
struct Moody {
    me: PeerId,
    serve: Arc<dyn Serve>,
    manner: Arc<Mutex<Manner>>,
    over: Arc<AtomicBool>,
    network: Arc<Network>,
}

#[async_trait]
impl Serve for Moody {
    async fn open(
        &self,
        from: &skimmer_identity::Membership,
        request: &Request,
    ) -> Result<Box<dyn PieceReader>, Refusal> {
        let manner = *self.manner.lock().unwrap();
        let reader = match manner {
            Manner::Boasts => None,
            _ => Some(self.serve.open(from, request).await?),
        };
        let cut = (Arc::clone(&self.network), self.me, from.peer);
        Ok(Box::new(MoodyReader { reader, manner, over: Arc::clone(&self.over), cut, read: 0 }))
    }

    async fn call(
        &self,
        from: &skimmer_identity::Membership,
        call: Call,
    ) -> Result<Reply, Refusal> {
        let reply = self.serve.call(from, call).await?;
        let boasts = *self.manner.lock().unwrap() == Manner::Boasts;
        Ok(match reply {
            Reply::Haves(_) if boasts => {
                Reply::Haves(Haves { pieces: PieceSet::all(1000), ..Haves::default() })
            }
            reply => reply,
        })
    }
}

struct MoodyReader {
    reader: Option<Box<dyn PieceReader>>,
    manner: Manner,
    over: Arc<AtomicBool>,
    cut: (Arc<Network>, PeerId, PeerId),
    read: u32,
}

impl MoodyReader {
    /// Returns when the test is over, or after `time`.
    fn wait(&self, time: Duration) {
        let until = std::time::Instant::now() + time;
        while !self.over.load(Ordering::Relaxed) && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl PieceReader for MoodyReader {
    fn find(&mut self, piece: u32) -> io::Result<Held> {
        self.reader.as_mut().map_or(Ok(Held::Absent), |reader| reader.find(piece))
    }

    fn read(&mut self, piece: u32, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let Some(reader) = &mut self.reader else { return Ok(()) };
        reader.read(piece, offset, buffer)?;
        self.read += 1;
        match self.manner {
            Manner::Honest | Manner::Boasts => {}
            Manner::Stalls if self.read > 1 => self.wait(Duration::MAX / 4),
            Manner::Closes if self.read > 1 => self.cut.0.cut(&self.cut.1, &self.cut.2),
            Manner::Stalls | Manner::Closes => {}
            Manner::Garbles => buffer.iter_mut().for_each(|byte| *byte ^= 0x55),
            Manner::Dawdles => self.wait(Duration::from_millis(500)),
        }
        Ok(())
    }
}
