//! Links to other nodes, and what travels on them: pieces, small objects, have-maps.
//!
//! Owns: links (long-lived, at most one a peer as far as callers can tell), requests in flight on
//! them, the bounds on both. Does not own: who is asked for what ([`crate`]'s planner), where pieces
//! are kept and who may read them ([`Serve`]), whether bytes are right (the receiver checks).
//!
//! Two implementations pass one conformance suite: [`wire::Wire`], and [`memory::Memory`] for tests.

mod asking;
pub mod frame;
mod gate;
pub mod memory;
mod muxer;
mod pool;
mod security;
mod serving;
pub mod shape;
mod streams;
mod upload;
pub mod wire;

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
pub use skimmer_cache::Class;
use skimmer_identity::{Membership, PeerId, SignedValue};
use skimmer_proto::{Digest, Geometry, PieceSet, Scope, TaskId};
use tokio::sync::mpsc;

/// Runs of pieces in one request.
pub const MAX_RUNS: usize = 1024;

/// The largest object that [`Call::Get`] fetches, in bytes.
pub const MAX_OBJECT: usize = 64 << 20;

/// The largest grant, in bytes.
pub const MAX_GRANT: usize = 1024;

/// Bytes of a request that may be under way or waiting for its reader; at least two pieces.
const WINDOW: u64 = 4 << 20;

/// A node's links.
#[async_trait]
pub trait PieceTransport: Send + Sync + 'static {
    /// This node.
    fn peer(&self) -> PeerId;

    /// Makes sure that there is a link to `peer`; says who it is. `addresses` are multiaddrs, tried together.
    async fn connect(&self, peer: &PeerId, addresses: &[String]) -> Result<Membership, Error>;

    /// Asks a linked peer for pieces. Requests on a link are pipelined; those of [`Class::Fault`]
    /// don't wait for others. What arrives is in the order of the request where the peer has it.
    /// Dropping the stream cancels the rest.
    async fn pieces(&self, peer: &PeerId, request: Request) -> Result<Incoming, Error>;

    /// A small question to a linked peer. An object has the digest that was asked for.
    async fn call(&self, peer: &PeerId, call: Call) -> Result<Reply, Error>;

    /// Every link that is up, by peer.
    fn links(&self) -> Vec<Link>;

    /// Drops the link to `peer`, if there is one. Whatever is in flight on it fails.
    fn disconnect(&self, peer: &PeerId);

    /// Drops the link to `peer` and accepts none from it.
    fn block(&self, peer: &PeerId);

    /// Undoes [`Self::block`]; connects to nobody.
    fn unblock(&self, peer: &PeerId);
}

/// What a node gives to others. Rights are its to check: `from` has shown a valid membership of this
/// node's cluster, no more.
#[async_trait]
pub trait Serve: Send + Sync + 'static {
    /// Opens a blob's pieces for one request.
    async fn open(
        &self,
        from: &Membership,
        request: &Request,
    ) -> Result<Box<dyn PieceReader>, Refusal>;

    async fn call(&self, from: &Membership, call: Call) -> Result<Reply, Refusal>;
}

/// Pieces on disk. Both calls block.
pub trait PieceReader: Send + 'static {
    /// Whether `piece` is here. Asked once for each piece of the request, in its order.
    fn find(&mut self, piece: u32) -> io::Result<Held>;

    /// Fills `buffer` with the piece's bytes from `offset` on; only after [`Self::find`] found it.
    fn read(&mut self, piece: u32, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// With the statement of whoever took it from the origin, where the receiver needs one.
    Here(Option<SignedValue>),
    /// The node hasn't got it (yet, or any more).
    Absent,
}

/// Pieces that one node asks of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub scope: Scope,
    pub blob: Digest,
    /// Of the blob; gives the geometry.
    pub len: u64,
    /// Not empty, disjoint, at most [`MAX_RUNS`]; in the order that they are wanted in.
    pub pieces: Vec<Range<u32>>,
    pub class: Class,
}

impl Request {
    pub fn task(&self) -> TaskId {
        TaskId::of(&self.scope, &self.blob)
    }

    /// The geometry and the set of pieces; an error says what can't be so.
    pub fn check(&self) -> Result<(Geometry, PieceSet), &'static str> {
        let geometry = Geometry::of(self.len).ok_or("the blob is too long")?;
        if self.pieces.is_empty() || self.pieces.len() > MAX_RUNS {
            return Err("the number of runs is out of bounds");
        }
        let mut set = PieceSet::new();
        for run in &self.pieces {
            if run.is_empty() || run.end > geometry.pieces() {
                return Err("a run is empty or leaves the blob");
            }
            for piece in run.clone() {
                if !set.insert(piece) {
                    return Err("runs overlap");
                }
            }
        }
        Ok((geometry, set))
    }

    /// Bytes that may be on their way at a time.
    fn window(geometry: Geometry) -> u64 {
        WINDOW.max(2 * geometry.piece_len())
    }
}

