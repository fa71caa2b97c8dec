//! The directory of mounts: `<mounts>/<decimal id>`, one a layer.
//!
//! Owns: the ids, the mount points and the threads that serve them.
//! Does not own: what is mounted (see [`crate::fuse`]), when (see [`crate::layer`]).
//!
//! Invariants:
//! - An id is not used twice by one process; a number is a path that a container may still name.
//! - Nothing here opens a file on one of our own mounts: a fork of this process would inherit the
//!   descriptor and flush it to a server that does not answer forks.
//! - What a dead predecessor left mounted is gone before the first mount.

pub mod info;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::config::FuseConfig;
use crate::fuse::device::{self, Device, FILE_SYSTEM};

/// A failed operation on the directory of mounts or on one mount.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("create the directory of mounts {}", path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error("read /proc/self/mountinfo")]
    Info { source: io::Error },
    #[error("create the mount point {}", path.display())]
    Point { path: PathBuf, source: io::Error },
    #[error("unmount {}, left behind by an earlier process", path.display())]
    Stale { path: PathBuf, source: io::Error },
    #[error("unmount {}", path.display())]
    Unmount { path: PathBuf, source: io::Error },
    #[error("serve {}", path.display())]
    Serve { path: PathBuf, source: device::Error },
}

/// The directory of mounts.
#[derive(Debug)]
pub struct Mounts {
    root: PathBuf,
    next: AtomicU64,
}

impl Mounts {
    /// Creates the directory, unmounts what is mounted inside (lazily: containers that still use it
    /// see ENOTCONN as before) and removes the empty mount points.
    pub fn open(root: &Path) -> Result<Self, Error> {
        fs::create_dir_all(root)
            .and_then(|()| root.canonicalize())
            .map_err(|source| Error::Root { path: root.to_owned(), source })
            .and_then(|root| {
                unmount_all(&root)?;
                remove_points(&root)?;
                Ok(Self { root, next: AtomicU64::new(1) })
            })
    }

    /// An id for a mount to come. Its path doesn't exist until then.
    pub fn reserve(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub fn path(&self, id: u64) -> PathBuf {
        self.root.join(id.to_string())
    }

    /// Mounts `file_system` under the reserved `id` and serves it until the [`Mount`] is dropped.
    pub fn mount<F: fuser::Filesystem>(
        &self,
        id: u64,
        file_system: F,
        config: &FuseConfig,
    ) -> Result<Mount, Error> {
        let path = self.path(id);
        fs::create_dir(&path).map_err(|source| Error::Point { path: path.clone(), source })?;
        let served = Device::mount(&path).and_then(|device| {
            let server = device.serve(file_system, config)?;
            Ok((device, server))
        });
        match served {
            Ok((device, server)) => {
                set_read_ahead(&path, config.lazy_read_ahead_kib);
                Ok(Mount { id, path, device, server: Some(server) })
            }
            Err(source) => {
                // Both may fail for want of anything to undo; the first error is the one to tell.
                let _ = umount2(&path, MntFlags::MNT_DETACH);
                let _ = fs::remove_dir(&path);
                Err(Error::Serve { path, source })
            }
        }
    }
}

/// A mounted layer. Dropping it unmounts lazily: what is open stays served until it is closed.
#[derive(Debug)]
pub struct Mount {
    id: u64,
    path: PathBuf,
    device: Device,
    server: Option<thread::JoinHandle<()>>,
}

impl Mount {
    pub const fn id(&self) -> u64 {
        self.id
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor through which the kernel is answered.
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// Has the kernel read `kib` KiB ahead in files that are opened from now on.
    pub fn set_read_ahead(&self, kib: u32) {
        set_read_ahead(&self.path, kib);
    }

    /// Takes the mount out of the file tree. Its server ends when the last user is gone.
    pub fn unmount(mut self) -> Result<(), Error> {
        self.detach()
    }

    fn detach(&mut self) -> Result<(), Error> {
        if self.server.take().is_none() {
            return Ok(());
        }
        let failed = |source| Error::Unmount { path: self.path.clone(), source };
        match umount2(&self.path, MntFlags::MNT_DETACH) {
            // Somebody else unmounted it, or removed the mount point too.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            tracing::warn!(path = %self.path.display(), error = error_chain(&error), "mount left behind");
        }
    }
}

/// An error and its causes on one line.
pub fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn mount_info() -> Result<Vec<info::Line>, Error> {
    let text = fs::read("/proc/self/mountinfo").map_err(|source| Error::Info { source })?;
    Ok(info::parse(&text).collect())
}

/// Lazily unmounts every file system of ours under `root`, the newest first.
fn unmount_all(root: &Path) -> Result<(), Error> {
    for line in mount_info()?.into_iter().rev() {
        if line.file_system != FILE_SYSTEM || line.mount_point.parent() != Some(root) {
            continue;
        }
        tracing::info!(path = %line.mount_point.display(), "unmounting what an earlier process left");
        umount2(&line.mount_point, MntFlags::MNT_DETACH)
            .map_err(|errno| Error::Stale { path: line.mount_point, source: errno.into() })?;
    }
    Ok(())
}

/// Removes empty directories with decimal names; anything else was not made here.
fn remove_points(root: &Path) -> Result<(), Error> {
    let failed = |source| Error::Root { path: root.to_owned(), source };
    for entry in fs::read_dir(root).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()));
        if ours {
            fs::remove_dir(entry.path())
                .map_err(|source| Error::Point { path: entry.path(), source })?;
        }
    }
    Ok(())
}

/// Sets the kernel's read-ahead for the mount at `path`. Where it can't be set, reads are slower or
/// longer, but right, so that failing is not an error.
fn set_read_ahead(path: &Path, kib: u32) {
    let written = mount_info().map_err(io::Error::other).and_then(|lines| {
        let line = lines.into_iter().rfind(|line| line.mount_point == path);
        let line = line.ok_or_else(|| io::Error::other("not in /proc/self/mountinfo"))?;
        fs::write(format!("/sys/class/bdi/{}/read_ahead_kb", line.device), kib.to_string())
    });
    if let Err(error) = written {
        tracing::debug!(path = %path.display(), %error, "read-ahead stays at the kernel's default");
    }
}
