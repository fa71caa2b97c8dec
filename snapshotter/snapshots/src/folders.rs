//! Snapshots on disk: one folder each, with the snapshot's own record in it.
//!
//! Under the root (`<root>/snapshots`):
//! - `<id>/record`: the [`Snapshot`] in JSON; `<id>/record.old`: the one before the last change; `<id>/fs`: its content; `<id>/work`: overlayfs's own;
//!   a snapshot whose content is a layer has the record and, in `fs`, the layer's
//!   [cover](crate::implicit), empty if it needs none; `<id>/fs.new`: an `fs` being made;
//! - `new/<id>`: being made; `removed/<id>`: to be deleted; `m/`: the mounts of layers.
//!
//! Owns: these folders, except `m/`.
//! Does not own: the look-ups, which are the [records](crate::records)'.
//!
//! Invariants:
//! - A folder appears under its id whole, its record first.
//! - The record in a folder is written before the database's; a folder goes before the database
//!   forgets it. So the folders say which snapshots there are.
//! - A cover appears whole, and doesn't change.
//! - Content appears with its owner; a snapshot made before that was known gets it later.

#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::{Kind, Snapshot, usage};

/// A record is at most what a gRPC message may carry.
const MAX_RECORD: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the snapshot folder {0} holds a ':' or ',', which overlayfs cannot be told about")]
    Root(PathBuf),
    #[error("make folder {path}")]
    Make { path: PathBuf, source: io::Error },
    #[error("give folder {path} to user {uid}, group {gid}")]
    Own { path: PathBuf, uid: u32, gid: u32, source: io::Error },
    #[error("look at folder {path}")]
    Look { path: PathBuf, source: io::Error },
    #[error("write snapshot record {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("read snapshot record {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("decode snapshot record {path}")]
    Decode { path: PathBuf, source: serde_json::Error },
    #[error("move folder {from} to {to}")]
    Move { from: PathBuf, to: PathBuf, source: io::Error },
    #[error("list folder {path}")]
    List { path: PathBuf, source: io::Error },
    #[error("delete folder {path}")]
    Delete { path: PathBuf, source: io::Error },
    #[error("measure folder {path}")]
    Measure { path: PathBuf, source: io::Error },
}

/// Whether a layer's [cover](crate::implicit) is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Covered {
    /// Nobody has looked yet what it needs.
    Unknown,
    /// It needs none.
    Bare,
    /// To be stacked above the layer.
    By(PathBuf),
}

/// What a new snapshot starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// An empty folder of this user and group; `None`: ours.
    Owned(Option<(u32, u32)>),
    /// Nothing: whose it is will be known when the snapshot parents can be looked at.
    Later,
}

pub struct Folders {
    root: PathBuf,
    /// Held while `removed/` is being emptied, so that two sweeps don't trip over each other.
    sweep: Mutex<()>,
}

