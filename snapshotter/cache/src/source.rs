//! Where bytes come from: the one trait between the cache and the network.
//!
//! The registry implements it, and so will the swarm. A source delivers bytes and nothing else:
//! what to fetch next is the planner's decision, whether the bytes are right is the blob's.

use std::fmt;
use std::ops::Range;
use std::pin::Pin;

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use skimmer_proto::Digest;

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

/// A blob and where it may be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobRef {
    pub digest: Digest,
    /// Length in bytes, from the descriptor that names the blob.
    pub len: u64,
    pub kind: BlobKind,
    /// In order of preference; at least one.
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