/// What comes of a request, piece by piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Whole, of the right length, not verified. The statement isn't either.
    Piece { piece: u32, bytes: Bytes, signed: Option<SignedValue> },
    /// The peer hasn't got it.
    Absent(u32),
}

/// The arrivals of one request: each of its pieces once. It ends after the last, or with an error.
pub struct Incoming {
    /// Bounded by the request's window and its number of pieces.
    arrivals: mpsc::UnboundedReceiver<Result<Arrival, Error>>,
    flow: Box<dyn Flow>,
}

/// The sending end's view of a receiver. Dropped with it, which cancels the request.
trait Flow: Send {
    /// The receiver has taken a piece of `bytes` bytes out of the window.
    fn taken(&mut self, bytes: usize);
}

impl Stream for Incoming {
    type Item = Result<Arrival, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.arrivals.poll_recv(cx);
        if let Poll::Ready(Some(Ok(Arrival::Piece { bytes, .. }))) = &next {
            self.flow.taken(bytes.len());
        }
        next
    }
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Incoming")
    }
}

/// A small question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// "I have exactly these pieces of the task, and am getting those. You?" Answered by
    /// [`Reply::Haves`]; who doesn't know the task has nothing of it.
    Haves { task: TaskId, haves: Haves },
    /// Answered by [`Reply::Object`].
    Get { scope: Scope, blob: Digest, kind: Kind, object: Digest },
    /// An encoded grant, before the first request that needs it. Answered by [`Reply::Done`].
    ShowGrant(Bytes),
}

/// What a node has of a task, by its own account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Haves {
    pub pieces: PieceSet,
    /// Not here yet, but on their way from the origin to this node: nobody else need read them there.
    pub coming: PieceSet,
}

/// What an object is to its blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    PieceTable,
    LayerIndex,
    /// A manifest, an image index or a config: the object is the blob.
    Document,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Haves(Haves),
    /// At most [`MAX_OBJECT`] bytes.
    Object(Bytes),
    Done,
}

/// Why a peer doesn't do what it is asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{}{detail}", reason.text(), if detail.is_empty() { "" } else { ": " })]
pub struct Refusal {
    pub reason: Reason,
    /// For people; at most 512 bytes travel.
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// No grant for the scope.
    Rights,
    /// It doesn't have the blob or the object.
    Absent,
    /// Too much is asked of it at once.
    Busy,
    /// The request makes no sense to it.
    Invalid,
    /// It failed at it.
    Broken,
}

impl Reason {
    const ALL: [Self; 5] = [Self::Rights, Self::Absent, Self::Busy, Self::Invalid, Self::Broken];

    const fn text(self) -> &'static str {
        match self {
            Self::Rights => "no right to it",
            Self::Absent => "not here",
            Self::Busy => "busy",
            Self::Invalid => "not understood",
            Self::Broken => "failed",
        }
    }
}

impl Refusal {
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

/// A link that is up.
#[derive(Clone, Debug, PartialEq)]
pub struct Link {
    pub peer: PeerId,
    pub membership: Membership,
    /// Where the peer's end is, as multiaddrs.
    pub addresses: Vec<String>,
    /// Bytes of pieces and objects, since the link came up.
    pub sent: u64,
    pub received: u64,
    /// The last round trip measured.
    pub rtt: Option<Duration>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("connect to {peer}")]
    Connect { peer: PeerId, source: Arc<dyn std::error::Error + Send + Sync> },
    #[error("connect to {peer}: it is blocked here")]
    Blocked { peer: PeerId },
    #[error("ask {peer}: there is no link to it")]
    NoLink { peer: PeerId },
    #[error("ask {peer}: the link to it broke: {reason}")]
    Gone { peer: PeerId, reason: Arc<str> },
    #[error("ask {peer}: it refused")]
    Refused { peer: PeerId, source: Refusal },
    #[error("ask {peer}: too many requests to it are under way")]
    Crowded { peer: PeerId },
    #[error("ask {peer}: {what}")]
    Request { peer: PeerId, what: &'static str },
    #[error("ask {peer}: it answered something else than what was asked")]
    Answer { peer: PeerId },
}

/// Whether a reply is one to this call, and an object the one that was asked for.
fn answers(call: &Call, reply: &Reply) -> bool {
    match (call, reply) {
        (Call::Haves { .. }, Reply::Haves(_)) | (Call::ShowGrant(_), Reply::Done) => true,
        (Call::Get { object, .. }, Reply::Object(bytes)) => {
            bytes.len() <= MAX_OBJECT && Digest::of(bytes) == *object
        }
        _ => false,
    }
}

#[cfg(test)]
mod conformance;
