//! Indexes from elsewhere: what other nodes have found out about a layer.

use std::sync::Arc;

use async_trait::async_trait;
use skimmer_cache::BlobRef;
use skimmer_proto::{Digest, PieceTable};

use crate::layer::{Cause, Layer, Open};
use crate::layers::{Layers, bundle};
use crate::mount::error_chain;

/// Where indexes are shared. Whether an index is to be trusted is decided there.
#[async_trait]
pub trait Indexes: Send + Sync + 'static {
    /// A trusted table and encoded index of the blob, if there is one. Takes seconds at most.
    async fn find(&self, blob: &BlobRef) -> Option<(PieceTable, Vec<u8>)>;

    /// This node has read the whole blob, and it decodes as `table` says.
    async fn publish(&self, blob: &BlobRef, table: &PieceTable);

    /// The index that was found is wrong: the whole blob says otherwise.
    fn mismatch(&self, blob: &BlobRef);
}

impl Layers {
    /// Shares indexes from now on. The first call counts.
    pub fn share_indexes(&self, indexes: Arc<dyn Indexes>) {
        // A second one changes nothing.
        let _ = self.shared().indexes.set(indexes);
    }

    /// The piece table of a layer that this node has read and checked from end to end. Blocks.
    pub fn proved_table(&self, blob: Digest) -> Option<PieceTable> {
        let shared = self.shared();
        let proved = shared.is_proved(blob).ok()?;
        shared.cache.layer(blob).ok().filter(|_| proved)?.table().ok()?
    }

    /// An index has turned out to be a lie elsewhere: layers that rest on it fail, unless they were
    /// proved here. `table` is the digest of its piece table.
    pub async fn disown(&self, blob: Digest, table: Digest) {
        for layer in self.get(blob) {
            let Some(open) = layer.opened() else { continue };
            let known = open.fill.blob().table().map(|table| Digest::of(&table.encode()));
            if !open.is_proved() && known == Some(table) {
                layer.purge(&open, Cause::Disowned).await;
            }
        }
    }
}

impl Layer {
    /// Opens a layer without an index by one that other nodes vouch for.
    pub(crate) async fn open_by_others(&self) -> Option<Open> {
        let (shared, spec) = (self.shared(), self.spec());
        let indexes = shared.indexes.get()?;
        if spec.blob.len < shared.config.min_layer_bytes {
            return None;
        }
        let (table, encoded) = indexes.find(&spec.blob).await?;
        let layer = spec.blob.digest;
        let (keeper, by) = (Arc::clone(shared), spec.clone());
        let kept = tokio::task::spawn_blocking(move || {
            let shown = bundle::decode(table, encoded).map_err(|error| error_chain(&error))?;
            if shown.table.diff_id != by.diff_id {
                return Err("it is of a layer with another DiffID".to_owned());
            }
            // An eviction must not take the layer's folder away while it is written into.
            let _pin = keeper.cache.pin_layer(layer);
            let files = keeper.cache.layer(layer).map_err(|error| error_chain(&error))?;
            let stored = files.store(&shown.encoded, &shown.table, &shown.index.inodes);
            stored.map_err(|error| error_chain(&error))?;
            Open::load(&keeper, &by).map_err(|cause| error_chain(&cause))
        });
        match kept.await {
            Ok(Ok(open)) => {
                tracing::info!(%layer, image = spec.image, "mounting by an index of other nodes");
                open
            }
            Ok(Err(error)) => {
                tracing::warn!(%layer, image = spec.image, error, "the index of other nodes is of no use");
                None
            }
            Err(_) => None,
        }
    }

    /// Tells others what the layer is, now that the whole has been read.
    pub(crate) fn publish(&self, table: Option<Arc<PieceTable>>) {
        let (Some(table), Some(indexes)) = (table, self.shared().indexes.get().cloned()) else {
            return;
        };
        let blob = self.spec().blob;
        self.shared().runtime.spawn(async move { indexes.publish(&blob, &table).await });
    }
}