impl Folders {
    /// Opens (or makes) the folders under `root`, and clears away what a crash left half made.
    pub fn open(root: &Path) -> Result<Self, Error> {
        if root.to_string_lossy().contains([':', ',']) {
            return Err(Error::Root(root.to_owned()));
        }
        let this = Self { root: root.to_owned(), sweep: Mutex::new(()) };
        for path in [root.to_owned(), this.new_folder(), this.removed_folder()] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|source| Error::Make { path, source })?;
        }
        for path in list(&this.new_folder())? {
            this.set_aside(&path)?;
        }
        Ok(this)
    }

    /// The folder that holds what the snapshot itself changed.
    pub fn content(&self, id: u64) -> PathBuf {
        self.folder(id).join("fs")
    }

    pub fn work(&self, id: u64) -> PathBuf {
        self.folder(id).join("work")
    }

    /// Makes the snapshot's folder, its record in it, its content as `content` says.
    pub fn create(&self, snapshot: &Snapshot, content: Content) -> Result<(), Error> {
        let new = self.new_folder().join(snapshot.id.to_string());
        if new.exists() {
            self.set_aside(&new)?;
        }
        make(&new, 0o700)?;
        write_record(&new, snapshot)?;
        if snapshot.layer.is_none() {
            if let Content::Owned(owner) = content {
                make_owned(&new.join("fs"), owner)?;
            }
            if snapshot.kind == Kind::Active {
                make(&new.join("work"), 0o711)?;
            }
        }
        rename(&new, &self.folder(snapshot.id))?;
        let synced = File::open(&self.root).and_then(|root| root.sync_all());
        synced.map_err(|source| Error::Make { path: self.folder(snapshot.id), source })
    }

    pub fn has_content(&self, id: u64) -> bool {
        self.content(id).exists()
    }

    /// Makes the content that [`Content::Later`] left out, unless it is there. One caller at a time.
    pub fn complete(&self, id: u64, owner: Option<(u32, u32)>) -> Result<(), Error> {
        if self.has_content(id) {
            return Ok(());
        }
        make_owned(&self.new_cover(id)?, owner)?;
        self.keep_cover(id)
    }

    /// What there is of the cover of snapshot `id`, whose content is a layer.
    pub fn covered(&self, id: u64) -> Result<Covered, Error> {
        let path = self.content(id);
        match fs::read_dir(&path).map(|mut entries| entries.next().is_some()) {
            Ok(true) => Ok(Covered::By(path)),
            Ok(false) => Ok(Covered::Bare),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Covered::Unknown),
            Err(source) => Err(Error::List { path, source }),
        }
    }

    /// An empty folder to make the cover of snapshot `id` in. One caller at a time.
    pub fn new_cover(&self, id: u64) -> Result<PathBuf, Error> {
        let path = self.folder(id).join("fs.new");
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => {
                removed.map_err(|source| Error::Delete { path: path.clone(), source })?;
            }
        }
        make(&path, 0o755)?;
        Ok(path)
    }

    /// Puts the cover made in [`Folders::new_cover`] in its place.
    pub fn keep_cover(&self, id: u64) -> Result<(), Error> {
        rename(&self.folder(id).join("fs.new"), &self.content(id))
    }

    /// Replaces the record in the snapshot's folder.
    pub fn record(&self, snapshot: &Snapshot) -> Result<(), Error> {
        let folder = self.folder(snapshot.id);
        let (path, old) = (folder.join("record"), folder.join("record.old"));
        // A disk without room for the name keeps the change from being taken back, no more.
        let _ = fs::remove_file(&old);
        let _ = fs::hard_link(&path, &old);
        write_record(&folder, snapshot)
    }

    /// Takes the last change of the record back; needs no room on the disk.
    pub fn undo_record(&self, id: u64) -> Result<(), Error> {
        let folder = self.folder(id);
        rename(&folder.join("record.old"), &folder.join("record"))
    }

    pub fn has_record(&self, id: u64) -> bool {
        self.folder(id).join("record").exists()
    }

    /// Takes the snapshot's folder away, to be [deleted](Folders::delete) later: one rename. Answers
    /// where it is.
    pub fn discard(&self, id: u64) -> Result<PathBuf, Error> {
        self.set_aside(&self.folder(id))
    }

    /// Puts a discarded folder back.
    pub fn reinstate(&self, id: u64, discarded: &Path) -> Result<(), Error> {
        rename(discarded, &self.folder(id))
    }

    /// What was discarded and isn't deleted yet.
    pub fn discarded(&self) -> Result<Vec<PathBuf>, Error> {
        list(&self.removed_folder())
    }

    /// Deletes folders that were discarded, all that can be; the error is the last one.
    pub fn delete(&self, discarded: Vec<PathBuf>) -> Result<(), Error> {
        let _one = self.sweep.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failed = Ok(());
        for path in discarded {
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => failed = Err(Error::Delete { path, source }),
                Ok(()) => {}
            }
        }
        failed
    }

    /// User and group that own the root of a tree: a snapshot's content or a mounted layer.
    pub fn owner(path: &Path) -> Result<(u32, u32), Error> {
        let found =
            fs::metadata(path).map_err(|source| Error::Look { path: path.to_owned(), source })?;
        Ok((found.uid(), found.gid()))
    }

    /// Space that the snapshot's own content takes.
    pub fn usage(&self, id: u64) -> Result<crate::Usage, Error> {
        let path = self.content(id);
        match usage::measure(&path) {
            // Not made yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(crate::Usage::default()),
            measured => measured.map_err(|source| Error::Measure { path, source }),
        }
    }

    /// Ids of all snapshot folders, ascending.
    pub fn ids(&self) -> Result<Vec<u64>, Error> {
        let mut ids: Vec<u64> = list(&self.root)?
            .iter()
            .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// The highest id that a folder has, discarded or not; 0: there is none.
    pub fn last_id(&self) -> Result<u64, Error> {
        let all = [list(&self.root)?, list(&self.removed_folder())?].concat();
        let id = |path: &PathBuf| path.file_name()?.to_str()?.split('.').next()?.parse().ok();
        Ok(all.iter().filter_map(id).max().unwrap_or(0))
    }

    /// The record that the snapshot's folder holds.
    pub fn read(&self, id: u64) -> Result<Snapshot, Error> {
        let path = self.folder(id).join("record");
        let text = File::open(&path).and_then(|file| {
            let mut text = Vec::new();
            io::Read::read_to_end(&mut io::Read::take(file, MAX_RECORD), &mut text)?;
            Ok(text)
        });
        let text = text.map_err(|source| Error::Read { path: path.clone(), source })?;
        serde_json::from_slice(&text).map_err(|source| Error::Decode { path, source })
    }

    fn folder(&self, id: u64) -> PathBuf {
        self.root.join(id.to_string())
    }

    fn new_folder(&self) -> PathBuf {
        self.root.join("new")
    }

    fn removed_folder(&self) -> PathBuf {
        self.root.join("removed")
    }

    /// Moves a folder into `removed/`, under a name that is free there.
    fn set_aside(&self, path: &Path) -> Result<PathBuf, Error> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut target = self.removed_folder().join(&name);
        let mut attempt = 0u32;
        while target.exists() {
            attempt += 1;
            target = self.removed_folder().join(format!("{name}.{attempt}"));
        }
        rename(path, &target)?;
        Ok(target)
    }
}

