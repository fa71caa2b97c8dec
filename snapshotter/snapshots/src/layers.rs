//! What the snapshots need of the layers: an outside world, so a trait.

mod served;

use std::collections::BTreeSet;
use std::path::PathBuf;

use async_trait::async_trait;
use skimmer_proto::Digest;

use crate::{Binding, Usage};

pub use served::Served;

/// Makes layers servable and mounts them.
#[async_trait]
pub trait LayerStore: Send + Sync + 'static {
    /// These are the layers that snapshots use, at the start: what an earlier process left of them is taken over.
    /// Answers the blobs of those that can't be, as nobody kept their mounts.
    fn resume(&self, used: Vec<Binding>) -> BTreeSet<Digest>;

    /// Starts making the layer servable, if nobody has. Returns at once.
    fn begin(&self, layer: &Binding);

    /// Waits until the layer can be mounted. A layer that failed before is tried again.
    async fn ready(&self, layer: &Binding) -> Result<(), LayerError>;

    /// Waits as [`LayerStore::ready`] does, mounts the layer if it isn't, and answers where.
    async fn mount(&self, layer: &Binding) -> Result<PathBuf, LayerError>;

    /// Where [`LayerStore::mount`] will mount the layer, or has: nothing is there until then. Begins the
    /// layer. Returns at once.
    fn place(&self, layer: &Binding) -> PathBuf;

    /// Paths, from the layer's root, of directories that are in the layer only because something lies
    /// in them: their metadata is made up. Not the root; bounded, those near the root first.
    async fn implicit_dirs(&self, layer: &Binding) -> Result<Vec<PathBuf>, LayerError>;

    /// Disk space that the layer takes now, that of its blob included.
    async fn usage(&self, layer: &Binding) -> Result<Usage, LayerError>;

    /// A snapshot's content is the layer of this blob: what there is of it stays, also if the layer isn't
    /// mounted, until it is released.
    fn keep(&self, blob: &Digest);

    /// No snapshot uses the layer of this blob any more: unmounts it, when nobody else does.
    async fn release(&self, blob: &Digest);
}

/// Why a layer can't be served.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct LayerError {
    pub blame: LayerBlame,
    pub reason: &'static str,
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerBlame {
    /// The layer's bytes are not what the image says, or not a layer.
    Content,
    /// Nobody gives us the bytes (no rights, nobody there); containerd may have its own ways.
    Source,
    /// This node: disk, memory, mounts.
    Local,
}
