//! Looking at the folders of layers, and making a cover.

#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::{Attributes, Cover, Look};

/// Linux's bound on one extended attribute and on the list of their names.
const MAX_XATTR: usize = 64 << 10;

/// overlayfs's mark on a directory that hides what is below it: the value `y`.
const OPAQUE: &str = "trusted.overlay.opaque";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("look at {path}")]
    Look { path: PathBuf, source: io::Error },
    #[error("read the extended attributes of {path}")]
    Xattrs { path: PathBuf, source: io::Error },
    #[error("make directory {path}")]
    Make { path: PathBuf, source: io::Error },
    #[error("set the {what} of directory {path}")]
    Set { what: &'static str, path: PathBuf, source: io::Error },
}

/// What `folder` has at `path`, whose ancestors are directories in it. Follows no symbolic links and
/// opens nothing.
pub fn look(folder: &Path, path: &Path) -> Result<Look, Error> {
    let at = join(folder, path);
    let found = match fs::symlink_metadata(&at) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Look::Absent),
        found => found.map_err(|source| Error::Look { path: at.clone(), source })?,
    };
    if !found.is_dir() {
        return Ok(Look::Other);
    }
    let failed = |source: Errno| Error::Xattrs { path: at.clone(), source: source.into() };
    let opaque = xattr(&at, OPAQUE.as_ref()).map_err(failed)?.is_some_and(|value| value == b"y");
    let mut attributes = Attributes {
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
        mtime: (found.mtime(), found.mtime_nsec()),
        ..Attributes::default()
    };
    for name in xattr_names(&at).map_err(failed)? {
        if let Some(value) = xattr(&at, &name).map_err(failed)? {
            attributes.xattrs.insert(name, value);
        }
    }
    Ok(Look::Dir { attributes, opaque })
}

/// Makes the cover in `root`, an empty folder.
pub fn make(cover: &Cover, root: &Path) -> Result<(), Error> {
    for (path, _) in cover.iter().filter(|(path, _)| !path.as_os_str().is_empty()) {
        let path = root.join(path);
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|source| Error::Make { path, source })?;
    }
    // A directory's time changes with what is made in it, and what is made in it can inherit.
    for (path, attributes) in cover.iter().rev() {
        let path = join(root, path);
        set(&path, attributes).map_err(|(what, source)| Error::Set { what, path, source })?;
    }
    Ok(())
}

/// Gives the directory `path` its metadata; a failure with what could not be set.
fn set(path: &Path, attributes: &Attributes) -> Result<(), (&'static str, io::Error)> {
    let Attributes { mode, uid, gid, mtime, xattrs } = attributes;
    std::os::unix::fs::lchown(path, Some(*uid), Some(*gid)).map_err(|e| ("owner", e))?;
    for (name, value) in xattrs {
        match rustix::fs::lsetxattr(path, name.as_os_str(), value, XattrFlags::empty()) {
            // The disk's file system has no such attributes.
            Err(Errno::NOTSUP) => {}
            set => set.map_err(|e| ("extended attributes", e.into()))?,
        }
    }
    // After the access control list, of which it is a part.
    fs::set_permissions(path, fs::Permissions::from_mode(*mode)).map_err(|e| ("mode", e))?;
    let time = Timespec { tv_sec: mtime.0, tv_nsec: mtime.1 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| ("times", e.into()))
}

/// Names of the attributes to be copied.
fn xattr_names(path: &Path) -> Result<Vec<OsString>, Errno> {
    let mut list = vec![0; MAX_XATTR];
    let len = match rustix::fs::llistxattr(path, list.as_mut_slice()) {
        Err(Errno::NOTSUP) => 0,
        len => len?,
    };
    let names = list[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let copied = names.filter(|name| !name.starts_with(b"trusted."));
    Ok(copied.map(|name| OsStr::from_bytes(name).to_owned()).collect())
}

fn xattr(path: &Path, name: &OsStr) -> Result<Option<Vec<u8>>, Errno> {
    let mut value = vec![0; MAX_XATTR];
    match rustix::fs::lgetxattr(path, name, value.as_mut_slice()) {
        Ok(len) => {
            value.truncate(len);
            Ok(Some(value))
        }
        // As a user other than root, no `trusted.*` is to be seen.
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `folder` itself for the empty path, without the slash that would have a link followed.
fn join(folder: &Path, path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() { folder.to_owned() } else { folder.join(path) }
}
