//! The snapshotter: looks records up, lets the rules decide, changes folders and records.
//!
//! Owns: the order of those steps, and the one lock under which snapshots change.
//! Does not own: the rules ([`chain`]), the folders' layout ([`Folders`]), the layers' bytes.
//!
//! Invariants:
//! - A snapshot's folder and its record exist before the database names it, and go before it
//!   forgets it.
//! - What fails half-way is taken back.
//! - Nothing waits for a layer while the lock is held.

mod adopt;
mod begun;
mod cover;
mod create;
mod list;
mod lost;
mod mapped;
mod rebuild;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use skimmer_proto::Digest;
use tokio::sync::Notify;
use tracing::{debug, warn};

use crate::chain;
use crate::folders::{self, Folders};
use crate::identify::{Content, Finder};
use crate::layers::{LayerBlame, LayerError, LayerStore};
use crate::metrics::Metrics;
use crate::records::{self, Change, Records};
use crate::remap::{self, Remaps};
use crate::{Kind, Labels, Snapshot, Usage, filter, idmap, implicit};

use begun::{Begun, GRACE};
pub use create::Prepared;
pub use rebuild::Rebuilt;

#[derive(Clone, Debug)]
pub struct Config {
    /// `<root>/snapshots`. Layers are mounted under its `m/`.
    pub root: PathBuf,
    /// How long Prepare waits for a layer before it answers that the layer is there, pending.
    pub prepare_wait: Duration,
    /// How long Mounts waits for pending layers.
    pub deadline: Duration,
    /// containerd's `certs.d`: tells the ports of registries, which containerd's labels leave out.
    pub registry_config: Option<PathBuf>,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Chain(#[from] chain::Error),
    #[error(transparent)]
    Records(#[from] records::Error),
    #[error(transparent)]
    Folders(#[from] folders::Error),
    #[error(transparent)]
    Filter(#[from] filter::Error),
    #[error("read the id mapping of snapshot {name:?}")]
    IdMapping { name: String, source: idmap::Error },
    #[error("find out which layer has the chain ID {reference}")]
    Unidentified { reference: String, source: crate::identify::Error },
    #[error("layer {blob} of image {image} cannot be used")]
    Layer { blob: String, image: String, source: LayerError },
    #[error(
        "layer {blob} of image {image} is still being fetched after {waited:?}; try again, or raise \
         fetch.deadline"
    )]
    Pending { blob: String, image: String, waited: Duration },
    #[error("find out the metadata of directories that layer {blob} of image {image} leaves out")]
    Cover { blob: String, image: String, source: implicit::Error },
    #[error("map the ids of the folders below snapshot {name:?}")]
    Remap { name: String, source: remap::Error },
    #[error("take away the mapped folders of earlier snapshots")]
    Remaps(#[source] remap::Error),
    #[error("ask whether containerd leaves the mapping of ids to us")]
    Capability(#[source] crate::identify::ContentError),
    #[error("the operation was cut short")]
    Job(#[source] tokio::task::JoinError),
}

/// containerd's snapshotter, without its protocol. Cheap to clone.
#[derive(Clone)]
pub struct Snapshotter(Arc<Inner>);

struct Inner {
    config: Config,
    records: Arc<dyn Records>,
    folders: Folders,
    remaps: Remaps,
    layers: Arc<dyn LayerStore>,
    content: Arc<dyn Content>,
    finder: Finder,
    metrics: Metrics,
    begun: Begun,
    /// Layers that may have lost their last snapshot.
    unused: Mutex<BTreeSet<Digest>>,
    /// Held while snapshots change.
    change: Mutex<()>,
    /// Held while a cover is made.
    covering: Mutex<()>,
    /// Told when there is something to clean up.
    discarded: Notify,
}

impl Snapshotter {
    /// Opens the snapshots under `config.root`; `records` are made to agree with the folders. Blocks.
    pub fn open(
        config: Config,
        records: Arc<dyn Records>,
        layers: Arc<dyn LayerStore>,
        content: Arc<dyn Content>,
        registry: &mut prometheus_client::registry::Registry,
    ) -> Result<(Self, Rebuilt), Error> {
        let folders = Folders::open(&config.root)?;
        // Before anything is deleted in which they are.
        let remaps = Remaps::open(&config.root).map_err(Error::Remaps)?;
        let rebuilt = rebuild::reconcile(&folders, records.as_ref())?;
        let mut used = Vec::new();
        records.visit(&mut |snapshot| {
            if let Some(layer) = snapshot.layer {
                layers.keep(&layer.blob.digest);
                used.push(layer);
            }
            ControlFlow::Continue(())
        })?;
        let lost = layers.resume(used);
        let metrics = Metrics::register(registry);
        let inner = Inner {
            config,
            records,
            folders,
            remaps,
            layers,
            finder: Finder::new(Arc::clone(&content)),
            content,
            metrics,
            begun: Begun::default(),
            unused: Mutex::default(),
            change: Mutex::new(()),
            covering: Mutex::new(()),
            discarded: Notify::new(),
        };
        inner.note_lost(&lost);
        Ok((Self(Arc::new(inner)), rebuilt))
    }

    /// Cleans up whenever a snapshot was removed, and from time to time. Never returns.
    pub async fn sweep_forever(&self) {
        loop {
            if let Err(error) = self.cleanup().await {
                warn!(error = &error as &dyn std::error::Error, "cannot delete removed snapshots");
            }
            // Whichever comes first.
            let _elapsed = tokio::time::timeout(GRACE, self.0.discarded.notified()).await;
        }
    }

    pub async fn stat(&self, name: String) -> Result<Snapshot, Error> {
        self.blocking(move |inner| Ok(chain::get(inner.records.as_ref(), &name)?)).await
    }

    /// Changes labels: those named by `fields` (`labels`, `labels.<key>`), or all if it is empty.
    pub async fn update(
        &self,
        name: String,
        labels: Labels,
        fields: Vec<String>,
    ) -> Result<Snapshot, Error> {
        self.blocking(move |inner| {
            let _lock = inner.lock();
            let records = inner.records.as_ref();
            let change = chain::update(records, SystemTime::now(), &name, &labels, &fields)?;
            inner.replace(change)
        })
        .await
    }

    /// Makes the active snapshot `key` the committed snapshot `name`: its record only.
    pub async fn commit(
        &self,
        name: String,
        key: String,
        labels: Labels,
        parent: String,
    ) -> Result<(), Error> {
        self.blocking(move |inner| {
            let _lock = inner.lock();
            let records = inner.records.as_ref();
            let change = chain::commit(records, SystemTime::now(), &name, &key, labels, &parent)?;
            if let Change::Replace { old, .. } = &change {
                // Never mounted, and its layers may still be on their way.
                inner.folders.complete(old.id, None)?;
            }
            inner.replace(change).map(drop)
        })
        .await
    }

    /// Takes a snapshot away at once; its files are deleted, and its layer unmounted, later.
    pub async fn remove(&self, name: String) -> Result<(), Error> {
        self.blocking(move |inner| inner.remove(&name)).await
    }

    async fn release_unless_used(&self, blob: Digest) -> Result<(), Error> {
        let used = self.blocking(move |inner| Ok(inner.records.uses_layer(&blob)?)).await?;
        if !used && !self.0.begun.contains(&blob) {
            debug!(%blob, "no snapshot uses the layer any more");
            self.0.layers.release(&blob).await;
        }
        Ok(())
    }

    /// Deletes the files of removed snapshots, and releases the layers that none uses any more: those
    /// of removed snapshots and those of pulls that were given up.
    pub async fn cleanup(&self) -> Result<(), Error> {
        let mut unused = std::mem::take(&mut *self.0.unused());
        unused.extend(self.0.begun.take_stale(Instant::now()));
        for blob in unused {
            self.release_unless_used(blob).await?;
        }
        self.blocking(|inner| {
            let discarded = {
                // A removal under way may have to put its folder back.
                let _lock = inner.lock();
                inner.folders.discarded()?
            };
            if !discarded.is_empty() {
                debug!(folders = discarded.len(), "deleting removed snapshots");
            }
            Ok(inner.folders.delete(discarded)?)
        })
        .await
    }

    /// What the snapshot takes on disk by itself. Views take nothing.
    pub async fn usage(&self, name: String) -> Result<Usage, Error> {
        let snapshot = self.stat(name).await?;
        if let Some(layer) = &snapshot.layer {
            let layers = self.0.layers.usage(layer).await;
            let layers = layers.map_err(|source| Error::layer(layer, source))?;
            // Its cover.
            let own = self.blocking(move |inner| Ok(inner.folders.usage(snapshot.id)?)).await?;
            return Ok(Usage {
                bytes: layers.bytes + own.bytes,
                inodes: layers.inodes + own.inodes,
            });
        }
        match snapshot.kind {
            Kind::View => Ok(Usage::default()),
            Kind::Active => self.blocking(move |inner| Ok(inner.folders.usage(snapshot.id)?)).await,
            Kind::Committed => self.blocking(move |inner| inner.committed_usage(snapshot.id)).await,
        }
    }

    /// Runs `work` where it may block on the disk.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || work(&inner)).await.map_err(Error::Job)?
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unused(&self) -> MutexGuard<'_, BTreeSet<Digest>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the next clean-up look whether the layer can be released.
    fn maybe_unused(&self, blob: Digest) {
        self.unused().insert(blob);
        self.discarded.notify_one();
    }

    /// Writes a changed record, to the folder and then to the database.
    fn replace(&self, change: Change) -> Result<Snapshot, Error> {
        let (Change::Create(new) | Change::Replace { new, .. } | Change::Remove(new)) = &change;
        self.folders.record(new)?;
        if let Err(error) = self.records.apply(&change) {
            if let Err(left) = self.folders.undo_record(new.id) {
                let error = &left as &dyn std::error::Error;
                warn!(
                    snapshot = new.name,
                    error, "a change that was refused counts after the next start"
                );
            }
            return Err(error.into());
        }
        Ok(new.clone())
    }

    fn remove(&self, name: &str) -> Result<(), Error> {
        let _lock = self.lock();
        let change = chain::remove(self.records.as_ref(), name)?;
        let (Change::Create(old) | Change::Replace { old, .. } | Change::Remove(old)) = &change;
        let discarded = self.discard(old);
        if let Err(error) = self.records.apply(&change) {
            if let Ok(folder) = discarded
                && let Err(left) = self.folders.reinstate(old.id, &folder)
            {
                let error = &left as &dyn std::error::Error;
                warn!(
                    snapshot = name,
                    error, "the folder of a snapshot that could not be removed is lost"
                );
            }
            return Err(error.into());
        }
        // The snapshot is gone whatever happens to its folder.
        if let Err(error) = &discarded {
            let error = error as &dyn std::error::Error;
            warn!(
                snapshot = name,
                error, "the removed snapshot's folder stays, and is back after the next start"
            );
        }
        match &old.layer {
            Some(layer) => self.maybe_unused(layer.blob.digest),
            None => self.discarded.notify_one(),
        }
        Ok(())
    }

    /// Takes the folder of a removed snapshot away, without what is mounted in it. Answers where it is.
    fn discard(&self, old: &Snapshot) -> Result<PathBuf, Error> {
        let failed = |source| Error::Remap { name: old.name.clone(), source };
        self.remaps.clear(old.id).map_err(failed)?;
        Ok(self.folders.discard(old.id)?)
    }

    /// A committed snapshot doesn't change, so it is measured once.
    fn committed_usage(&self, id: u64) -> Result<Usage, Error> {
        if let Some(usage) = self.records.usage(id)? {
            return Ok(usage);
        }
        let usage = self.folders.usage(id)?;
        if let Err(error) = self.records.remember_usage(id, usage) {
            debug!(id, error = &error as &dyn std::error::Error, "usage not remembered");
        }
        Ok(usage)
    }
}

impl Error {
    fn layer(layer: &crate::Binding, source: LayerError) -> Self {
        Self::Layer { blob: layer.blob.digest.to_string(), image: layer.image.clone(), source }
    }

    /// Whether the layer's own bytes are to blame.
    const fn is_bad_layer(&self) -> bool {
        matches!(self, Self::Layer { source, .. } if matches!(source.blame, LayerBlame::Content))
    }

    fn cover(layer: &crate::Binding, source: implicit::Error) -> Self {
        Self::Cover { blob: layer.blob.digest.to_string(), image: layer.image.clone(), source }
    }

    fn pending(layer: &crate::Binding, waited: Duration) -> Self {
        let (blob, image) = (layer.blob.digest.to_string(), layer.image.clone());
        Self::Pending { blob, image, waited }
    }
}
