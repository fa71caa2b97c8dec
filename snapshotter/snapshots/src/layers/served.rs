//! [`LayerStore`] on the node's layers: mounts served from the cache.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as StdError;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use skimmer_cache::{Blame, Cache, FetchError, Pin};
use skimmer_layers::{Cause, Failure, Layer, LayerSpec, Layers};
use skimmer_proto::Digest;

use super::{LayerBlame, LayerError, LayerStore};
use crate::{Binding, Usage};

/// The layers of this node.
pub struct Served {
    layers: Layers,
    cache: Cache,
    kept: Mutex<BTreeMap<Digest, Pin>>,
}

impl Served {
    pub fn new(layers: Layers, cache: Cache) -> Self {
        Self { layers, cache, kept: Mutex::default() }
    }

    fn begun(&self, layer: &Binding) -> Arc<Layer> {
        self.keep(&layer.blob.digest);
        self.layers.begin(layer.clone().into())
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<Digest, Pin>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl LayerStore for Served {
    fn resume(&self, used: Vec<Binding>) -> BTreeSet<Digest> {
        self.layers.resume(used.into_iter().map(Into::into));
        self.layers.lost().clone()
    }

    fn begin(&self, layer: &Binding) {
        self.begun(layer);
    }

    async fn ready(&self, layer: &Binding) -> Result<(), LayerError> {
        self.begun(layer).ready().await.map_err(failed)
    }

    async fn mount(&self, layer: &Binding) -> Result<PathBuf, LayerError> {
        let mounted = self.begun(layer).mount().await.map_err(failed)?;
        Ok(mounted.path)
    }

    fn place(&self, layer: &Binding) -> PathBuf {
        self.begun(layer).place()
    }

    async fn implicit_dirs(&self, layer: &Binding) -> Result<Vec<PathBuf>, LayerError> {
        self.begun(layer).implicit_dirs().await.map_err(failed)
    }

    async fn usage(&self, layer: &Binding) -> Result<Usage, LayerError> {
        let (cache, blob) = (self.cache.clone(), layer.blob.digest);
        let measured = tokio::task::spawn_blocking(move || cache.occupied(blob)).await;
        let measured = measured.map_err(|error| local("measure its files", error))?;
        let (bytes, inodes) = measured.map_err(|error| local("measure its files", error))?;
        Ok(Usage { bytes, inodes })
    }

    fn keep(&self, blob: &Digest) {
        self.kept().entry(*blob).or_insert_with(|| self.cache.pin_layer(*blob));
    }

    async fn release(&self, blob: &Digest) {
        // Before the layer's own: whoever begins it meanwhile keeps it anew.
        drop(self.kept().remove(blob));
        self.layers.release(*blob).await;
        let kept = self.kept();
        // Unless somebody has begun it meanwhile.
        if !kept.contains_key(blob) {
            self.cache.abandon_layer(*blob);
        }
    }
}

impl From<Binding> for LayerSpec {
    fn from(layer: Binding) -> Self {
        let Binding { blob, media_type, diff_id, image, toc_digest } = layer;
        Self { blob, media_type, diff_id, image, toc_digest }
    }
}

fn local(reason: &'static str, error: impl StdError + Send + Sync + 'static) -> LayerError {
    LayerError { blame: LayerBlame::Local, reason, source: Box::new(error) }
}

fn failed(failure: Failure) -> LayerError {
    let blame = blame(&failure.cause);
    LayerError { blame, reason: "make it ready", source: Box::new(Shared(failure)) }
}

/// Bad bytes are the layer's own fault whoever sent them; a failed fetch is its source's.
fn blame(cause: &Cause) -> LayerBlame {
    if let Some(fetch) = fetch_error(cause) {
        return match fetch.blame {
            Blame::Local => LayerBlame::Local,
            Blame::Registry | Blame::Refused => LayerBlame::Source,
        };
    }
    use skimmer_layers::pull::Error as Pull;
    match cause {
        Cause::DiffId { .. } | Cause::Inodes { .. } | Cause::Verify { .. } => LayerBlame::Content,
        Cause::Pull { source } => match source.as_ref() {
            Pull::Digest { .. }
            | Pull::DiffId { .. }
            | Pull::Decode { .. }
            | Pull::Sum { .. }
            | Pull::Tar { .. }
            | Pull::Assemble { .. } => LayerBlame::Content,
            Pull::Fetch { .. } => LayerBlame::Source,
            Pull::Write { .. } | Pull::Stage => LayerBlame::Local,
        },
        Cause::Blob { source: skimmer_cache::blob::Error::Length { .. } }
        | Cause::Blob { source: skimmer_cache::blob::Error::TooLong { .. } } => LayerBlame::Content,
        Cause::Fill { .. } => LayerBlame::Source,
        _ => LayerBlame::Local,
    }
}

/// The source's account, if a fetch is at the bottom of it.
fn fetch_error(cause: &Cause) -> Option<&FetchError> {
    let mut error: Option<&(dyn StdError + 'static)> = Some(cause);
    while let Some(current) = error {
        if let Some(fetch) = current.downcast_ref::<FetchError>() {
            return Some(fetch);
        }
        if let Some(fetch) = current.downcast_ref::<Arc<FetchError>>() {
            return Some(fetch);
        }
        error = current.source();
    }
    None
}

/// The cause of a failure that several wait for, as the error of one; that names layer and image.
#[derive(Debug)]
struct Shared(Failure);

impl std::fmt::Display for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.cause.fmt(f)
    }
}

impl StdError for Shared {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.cause.source()
    }
}