fn write_record(folder: &Path, snapshot: &Snapshot) -> Result<(), Error> {
    let path = folder.join("record");
    let new = folder.join("record.new");
    let text = serde_json::to_vec(snapshot)
        .map_err(|source| Error::Write { path: path.clone(), source: source.into() })?;
    let written = File::create(&new).and_then(|mut file| {
        file.write_all(&text)?;
        file.sync_data()?;
        fs::rename(&new, &path)
    });
    written.map_err(|source| Error::Write { path, source })
}

/// Makes a folder with exactly this mode, whatever the umask.
fn make(path: &Path, mode: u32) -> Result<(), Error> {
    let made = fs::create_dir(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)));
    made.map_err(|source| Error::Make { path: path.to_owned(), source })
}

/// Makes the folder, or takes the one that is there, for this owner.
fn make_owned(path: &Path, owner: Option<(u32, u32)>) -> Result<(), Error> {
    if !path.exists() {
        make(path, 0o755)?;
    }
    let Some((uid, gid)) = owner else { return Ok(()) };
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).map_err(|source| Error::Own {
        path: path.to_owned(),
        uid,
        gid,
        source,
    })
}

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    fs::rename(from, to).map_err(|source| Error::Move {
        from: from.to_owned(),
        to: to.to_owned(),
        source,
    })
}

fn list(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let paths = fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>());
    paths.map_err(|source| Error::List { path: path.to_owned(), source })
}
