//! `/dev/fuse`: mounting by hand and serving a descriptor.
//!
//! Mounting by hand (mount(2) with the descriptor's number) and not through a library leaves the
//! descriptor in our keeping: whoever holds it holds the mount, whatever happens to this process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use fuser::{Filesystem, Session, SessionACL};
use nix::mount::{MsFlags, mount};

use crate::config::FuseConfig;

/// The type that the mounts have in mountinfo.
pub const FILE_SYSTEM: &str = "fuse.skimmer";

/// The largest read that the kernel asks for at once.
pub const MAX_READ: u32 = 1 << 20;

const SOURCE: &str = "skimmer";

/// The joining thread does nothing but wait.
const STACK_BYTES: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("open /dev/fuse (is the fuse module loaded?)")]
    Open { source: io::Error },
    #[error("mount {} (needs CAP_SYS_ADMIN)", path.display())]
    Mount { path: PathBuf, source: io::Error },
    #[error("greet the kernel on /dev/fuse")]
    Handshake { source: io::Error },
    #[error("start a thread")]
    Thread { source: io::Error },
}

/// From this size on, memory is taken from the kernel and given back to it, always.
const MAPPED_BYTES: libc::c_int = 4 << 20;

/// Tells the allocator to map and unmap large buffers. Each thread that takes requests has one of 16
/// MiB, of which the kernel touches a few pages. glibc maps such buffers too, until the first is
/// freed; then it takes them from its heaps, zeroes them by hand, and every idle mount holds 16 MiB.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "no safe wrapper of mallopt(3) is at hand")]
pub fn bound_idle_memory() {
    // SAFETY: mallopt sets a parameter of the allocator under the allocator's own lock.
    if unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES) } != 1 {
        tracing::warn!("the allocator can't be tuned: idle mounts will take more memory");
    }
}

#[cfg(not(target_env = "gnu"))]
pub fn bound_idle_memory() {}

/// An open `/dev/fuse` that is mounted somewhere.
#[derive(Debug)]
pub struct Device {
    file: File,
}

impl Device {
    /// Opens the device and mounts it at `path`: read-only, with set-user-id programs and device
    /// nodes in force, permissions checked by the kernel, for all users.
    pub fn mount(path: &Path) -> Result<Self, Error> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .map_err(|source| Error::Open { source })?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={MAX_READ}",
            file.as_raw_fd()
        );
        mount(Some(SOURCE), path, Some(FILE_SYSTEM), MsFlags::MS_RDONLY, Some(options.as_str()))
            .map_err(|errno| Error::Mount { path: path.to_owned(), source: errno.into() })?;
        Ok(Self { file })
    }

    /// Answers the kernel from threads of its own until the file system is unmounted and unused.
    pub fn serve<F: Filesystem>(
        &self,
        file_system: F,
        config: &FuseConfig,
    ) -> Result<thread::JoinHandle<()>, Error> {
        let descriptor: OwnedFd =
            self.file.try_clone().map_err(|source| Error::Handshake { source })?.into();
        let mut settings = fuser::Config::default();
        settings.n_threads = Some(config.threads.max(1));
        // A clone's closing would abort the requests that it took.
        settings.clone_fd = false;
        let session = Session::from_fd(file_system, descriptor, SessionACL::All, settings)
            .map_err(|source| Error::Handshake { source })?;
        thread::Builder::new()
            .name("fuse-session".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Err(error) = session.run() {
                    tracing::error!(%error, "stopped serving a mount: its readers now fail");
                }
            })
            .map_err(|source| Error::Thread { source })
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
