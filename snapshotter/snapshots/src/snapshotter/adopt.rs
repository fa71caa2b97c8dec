//! The remote protocol: providing a layer instead of letting containerd unpack it.

use std::time::Duration;

use skimmer_proto::{Digest, error_chain};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{info, warn};

use super::{Error, Inner, Snapshotter};
use crate::chain::{self, New};
use crate::folders::Content;
use crate::identify::{Found, Request};
use crate::records::Change;
use crate::snapshot::{REFERENCE_LABEL, REQUIRED_LABEL};
use crate::{Binding, Kind, Labels, Snapshot};

/// How long a layer that a snapshot is bound to may take before other images are asked for it.
const SOON: Duration = Duration::from_millis(200);

/// How far a layer got in the time that a Prepare has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It can be mounted; what there is of it has been proved.
    Ready,
    /// It is on its way: [`LayerStore::mount`](crate::LayerStore::mount) waits.
    Pending,
}

impl Snapshotter {
    /// The name of a committed snapshot that is the layer which `labels` ask for, on `parent`; `None`
    /// if containerd has to unpack it. Fails if the layer itself is bad, or if we don't get it and
    /// the labels say that containerd won't either.
    pub(super) async fn adopt(
        &self,
        key: &str,
        parent: &str,
        labels: &Labels,
    ) -> Result<Option<String>, Error> {
        let reference = labels.get(REFERENCE_LABEL).cloned().unwrap_or_default();
        let required = labels.contains_key(REQUIRED_LABEL);
        let deadline = Instant::now() + self.0.config.prepare_wait;
        let claimed = self.claimed(&reference, parent).await?;
        let bound = match claimed {
            None => None,
            Some((name, None)) => return Ok(Some(name)),
            Some((name, Some(layer))) => {
                self.0.layers.begin(&layer);
                if matches!(timeout(SOON, self.0.layers.ready(&layer)).await, Ok(Ok(()))) {
                    return Ok(Some(name));
                }
                Some((name, layer))
            }
        };
        let mut found = match (self.identify(key, parent, labels).await?, &bound) {
            (Ok(found), _) => found,
            (Err(_), Some(_)) => Vec::new(),
            (Err(source), None) if required => {
                return Err(Error::Unidentified { reference, source });
            }
            (Err(error), None) => {
                let reason = error_chain(&error);
                info!(reference, reason, "containerd unpacks the layer: not identified");
                return Ok(None);
            }
        };
        if let Some((_, layer)) = &bound
            && !found.iter().any(|image| image.layer.blob.digest == layer.blob.digest)
        {
            found.push(Found { layer: layer.clone(), above: Vec::new() });
        }
        let (layer, outcome) = match self.provide(&found, deadline).await {
            Ok(Some(provided)) => provided,
            Ok(None) => return Ok(None),
            Err(error) if required || error.is_bad_layer() => return Err(error),
            Err(error) => {
                let reason = error_chain(&error);
                warn!(reference, reason, "containerd unpacks the layer: we cannot provide it");
                return Ok(None);
            }
        };
        let blob = layer.blob.digest;
        let name = match bound {
            Some((name, _)) => name,
            None => self.enter(&reference, parent, labels, layer.clone()).await?,
        };
        // The snapshot may be bound to another image's blob, which came to nothing or never comes.
        if outcome == Outcome::Ready {
            let name = name.clone();
            self.blocking(move |inner| inner.rebind(&name, layer)).await?;
        }
        self.0.begun.forget(&blob);
        Ok(Some(name))
    }

    /// Commits the snapshot that is `layer`. Answers its name.
    async fn enter(
        &self,
        reference: &str,
        parent: &str,
        labels: &Labels,
        layer: Binding,
    ) -> Result<String, Error> {
        let name = name(reference, parent);
        let new = New {
            name: name.clone(),
            parent: parent.to_owned(),
            kind: Kind::Committed,
            labels: labels.clone(),
            layer: Some(layer),
        };
        match self.blocking(move |inner| inner.insert(new, Content::Owned(None))).await {
            // Another Prepare of the same layer was faster.
            Ok(_) | Err(Error::Chain(chain::Error::Exists(_))) => Ok(name),
            Err(error) => Err(error),
        }
    }

