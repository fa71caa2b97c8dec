//! What the kernel has cached of files on a mount that it serves, and is to read again where it was wrong.
//!
//! Not for mounts that this process serves: the kernel's notification for them (`FUSE_NOTIFY_INVAL_INODE`) waits, and can't be
//! killed, for reads that this process answers. One that is killed at that moment would never end.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// Has the kernel forget what it has of the regular file at `path` below `mount`. What programs have mapped stays until they
/// end.
pub fn forget(mount: &Path, path: &Path) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(mount.join(path));
    let file = match opened {
        // It isn't mounted any more.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    Ok(posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}
