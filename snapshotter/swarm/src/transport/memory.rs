//! Links without a network: the twin of the real transport, for tests of what is above it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use skimmer_identity::{Membership, PeerId};
use skimmer_proto::Geometry;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Arrival, Call, Error, Flow, Held, Incoming, Link, PieceReader, PieceTransport, Reason, Refusal,
    Reply, Request, Serve, answers,
};

/// The nodes that can reach each other.
#[derive(Default)]
pub struct Network {
    nodes: Mutex<BTreeMap<PeerId, Arc<Node>>>,
    links: Mutex<BTreeMap<Ends, Arc<Wire>>>,
    /// Who can't reach whom.
    walls: Mutex<BTreeSet<Ends>>,
}

/// The two ends of a link, the smaller first.
type Ends = (PeerId, PeerId);

struct Node {
    membership: Membership,
    serve: Arc<dyn Serve>,
    blocked: Mutex<BTreeSet<PeerId>>,
}

/// What both ends of a link share.
#[derive(Default)]
struct Wire {
    cut: CancellationToken,
    /// Bytes towards the larger and towards the smaller peer id.
    up: AtomicU64,
    down: AtomicU64,
}

impl Network {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// A node's end of this network. A node that joins again has lost its links.
    pub fn join(self: &Arc<Self>, membership: Membership, serve: Arc<dyn Serve>) -> Arc<Memory> {
        let me = membership.peer;
        self.leave(&me);
        let node = Arc::new(Node { membership, serve, blocked: Mutex::default() });
        lock(&self.nodes).insert(me, Arc::clone(&node));
        Arc::new(Memory { network: Arc::clone(self), me, node })
    }

    /// The node is gone, as if killed.
    pub fn leave(&self, peer: &PeerId) {
        lock(&self.nodes).remove(peer);
        self.cut_where(|ends| ends.0 == *peer || ends.1 == *peer);
    }

    /// The link between two nodes breaks; they may connect again.
    pub fn cut(&self, one: &PeerId, other: &PeerId) {
        let cut = ends(one, other);
        self.cut_where(|ends| *ends == cut);
    }

    /// Nodes of one group can't reach those of the other, from now on.
    pub fn part(&self, one: &[PeerId], other: &[PeerId]) {
        for (one, other) in one.iter().flat_map(|one| other.iter().map(move |other| (one, other))) {
            lock(&self.walls).insert(ends(one, other));
            self.cut(one, other);
        }
    }

    fn cut_where(&self, cut: impl Fn(&Ends) -> bool) {
        lock(&self.links).retain(|ends, wire| {
            let keep = !cut(ends);
            if !keep {
                wire.cut.cancel();
            }
            keep
        });
    }
}

/// One node's links.
pub struct Memory {
    network: Arc<Network>,
    me: PeerId,
    node: Arc<Node>,
}

impl Memory {
    fn node(&self, peer: &PeerId) -> Option<Arc<Node>> {
        lock(&self.network.nodes).get(peer).cloned()
    }

    fn linked(&self, peer: &PeerId) -> Result<(Arc<Node>, Arc<Wire>), Error> {
        let wire = lock(&self.network.links).get(&ends(&self.me, peer)).cloned();
        self.node(peer).zip(wire).ok_or(Error::NoLink { peer: *peer })
    }
}

#[async_trait]
impl PieceTransport for Memory {
    fn peer(&self) -> PeerId {
        self.me
    }

    async fn connect(&self, peer: &PeerId, _: &[String]) -> Result<Membership, Error> {
        let failed = |reason: &str| Error::Connect {
            peer: *peer,
            source: Arc::new(std::io::Error::other(reason.to_owned())),
        };
        if lock(&self.node.blocked).contains(peer) {
            return Err(Error::Blocked { peer: *peer });
        }
        if lock(&self.network.walls).contains(&ends(&self.me, peer)) {
            return Err(failed("there is no way"));
        }
        let node = self.node(peer).ok_or_else(|| failed("nobody is there"))?;
        if node.membership.cluster != self.node.membership.cluster {
            return Err(failed("it is of another cluster"));
        }
        if lock(&node.blocked).contains(&self.me) {
            return Err(failed("it doesn't talk to us"));
        }
        lock(&self.network.links).entry(ends(&self.me, peer)).or_default();
        Ok(node.membership.clone())
    }

    async fn pieces(&self, peer: &PeerId, request: Request) -> Result<Incoming, Error> {
        let (geometry, _) = request.check().map_err(|what| Error::Request { peer: *peer, what })?;
        let (node, wire) = self.linked(peer)?;
        let (sender, arrivals) = mpsc::unbounded_channel();
        let window = usize::try_from(Request::window(geometry)).unwrap_or(Semaphore::MAX_PERMITS);
        let window = Arc::new(Semaphore::new(window));
        let dropped = CancellationToken::new();
        let flow = Taker { window: Arc::clone(&window), _dropped: dropped.clone().drop_guard() };
        let sending = Sending {
            peer: *peer,
            counter: (wire.clone(), *peer > self.me),
            from: self.node.membership.clone(),
            node,
            window,
            sender,
        };
        let (peer, cut) = (*peer, wire.cut.clone());
        tokio::spawn(async move {
            let sender = sending.sender.clone();
            let broken = tokio::select! {
                biased;
                () = cut.cancelled() => Some(gone(peer)),
                () = dropped.cancelled() => None,
                result = sending.send(request, geometry) => result.err(),
            };
            if let Some(error) = broken {
                // The receiver may have gone.
                let _ = sender.send(Err(error));
            }
        });
        Ok(Incoming { arrivals, flow: Box::new(flow) })
    }

