//! The mounts of one snapshot, with its id mapping where that is our part.

use std::path::PathBuf;

use super::{Error, Inner, Snapshotter};
use crate::idmap::Mapping;
use crate::mounts::{self, Mount, distinct};
use crate::{Snapshot, chain, remap};

/// The contents of a snapshot's parents, nearest first.
pub(super) enum Lower {
    /// They are there, with the covers that `parents` need.
    Ready { folders: Vec<PathBuf>, parents: Vec<Snapshot> },
    /// They will be there, with all covers that the layers may need.
    Pending(Vec<PathBuf>),
}

impl Snapshotter {
    /// The mounts of `snapshot` over `lower`.
    pub(super) async fn mounted(
        &self,
        snapshot: &Snapshot,
        lower: Lower,
    ) -> Result<Vec<Mount>, Error> {
        let mapping = Mapping::of(&snapshot.labels)
            .map_err(|source| Error::IdMapping { name: snapshot.name.clone(), source })?;
        let Some(mapping) = mapping else {
            return Ok(self.0.mounts(snapshot, lower.folders(), false));
        };
        if !self.0.content.leaves_ids_to_us().await.map_err(Error::Capability)? {
            return Ok(self.0.mounts(snapshot, lower.folders(), false));
        }
        if !remap::supported() {
            // A containerd that knows these options may be able to follow them.
            return Ok(self.0.mounts(snapshot, lower.folders(), true));
        }
        let snapshot = snapshot.clone();
        self.blocking(move |inner| {
            let lower = match lower {
                Lower::Pending(places) => places,
                Lower::Ready { folders, parents } => {
                    inner.map(&snapshot, &mapping, &folders, &parents)?;
                    folders
                }
            };
            let place = |folder: &PathBuf| inner.remaps.place(snapshot.id, folder);
            let lower = distinct(&lower).into_iter().map(place).collect();
            Ok(inner.mounts(&snapshot, lower, false))
        })
        .await
    }
}

impl Lower {
    fn folders(self) -> Vec<PathBuf> {
        match self {
            Self::Ready { folders, .. } | Self::Pending(folders) => folders,
        }
    }
}

impl Inner {
    /// Mounts `folders` with the ids of `mapping` for the snapshot.
    fn map(
        &self,
        snapshot: &Snapshot,
        mapping: &Mapping,
        folders: &[PathBuf],
        parents: &[Snapshot],
    ) -> Result<(), Error> {
        let mut sources: Vec<PathBuf> = distinct(folders).into_iter().cloned().collect();
        // Mounts answered before it was known that a layer needs no cover stack an empty one.
        let covers = parents.iter().filter(|parent| parent.layer.is_some());
        sources.extend(
            covers
                .filter(|parent| self.folders.has_content(parent.id))
                .map(|parent| self.folders.content(parent.id))
                .filter(|cover| !folders.contains(cover)),
        );
        let _lock = self.lock();
        // It may be gone meanwhile.
        chain::get(self.records.as_ref(), &snapshot.name)?;
        self.remaps
            .make(snapshot.id, mapping, &sources)
            .map_err(|source| Error::Remap { name: snapshot.name.clone(), source })
    }

    fn mounts(&self, snapshot: &Snapshot, lower: Vec<PathBuf>, remap: bool) -> Vec<Mount> {
        let folders = mounts::Folders {
            upper: self.folders.content(snapshot.id),
            work: self.folders.work(snapshot.id),
            lower,
        };
        mounts::mounts(snapshot.kind, &snapshot.labels, &folders, remap)
    }
}
