//! Where bytes come from: the traits between the cache and the network.
//!
//! The registry is a [`Source`]: it serves ranges, and the cache's planner decides which is next. The
//! swarm is a [`PieceSource`]: it is told everything that is wanted, and finds the order itself.
//! Either delivers bytes and nothing else: whether they are right is the blob's to say.

pub mod memory;

use std::fmt;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use skimmer_proto::{Digest, Geometry, PieceSet, PieceTable};
use tokio::sync::mpsc;

use crate::blob::Blob;

/// A place that serves ranges of blobs.
#[async_trait]
pub trait Source: Send + Sync + 'static {
    /// A short name for logs and metrics: `registry`, `swarm`.
    fn name(&self) -> &'static str;

    /// Opens `range` of `blob`: exactly those bytes in order, unverified, or an error in the middle.
    ///
    /// `range` is not empty and lies within the blob. The source retries what it can by itself
    /// (resume, other origins, back-off) within its own deadline.
    async fn fetch(
        &self,
        blob: &BlobRef,
        range: Range<u64>,
        class: Class,
    ) -> Result<ByteStream, FetchError>;
}

pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, FetchError>> + Send>>;

/// A place that gets any set of pieces, in the order that it finds best.
///
/// It is also told what becomes of blobs, so that it can serve them to others. The calls that
/// aren't async come from the middle of the cache's work: they return at once.
#[async_trait]
pub trait PieceSource: Send + Sync + 'static {
    /// A short name for logs and metrics.
    fn name(&self) -> &'static str;

    /// Whether it would fetch pieces of `blob` now. May change at any time.
    fn takes(&self, blob: &BlobRef) -> bool;

    /// Opens a stream of the order's pieces: each once, in any order, each whole; or an error, after
    /// which what is missing is had elsewhere. Dropping the stream says that nobody wants the rest.
    async fn fetch(&self, order: Order) -> Result<PieceStream, FetchError>;

    /// A piece that it delivered doesn't match the blob's table.
    fn wrong(&self, blob: &BlobRef, piece: u32);

    /// A piece is on disk, wherever it came from.
    fn arrived(&self, blob: &Arc<Blob>, piece: u32);

    /// The whole blob is on disk, and is what its digest and `table` say.
    fn proved(&self, blob: &Arc<Blob>, table: &Arc<PieceTable>);

    /// The whole blob was on disk, but isn't what its digest says; what is wrong is unknown.
    fn disproved(&self, blob: &BlobRef);

    /// The blob's bytes are gone from disk.
    fn forgotten(&self, blob: Digest);
}

/// What a [`PieceSource`] is asked for.
#[derive(Debug)]
pub struct Order {
    pub blob: BlobRef,
    pub geometry: Geometry,
    /// Not empty.
    pub pieces: PieceSet,
    pub class: Class,
    /// What the pieces are checked against when they arrive; `None`: only the whole can be checked.
    pub table: Option<Arc<PieceTable>>,
    /// Pieces of this order that have become more urgent.
    pub urgent: mpsc::UnboundedReceiver<Urgent>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Urgent {
    pub pieces: PieceSet,
    pub class: Class,
}

pub type PieceStream = Pin<Box<dyn Stream<Item = Result<Delivery, FetchError>> + Send>>;

/// A piece, whole.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub piece: u32,
    pub bytes: Bytes,
    pub via: Via,
}

/// Where a piece came from in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Via {
    /// The registry or URL that the blob comes from.
    Origin,
    /// Another node.
    Peer,
}

impl Via {
    pub const ALL: [Self; 2] = [Self::Origin, Self::Peer];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Origin => "registry",
            Self::Peer => "swarm",
        }
    }
}

/// All the places that a cache fetches from.
pub struct Sources {
    /// Asked first, for the blobs that it takes.
    pub pieces: Option<Arc<dyn PieceSource>>,
    /// For everything else, and if `pieces` fails.
    pub ranges: Arc<dyn Source>,
}

impl Sources {
    pub fn only(ranges: Arc<dyn Source>) -> Self {
        Self { pieces: None, ranges }
    }
}

/// A blob and where it may be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobRef {
    pub digest: Digest,
    /// Length in bytes, from the descriptor that names the blob.
    pub len: u64,
    pub kind: BlobKind,
    /// In order of preference; at least one where something is to be fetched.
    pub origins: Vec<Origin>,
}

/// Which of a registry's two namespaces of digests the blob is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlobKind {
    /// Layers and configs, under `/blobs/`.
    Blob,
    /// Manifests and image indexes, under `/manifests/`.
    Manifest,
}

/// A repository of a registry: `docker.io`, `library/debian`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    pub host: String,
    pub repository: String,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)
    }
}

/// Why bytes are wanted, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A reader waits.
    Fault,
    /// A container start waits for the whole layer.
    PullThrough,
    /// Nobody waits: a lazily mounted layer is being completed.
    Background,
}

impl Class {
    pub const ALL: [Self; 3] = [Self::Fault, Self::PullThrough, Self::Background];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Fault => "fault",
            Self::PullThrough => "pull-through",
            Self::Background => "background",
        }
    }
}

/// A fetch that failed, after the source's own retries.
#[derive(Debug, thiserror::Error)]
#[error("fetch {digest} from {from}")]
pub struct FetchError {
    pub digest: Digest,
    /// The origin or peer, in words for a person; no credentials.
    pub from: String,
    pub blame: Blame,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Whose fault a failed fetch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// This node: disk, memory, configuration.
    Local,
    /// The registry, or the way to it.
    Registry,
    /// The registry refused us: credentials or rights.
    Refused,
}