    async fn call(&self, peer: &PeerId, call: Call) -> Result<Reply, Error> {
        let (node, wire) = self.linked(peer)?;
        let reply = tokio::select! {
            biased;
            () = wire.cut.cancelled() => return Err(gone(*peer)),
            reply = node.serve.call(&self.node.membership, call.clone()) => reply,
        };
        let reply = reply.map_err(|source| Error::Refused { peer: *peer, source })?;
        if !answers(&call, &reply) {
            return Err(Error::Answer { peer: *peer });
        }
        Ok(reply)
    }

    fn links(&self) -> Vec<Link> {
        let links = lock(&self.network.links);
        let mine = links.iter().filter_map(|(ends, wire)| {
            let (up, down) = (wire.up.load(Ordering::Relaxed), wire.down.load(Ordering::Relaxed));
            let (peer, sent, received) = match *ends {
                (smaller, larger) if smaller == self.me => (larger, up, down),
                (smaller, larger) if larger == self.me => (smaller, down, up),
                _ => return None,
            };
            let membership = self.node(&peer)?.membership.clone();
            let rtt = Some(Duration::ZERO);
            Some(Link { peer, membership, addresses: Vec::new(), sent, received, rtt })
        });
        let mut mine: Vec<_> = mine.collect();
        mine.sort_by_key(|link| link.peer);
        mine
    }

    fn disconnect(&self, peer: &PeerId) {
        self.network.cut(&self.me, peer);
    }

    fn block(&self, peer: &PeerId) {
        lock(&self.node.blocked).insert(*peer);
        self.disconnect(peer);
    }

    fn unblock(&self, peer: &PeerId) {
        lock(&self.node.blocked).remove(peer);
    }
}

/// The serving end of one request.
struct Sending {
    peer: PeerId,
    /// And whether the bytes go towards the smaller peer id.
    counter: (Arc<Wire>, bool),
    from: Membership,
    node: Arc<Node>,
    window: Arc<Semaphore>,
    sender: mpsc::UnboundedSender<Result<Arrival, Error>>,
}

impl Sending {
    async fn send(&self, request: Request, geometry: Geometry) -> Result<(), Error> {
        let refused = |source| Error::Refused { peer: self.peer, source };
        let mut reader = self.node.serve.open(&self.from, &request).await.map_err(refused)?;
        for piece in request.pieces.iter().cloned().flatten() {
            let span = geometry.span(piece);
            let len = usize::try_from(span.end - span.start).map_err(|_| gone(self.peer))?;
            let (read, back) = tokio::task::spawn_blocking(move || {
                let mut reader: Box<dyn PieceReader> = reader;
                let mut buffer = vec![0; len];
                let read = reader.find(piece).and_then(|held| {
                    if matches!(held, Held::Here(_)) {
                        reader.read(piece, 0, &mut buffer)?;
                    }
                    Ok((held, buffer))
                });
                (read, reader)
            })
            .await
            .map_err(|_| gone(self.peer))?;
            reader = back;
            let broken = |error: std::io::Error| Refusal::new(Reason::Broken, error.to_string());
            let arrival = match read.map_err(|error| refused(broken(error)))? {
                (Held::Absent, _) => Arrival::Absent(piece),
                (Held::Here(signed), buffer) => {
                    let bytes = Bytes::from(buffer);
                    self.wait_for_room(bytes.len()).await?;
                    Arrival::Piece { piece, bytes, signed }
                }
            };
            if self.sender.send(Ok(arrival)).is_err() {
                break;
            }
        }
        Ok(())
    }

    async fn wait_for_room(&self, bytes: usize) -> Result<(), Error> {
        let permits = u32::try_from(bytes).map_err(|_| gone(self.peer))?;
        self.window.acquire_many(permits).await.map_err(|_| gone(self.peer))?.forget();
        let (wire, down) = &self.counter;
        let counter = if *down { &wire.down } else { &wire.up };
        counter.fetch_add(u64::from(permits), Ordering::Relaxed);
        Ok(())
    }
}

struct Taker {
    window: Arc<Semaphore>,
    _dropped: DropGuard,
}

impl Flow for Taker {
    fn taken(&mut self, bytes: usize) {
        self.window.add_permits(bytes);
    }
}

fn ends(one: &PeerId, other: &PeerId) -> Ends {
    (*one.min(other), *one.max(other))
}

fn gone(peer: PeerId) -> Error {
    Error::Gone { peer, reason: "it was cut".into() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
