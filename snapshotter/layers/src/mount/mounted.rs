//! One mount, and who serves it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use skimmer_keeper::Keeper;

use super::direct;
use super::lazy::Lazy;
use super::left::Name;
use super::read_ahead::Bdi;
use super::{Error, error_chain, release};

/// Who answers a mount's readers.
pub enum Server {
    /// The kernel by itself.
    Kernel,
    /// This process; who is to forget the descriptor when the mount goes.
    Fuse(Option<(Name, Arc<dyn Keeper>)>),
    /// The kernel, which asks this process for what is missing.
    Lazy(Lazy),
}

/// A mounted layer. Dropping it unmounts lazily: what is open stays served until it is closed.
pub struct Mount {
    id: u64,
    path: PathBuf,
    server: Server,
    bdi: Bdi,
    /// Whether the kernel has been told to read from the disk.
    direct: bool,
    mounted: bool,
}

impl Mount {
    pub(super) const fn new(id: u64, path: PathBuf, server: Server) -> Self {
        Self { id, path, server, bdi: Bdi::Device, direct: false, mounted: true }
    }

    /// The same, whose read-ahead is found by `bdi`.
    pub(super) fn reading_ahead_by(mut self, bdi: Bdi) -> Self {
        self.bdi = bdi;
        self
    }

    pub const fn id(&self) -> u64 {
        self.id
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this process serves it, and not the kernel.
    pub const fn is_fuse(&self) -> bool {
        matches!(self.server, Server::Fuse(_))
    }

    /// Whether the kernel serves it, and asks for what is missing.
    pub const fn is_lazy(&self) -> bool {
        matches!(self.server, Server::Lazy(_))
    }

    /// Has the kernel read `kib` KiB ahead in files that are opened from now on.
    pub fn set_read_ahead(&self, kib: u32) {
        self.bdi.set_read_ahead(&self.path, kib);
    }

    /// Nothing is missing of `data`, and the disk knows: if that is what is mounted, the kernel needn't ask any more.
    pub fn complete(&mut self, data: &File) {
        let Server::Lazy(lazy) = &self.server else { return };
        match lazy.finish(data) {
            Ok(false) => {}
            Ok(true) => self.server = Server::Kernel,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), error = error_chain(&error), "the kernel goes on asking for bytes that are there");
            }
        }
    }

    /// The kernel serves all of `data`: once most of that has left memory, has it read from the disk, past a second
    /// copy in the page cache. Where it can't, reads are slower, but right, so that failing is not an error.
    pub fn read_directly(&mut self, data: &File) {
        if self.direct || !matches!(self.server, Server::Kernel) {
            return;
        }
        match direct::suits(data) {
            Ok(true) => {
                self.direct = true;
                let turned = direct::turn_on(&self.path, data);
                tracing::debug!(path = %self.path.display(), ?turned, "read from the disk from now on");
            }
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(path = %self.path.display(), %error, "what is cached of a data file isn't known");
            }
        }
    }

    /// Takes the mount out of the file tree. Its server ends when the last user is gone.
    pub fn unmount(mut self) -> Result<(), Error> {
        self.detach()
    }

    /// Leaves the mount to whoever comes after this process, if it can live until then.
    pub fn leave(mut self) {
        if !matches!(self.server, Server::Fuse(None)) {
            self.mounted = false;
        }
    }

    fn detach(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.mounted) {
            return Ok(());
        }
        if let Server::Fuse(Some((name, keeper))) = &self.server {
            release(keeper.as_ref(), name);
        }
        let failed = |source| Error::Unmount { path: self.path.clone(), source };
        match umount2(&self.path, MntFlags::MNT_DETACH) {
            // Somebody else unmounted it, or removed the mount point too.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        if let Server::Lazy(lazy) = &self.server {
            lazy.unmounted();
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
