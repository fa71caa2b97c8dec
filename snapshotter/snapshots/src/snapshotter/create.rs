//! New snapshots, and the mounts of those that exist.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout_at};
use tracing::warn;

use super::{Error, Inner, Snapshotter};
use crate::chain::{self, New};
use crate::folders::Folders;
use crate::mounts::{self, Mount, mounts};
use crate::records::Change;
use crate::snapshot::REFERENCE_LABEL;
use crate::{Kind, Labels, Snapshot, idmap};

/// What Prepare made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prepared {
    /// A writable snapshot, to be mounted like this.
    Mounts(Vec<Mount>),
    /// Nothing: the layer that containerd was about to unpack is there already, committed under
    /// this name.
    Exists(String),
}

impl Snapshotter {
    /// A writable snapshot on `parent` (empty: on nothing) — or, if the labels ask for a layer that
    /// we can provide ourselves, that layer.
    pub async fn prepare(
        &self,
        key: String,
        parent: String,
        labels: Labels,
    ) -> Result<Prepared, Error> {
        if labels.contains_key(REFERENCE_LABEL)
            && let Some(name) = self.adopt(&key, &parent, &labels).await?
        {
            self.0.metrics.prepared("lazy");
            return Ok(Prepared::Exists(name));
        }
        self.0.metrics.prepared("mounts");
        let new = New { name: key, parent, kind: Kind::Active, labels, layer: None };
        Ok(Prepared::Mounts(self.create(new).await?))
    }

    /// A read-only snapshot of `parent`.
    pub async fn view(
        &self,
        key: String,
        parent: String,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        self.0.metrics.prepared("view");
        self.create(New { name: key, parent, kind: Kind::View, labels, layer: None }).await
    }

    /// How to mount view or active snapshot `key`; waits for its layers.
    pub async fn mounts(&self, key: String) -> Result<Vec<Mount>, Error> {
        let (snapshot, parents) =
            self.blocking(move |inner| Ok(chain::mountable(inner.records.as_ref(), &key)?)).await?;
        let lower = self.lower(&parents, self.0.config.deadline).await?;
        self.mounted(&snapshot, lower).await
    }

    /// The mounts of `snapshot` over `lower`, with its id mapping if that is our part.
    async fn mounted(&self, snapshot: &Snapshot, lower: Vec<PathBuf>) -> Result<Vec<Mount>, Error> {
        let mapped = !idmap::options(&snapshot.labels).is_empty();
        let remap = mapped && self.0.content.leaves_ids_to_us().await.map_err(Error::Capability)?;
        Ok(self.0.mounts(snapshot, lower, remap))
    }

    async fn create(&self, new: New) -> Result<Vec<Mount>, Error> {
        // Refused requests shall not wait for layers.
        let wanted = new.clone();
        let parents = self
            .blocking(move |inner| {
                let records = inner.records.as_ref();
                chain::create(records, SystemTime::now(), wanted.clone())?;
                Ok(chain::parents(records, &wanted.parent)?)
            })
            .await?;
        let lower = self.lower(&parents, self.0.config.prepare_wait).await?;
        let nearest = lower.first().cloned();
        let snapshot = self.blocking(move |inner| inner.insert(new, nearest.as_ref())).await?;
        self.mounted(&snapshot, lower).await
    }

    /// The folders of the snapshot parents, all mountable, with the covers of layers.
    async fn lower(&self, parents: &[Snapshot], wait: Duration) -> Result<Vec<PathBuf>, Error> {
        for layer in parents.iter().filter_map(|parent| parent.layer.as_ref()) {
            self.0.layers.begin(layer);
        }
        let deadline = Instant::now() + wait;
        let mut lower = Vec::with_capacity(parents.len());
        for parent in parents {
            lower.push(match &parent.layer {
                None => self.0.folders.content(parent.id),
                Some(layer) => timeout_at(deadline, self.0.layers.mount(layer))
                    .await
                    .map_err(|_| Error::pending(layer, wait))?
                    .map_err(|source| Error::layer(layer, source))?,
            });
        }
        self.cover(parents, lower).await
    }
}

impl Inner {
    /// Makes a snapshot: folder first, then the record in the database. `nearest` is the folder of
    /// its snapshot parent, whose root's owner it takes on.
    pub(super) fn insert(&self, new: New, nearest: Option<&PathBuf>) -> Result<Snapshot, Error> {
        let mapped = idmap::owner(&new.labels)
            .map_err(|source| Error::IdMapping { name: new.name.clone(), source })?;
        let owner = match (mapped, nearest) {
            (Some(owner), _) => Some(owner),
            (None, Some(nearest)) => Some(Folders::owner(nearest)?),
            (None, None) => None,
        };
        let _lock = self.lock();
        let snapshot = chain::create(self.records.as_ref(), SystemTime::now(), new)?;
        self.folders.create(&snapshot, owner)?;
        if let Err(error) = self.records.apply(&Change::Create(snapshot.clone())) {
            if let Err(left) = self.folders.discard(snapshot.id) {
                warn!(
                    snapshot = snapshot.name,
                    error = &left as &dyn std::error::Error,
                    "the folder of a snapshot that could not be recorded stays until the next start"
                );
            }
            return Err(error.into());
        }
        Ok(snapshot)
    }

    fn mounts(&self, snapshot: &Snapshot, lower: Vec<PathBuf>, remap: bool) -> Vec<Mount> {
        let folders = mounts::Folders {
            upper: self.folders.content(snapshot.id),
            work: self.folders.work(snapshot.id),
            lower,
        };
        mounts(snapshot.kind, &snapshot.labels, &folders, remap)
    }
}
