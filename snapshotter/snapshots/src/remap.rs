//! Lower folders as a container in a user namespace is to see them: clones of mounts with its ids.
//!
//! `<root>/<snapshot id>/lower/<name>` is a read-only clone of a folder (a mounted layer, a cover, an
//! ordinary snapshot parent's content) whose files belong to the container's users. Plain overlay
//! options name the clones; no version of containerd has to map anything.
//!
//! Owns: these mounts and their mount points.
//! Does not own: the snapshots' folders, in which they are, nor when a snapshot goes.
//!
//! Invariants:
//! - One name, one source and one mapping, as long as the process lives: layers' mounts and folders
//!   don't use a number twice.
//! - What a predecessor left mounted is gone before the first clone, since its layers may be dead. Containers keep what
//!   is mounted over them: overlayfs has clones of its own.
//! - A clone that is gone has no folder: whoever was told of it and mounts only now gets an error, not an empty one.
//! - Clones are read-only: whatever is deleted by mistake, no snapshot parent loses files.

mod kernel;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use skimmer_layers::mount::{info, version};
use tracing::info;

use crate::idmap::Mapping;

/// FUSE mounts can be mapped from this version of Linux on (fs/fuse: `FUSE_ALLOW_IDMAP`).
const SINCE: (u32, u32) = (6, 12);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("look at {path}")]
    Look { path: PathBuf, source: io::Error },
    #[error("make a user namespace with the container's ids")]
    Namespace(#[source] kernel::Error),
    #[error("make mount point {path}")]
    Point { path: PathBuf, source: io::Error },
    #[error("mount {path} with a container's ids at {at}")]
    Mount { path: PathBuf, at: PathBuf, source: kernel::Error },
    #[error("unmount {path}")]
    Unmount { path: PathBuf, source: io::Error },
}

/// Whether this kernel can do it for all kinds of lower folders.
pub fn supported() -> bool {
    nix::sys::utsname::uname().is_ok_and(|name| version(&name.release().to_string_lossy()) >= SINCE)
}

/// The mapped lower folders of all snapshots.
pub struct Remaps {
    root: PathBuf,
    made: Mutex<BTreeMap<u64, Made>>,
}

/// The clones of one snapshot.
struct Made {
    mapping: Mapping,
    places: BTreeSet<PathBuf>,
}

impl Remaps {
    /// For the snapshots under `root`; unmounts what an earlier process left.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let path = Path::new("/proc/self/mountinfo");
        let look = |path: &Path| {
            let path = path.to_owned();
            |source| Error::Look { path, source }
        };
        let real = root.canonicalize().map_err(look(root))?;
        let text = fs::read(path).map_err(look(path))?;
        let left: Vec<_> = info::parse(&text).collect();
        for line in left.into_iter().rev().filter(|line| is_clone(&real, &line.mount_point)) {
            info!(path = %line.mount_point.display(), "unmounting what an earlier process left");
            unmount(&line.mount_point)?;
        }
        Ok(Self { root: root.to_owned(), made: Mutex::default() })
    }

    /// Where the clone of `source` for snapshot `id` is, once made.
    pub fn place(&self, id: u64, source: &Path) -> PathBuf {
        // `m/7` is a layer's mount, `7/fs` a snapshot's content.
        let mut names = source.iter().rev().map(|name| name.to_string_lossy());
        let last = names.next().unwrap_or_default();
        let name = names.next().map_or_else(|| last.to_string(), |above| format!("{above}-{last}"));
        self.points(id).join(name)
    }

    /// Makes the clones of `sources` for snapshot `id` that aren't there yet.
    pub fn make(&self, id: u64, mapping: &Mapping, sources: &[PathBuf]) -> Result<(), Error> {
        if self.made().get(&id).is_some_and(|made| made.mapping != *mapping) {
            self.clear(id)?;
        }
        let mut all = self.made();
        let made = all
            .entry(id)
            .or_insert_with(|| Made { mapping: mapping.clone(), places: BTreeSet::new() });
        let missing: Vec<_> = sources
            .iter()
            .map(|source| (source, self.place(id, source)))
            .filter(|(_, place)| !made.places.contains(place))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let users = kernel::user_namespace(mapping).map_err(Error::Namespace)?;
        for (source, at) in missing {
            fs::create_dir_all(&at).map_err(|source| Error::Point { path: at.clone(), source })?;
            kernel::mount_mapped(source, &at, &users).map_err(|error| Error::Mount {
                path: source.clone(),
                at: at.clone(),
                source: error,
            })?;
            made.places.insert(at);
        }
        Ok(())
    }

    /// Takes the clones of snapshot `id` away; who mounted something over them keeps that.
    pub fn clear(&self, id: u64) -> Result<(), Error> {
        let mut all = self.made();
        let Some(made) = all.get_mut(&id) else { return Ok(()) };
        while let Some(place) = made.places.first() {
            unmount(place)?;
            made.places.pop_first();
        }
        all.remove(&id);
        Ok(())
    }

    fn points(&self, id: u64) -> PathBuf {
        self.root.join(id.to_string()).join("lower")
    }

    fn made(&self) -> MutexGuard<'_, BTreeMap<u64, Made>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether `path` is `<root>/<id>/lower/<name>`, maybe of a removed snapshot.
fn is_clone(root: &Path, path: &Path) -> bool {
    let Ok(below) = path.strip_prefix(root) else { return false };
    let below = below.strip_prefix("removed").unwrap_or(below);
    let names: Vec<_> = below.iter().collect();
    matches!(names[..], [id, lower, _] if id != "m" && lower == "lower")
}

/// Unmounts the clone at `path` and removes its mount point.
fn unmount(path: &Path) -> Result<(), Error> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // Somebody else did.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => return Err(Error::Unmount { path: path.to_owned(), source: errno.into() }),
    }
    // What isn't empty was not made here, and shows itself.
    let _ = fs::remove_dir(path);
    Ok(())
}