    /// The committed snapshot that claims `reference` on `parent`, with its layer. One with a layer
    /// goes before one that containerd unpacked.
    async fn claimed(
        &self,
        reference: &str,
        parent: &str,
    ) -> Result<Option<(String, Option<Binding>)>, Error> {
        let (reference, parent) = (reference.to_owned(), parent.to_owned());
        self.blocking(move |inner| {
            let mut claimed = None;
            for name in inner.records.claiming(&reference, &parent)? {
                match inner.records.get(&name)? {
                    Some(found) if found.kind != Kind::Committed => {}
                    Some(found) if found.layer.is_some() => return Ok(Some((name, found.layer))),
                    Some(_) => claimed = Some((name, None)),
                    None => {}
                }
            }
            Ok(claimed)
        })
        .await
    }

    /// The images that the request can mean; the inner error says why there is none.
    async fn identify(
        &self,
        key: &str,
        parent: &str,
        labels: &Labels,
    ) -> Result<Result<Vec<Found>, crate::identify::Error>, Error> {
        let below = match parent {
            "" => None,
            _ => {
                let parent = parent.to_owned();
                let found = self.blocking(move |inner| {
                    let found =
                        inner.records.get(&parent)?.ok_or(chain::Error::NoParent(parent))?;
                    Ok(claim(&found).to_owned())
                });
                Some(found.await?)
            }
        };
        let request = match Request::new(key, labels, below.as_deref()) {
            Ok(request) => request,
            Err(error) => return Ok(Err(error)),
        };
        let registry_config = self.0.config.registry_config.as_deref();
        Ok(self.0.finder.find(&request, registry_config).await)
    }

    /// Begins the layers of the images and waits for the wanted one, from one image after the other
    /// if need be. `None` if there is no image. An error: why the best of the layers can't be had; it
    /// is a bad layer's if there is one, since containerd must not take that from elsewhere.
    async fn provide(
        &self,
        found: &[Found],
        deadline: Instant,
    ) -> Result<Option<(Binding, Outcome)>, Error> {
        let mut failed: Option<Error> = None;
        for image in found {
            for layer in std::iter::once(&image.layer).chain(&image.above) {
                self.0.begun.note(layer.blob.digest, std::time::Instant::now());
                self.0.layers.begin(layer);
            }
            match self.wait(&image.layer, deadline).await {
                Ok(outcome) => return Ok(Some((image.layer.clone(), outcome))),
                Err(error) => {
                    if error.is_bad_layer() {
                        self.0.begun.forget(&image.layer.blob.digest);
                        self.0.maybe_unused(image.layer.blob.digest);
                    }
                    failed = Some(failed.filter(Error::is_bad_layer).unwrap_or(error));
                }
            }
        }
        failed.map_or(Ok(None), Err)
    }

    async fn wait(&self, layer: &Binding, deadline: Instant) -> Result<Outcome, Error> {
        match timeout_at(deadline, self.0.layers.ready(layer)).await {
            Ok(Ok(())) => Ok(Outcome::Ready),
            Err(_elapsed) => {
                let (blob, image) = (layer.blob.digest, &layer.image);
                info!(%blob, image, "layer still being fetched: pending");
                Ok(Outcome::Pending)
            }
            Ok(Err(error)) => Err(Error::layer(layer, error)),
        }
    }
}

impl Inner {
    /// Makes `layer` the content of committed snapshot `name`, if another one was.
    fn rebind(&self, name: &str, layer: Binding) -> Result<(), Error> {
        let _lock = self.lock();
        let old = chain::get(self.records.as_ref(), name)?;
        let Some(before) = old.layer.clone().filter(|before| before.blob != layer.blob) else {
            return Ok(());
        };
        let new = Snapshot { layer: Some(layer), ..old.clone() };
        self.replace(Change::Replace { old, new })?;
        self.maybe_unused(before.blob.digest);
        Ok(())
    }
}

/// The chain ID that a snapshot parent claims: by its label, or, as older containerds unpack without
/// labels, by its name, `<namespace>/<number>/<chain ID>`.
fn claim(parent: &Snapshot) -> &str {
    let by_name = || parent.name.splitn(3, '/').nth(2).unwrap_or_default();
    parent.reference().unwrap_or_else(by_name)
}

/// One name for a layer on a parent, whoever asks.
fn name(reference: &str, parent: &str) -> String {
    format!("skimmer/{}", Digest::of(format!("{reference}\0{parent}").as_bytes()).hex())
}
