//! The [covers](crate::implicit) of layers: made when they are first mounted above something.

use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use tracing::debug;

use super::{Error, Inner, Snapshotter};
use crate::folders::Covered;
use crate::implicit::{self, Look, OWN};
use crate::{Binding, Snapshot};

impl Snapshotter {
    /// `lower`, the folders of all `parents` (nearest first), with the covers that layers need.
    pub(super) async fn cover(
        &self,
        parents: &[Snapshot],
        lower: Vec<PathBuf>,
    ) -> Result<Vec<PathBuf>, Error> {
        let above_something =
            |parent: &&Snapshot| parent.layer.is_some() && !parent.parent.is_empty();
        let ids: Vec<_> = parents.iter().filter(above_something).map(|parent| parent.id).collect();
        if ids.is_empty() {
            return Ok(lower);
        }
        let known = self.blocking(move |inner| {
            Ok(ids.iter().map(|id| inner.folders.covered(*id)).collect::<Result<Vec<_>, _>>()?)
        });
        let mut known = known.await?;
        // A cover shows what is below it, other covers too: upwards, then.
        let mut stack = Vec::with_capacity(lower.len() + known.len());
        for (parent, folder) in parents.iter().zip(lower).rev() {
            let cover = match &parent.layer {
                Some(layer) if !parent.parent.is_empty() => match known.pop() {
                    None | Some(Covered::Unknown) => {
                        self.cover_layer(parent.id, layer, &folder, &stack).await?
                    }
                    Some(Covered::Bare) => None,
                    Some(Covered::By(cover)) => Some(cover),
                },
                _ => None,
            };
            stack.push(folder);
            stack.extend(cover);
        }
        stack.reverse();
        Ok(stack)
    }

    /// Makes the cover of snapshot `id`, whose layer is mounted at `folder`; `below` has the folders
    /// that it is stacked on, nearest last.
    async fn cover_layer(
        &self,
        id: u64,
        layer: &Binding,
        folder: &Path,
        below: &[PathBuf],
    ) -> Result<Option<PathBuf>, Error> {
        let implicit = self.0.layers.implicit_dirs(layer).await;
        let implicit = implicit.map_err(|source| Error::layer(layer, source))?;
        let layer = layer.clone();
        let mut folders = vec![folder.to_owned()];
        folders.extend(below.iter().rev().cloned());
        self.blocking(move |inner| inner.make_cover(id, &layer, &implicit, &folders)).await
    }
}

impl Inner {
    fn make_cover(
        &self,
        id: u64,
        layer: &Binding,
        implicit: &[PathBuf],
        folders: &[PathBuf],
    ) -> Result<Option<PathBuf>, Error> {
        let _one = self.covering.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else may have made it meanwhile.
        if self.folders.covered(id)? == Covered::Unknown {
            let failed = |source| Error::cover(layer, source);
            let mut look = |at: usize, path: &Path| implicit::look(&folders[at], path);
            let mut cover = implicit::plan(implicit, folders.len(), &mut look).map_err(failed)?;
            let new = self.folders.new_cover(id)?;
            if cover.is_empty() {
                // Mounts that were answered before this was known stack it all the same.
                if let Look::Dir { attributes, .. } = look(OWN, Path::new("")).map_err(failed)? {
                    cover.push((PathBuf::new(), attributes));
                }
            } else {
                let (blob, dirs) = (layer.blob.digest, cover.len());
                debug!(%blob, dirs, at = %folders[OWN].display(), "covered directories that the layer leaves out");
            }
            implicit::make(&cover, &new).map_err(failed)?;
            self.folders.keep_cover(id)?;
        }
        match self.folders.covered(id)? {
            Covered::By(cover) => Ok(Some(cover)),
            Covered::Bare | Covered::Unknown => Ok(None),
        }
    }
}
