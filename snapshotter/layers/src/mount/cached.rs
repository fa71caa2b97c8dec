//! What the kernel has cached of one mount's files, which it is to read again where it was wrong.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Weak;

use fuser::INodeNo;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::fuse::device::forget_cached;

/// The cache of a mount.
pub enum Cached {
    /// That this process serves, by this device.
    Fuse(Weak<File>),
    /// That the kernel serves, at this path.
    Kernel(PathBuf),
}

impl Cached {
    /// Has the kernel forget what it has of a regular file, which has this number and lies at `path` in the layer. What
    /// programs have mapped of a mount that the kernel serves stays until they end. Blocks: where this process serves
    /// the mount, until it has answered the file's readers.
    pub fn forget(&self, number: INodeNo, path: &Path) -> io::Result<()> {
        match self {
            Self::Fuse(device) => {
                device.upgrade().map_or(Ok(()), |device| forget_cached(&device, number))
            }
            Self::Kernel(mount) => {
                let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
                let opened =
                    OpenOptions::new().read(true).custom_flags(flags).open(mount.join(path));
                let file = match opened {
                    // It isn't mounted any more.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                    opened => opened?,
                };
                Ok(posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
            }
        }
    }
}
