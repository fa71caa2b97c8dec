//! New snapshots, and the mounts of those that exist.
//!
//! containerd makes snapshots under a lock that its garbage collection waits for: making one waits for
//! its layers only for `prepare_wait`. One on layers that take longer is answered with mounts that name
//! paths which don't exist yet: used too early they fail, they never show an empty tree. Mounts, which
//! clients ask for outside that lock, waits for `deadline`.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout_at};
use tracing::{debug, info, warn};

use super::mapped::Lower;
use super::{Error, Inner, Snapshotter};
use crate::chain::{self, New};
use crate::folders::{Content, Covered, Folders};
use crate::mounts::Mount;
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
        let (known, nearest) = (snapshot.clone(), lower.first().cloned());
        let complete = move |inner: &Inner| {
            inner.complete(&known, nearest.as_ref())?;
            inner.forget_lost(&known);
            Ok(())
        };
        self.blocking(complete).await?;
        self.mounted(&snapshot, Lower::Ready { folders: lower, parents }).await
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
        let lower = match self.lower(&parents, self.0.config.prepare_wait).await {
            Err(Error::Pending { .. }) => return self.create_pending(new, parents).await,
            lower => lower?,
        };
        let (nearest, name) = (lower.first().cloned(), new.name.clone());
        let insert = move |inner: &Inner| {
            let owner = owner(&new.name, &new.labels, nearest.as_ref())?;
            inner.insert(new, Content::Owned(owner))
        };
        let snapshot = self.blocking(insert).await?;
        let mounts = self.mounted(&snapshot, Lower::Ready { folders: lower, parents }).await;
        // containerd takes it that there is none if it is told of an error.
        if mounts.is_err()
            && let Err(error) = self.remove(name).await
        {
            let error = &error as &dyn std::error::Error;
            warn!(error, "a snapshot that cannot be mounted stays");
        }
        mounts
    }

    /// A snapshot on layers that are on their way, and the mounts that it will have.
    async fn create_pending(&self, new: New, parents: Vec<Snapshot>) -> Result<Vec<Mount>, Error> {
        let insert = move |inner: &Inner| {
            let lower = inner.places(&parents)?;
            let owner = owner(&new.name, &new.labels, None)?;
            let content = if owner.is_some() { Content::Owned(owner) } else { Content::Later };
            Ok((inner.insert(new, content)?, lower))
        };
        let (snapshot, lower) = self.blocking(insert).await?;
        let key = snapshot.name.clone();
        info!(key, "made on layers still being fetched: its mounts will be there when they are");
        let this = self.clone();
        tokio::spawn(async move {
            if let Err(error) = this.mounts(key).await {
                // Whoever asks for the mounts is told.
                debug!(error = &error as &dyn std::error::Error, "mounts not made ahead");
            }
        });
        self.mounted(&snapshot, Lower::Pending(lower)).await
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
    /// Makes a snapshot: folder first, then the record in the database.
    pub(super) fn insert(&self, new: New, content: Content) -> Result<Snapshot, Error> {
        let _lock = self.lock();
        let snapshot = chain::create(self.records.as_ref(), SystemTime::now(), new)?;
        self.folders.create(&snapshot, content)?;
        if let Err(error) = self.records.apply(&Change::Create(snapshot.clone())) {
            if let Err(left) = self.folders.discard(snapshot.id) {
                warn!(
                    snapshot = snapshot.name,
                    error = &left as &dyn std::error::Error,
                    "the folder of a snapshot that could not be recorded stays, and is one after the next start"
                );
            }
            return Err(error.into());
        }
        Ok(snapshot)
    }

    /// Makes what [`Content::Later`] left out. `nearest` is the folder of the snapshot parent.
    fn complete(&self, snapshot: &Snapshot, nearest: Option<&PathBuf>) -> Result<(), Error> {
        if self.folders.has_content(snapshot.id) {
            return Ok(());
        }
        let owner = owner(&snapshot.name, &snapshot.labels, nearest)?;
        let _lock = self.lock();
        // It may be gone meanwhile.
        chain::get(self.records.as_ref(), &snapshot.name)?;
        Ok(self.folders.complete(snapshot.id, owner)?)
    }

    /// Where the contents of `parents` (nearest first) will be, with the covers that layers may need.
    fn places(&self, parents: &[Snapshot]) -> Result<Vec<PathBuf>, Error> {
        let mut places = Vec::with_capacity(parents.len());
        for parent in parents {
            let Some(layer) = &parent.layer else {
                places.push(self.folders.content(parent.id));
                continue;
            };
            if !parent.parent.is_empty() && self.folders.covered(parent.id)? != Covered::Bare {
                places.push(self.folders.content(parent.id));
            }
            places.push(self.layers.place(layer));
        }
        Ok(places)
    }
}

/// Who owns the content of a new snapshot: whoever its labels say, or the owner of `nearest`, the root of
/// its snapshot parent.
fn owner(
    name: &str,
    labels: &Labels,
    nearest: Option<&PathBuf>,
) -> Result<Option<(u32, u32)>, Error> {
    let mapped = idmap::owner(labels)
        .map_err(|source| Error::IdMapping { name: name.to_owned(), source })?;
    Ok(match (mapped, nearest) {
        (Some(owner), _) => Some(owner),
        (None, Some(nearest)) => Some(Folders::owner(nearest)?),
        (None, None) => None,
    })
}
