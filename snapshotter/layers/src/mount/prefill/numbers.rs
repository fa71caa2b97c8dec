//! Descriptors as numbers: by which events are answered, and by which it is known who has a file open.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SigHandler, Signal, signal};

/// From the kernel's `linux/fcntl.h`.
const F_SETLEASE: libc::c_int = 1024;

/// The number of an event. Of one that this process took: as long as this exists, no other gets the same.
#[derive(Debug)]
pub struct Number {
    value: RawFd,
    /// `None`: the number means something else in this process, or is none.
    held: Option<OwnedFd>,
}

impl Number {
    /// Of an event that the kernel has just given this process.
    #[expect(unsafe_code, reason = "the kernel writes a number")]
    pub fn taken(value: RawFd) -> Self {
        // SAFETY: the kernel has just opened it for us; a negative one isn't a descriptor.
        let held = (value >= 0).then(|| unsafe { OwnedFd::from_raw_fd(value) });
        Self { value, held }
    }

    /// Of an event that was given to an earlier process (see [`super::left`]).
    pub const fn left(value: RawFd) -> Self {
        Self { value, held: None }
    }

    pub const fn value(&self) -> RawFd {
        self.value
    }

    /// The file that the event is about.
    pub fn file(&self) -> io::Result<BorrowedFd<'_>> {
        let held = self.held.as_ref().map(AsFd::as_fd);
        held.ok_or_else(|| io::Error::other("an event without a file"))
    }
}

/// Has a duplicate of `other` take the number `value`; `None`: something else in this process has it.
#[expect(unsafe_code, reason = "fcntl(2) gives a number")]
pub fn reserve(value: RawFd, other: BorrowedFd<'_>) -> Option<OwnedFd> {
    let number = fcntl(other, FcntlArg::F_DUPFD_CLOEXEC(value)).ok()?;
    // SAFETY: the kernel has just opened it for us.
    let duplicate = unsafe { OwnedFd::from_raw_fd(number) };
    (number == value).then_some(duplicate)
}

/// Whether no open file but that of `file`, which can be written by it, is one of the same. The kernel grants a lease
/// only then.
#[expect(unsafe_code, reason = "nix has no leases")]
pub fn only_we_have(file: &File) -> bool {
    let lease = |kind: libc::c_int| {
        // SAFETY: the call takes no pointers.
        unsafe { libc::fcntl(file.as_raw_fd(), F_SETLEASE, kind) }
    };
    let granted = lease(libc::F_WRLCK) == 0;
    if granted {
        lease(libc::F_UNLCK);
    }
    granted
}

/// Whoever opens a file during [`only_we_have`] has a signal sent to us; that is nothing to die of.
#[expect(unsafe_code, reason = "signals belong to the whole process")]
pub fn ignore_lease_breaks() {
    // SAFETY: nothing else in the process asks for this signal, and to ignore it runs no code.
    if let Err(errno) = unsafe { signal(Signal::SIGIO, SigHandler::SigIgn) } {
        tracing::warn!(%errno, "SIGIO can't be ignored");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    #[test]
    fn a_number_is_reserved_if_nobody_has_it() {
        let file = tempfile::tempfile().unwrap();
        let reserved = reserve(900, file.as_fd());
        assert!(reserved.is_some());
        assert!(reserve(900, file.as_fd()).is_none());
        drop(reserved);
        assert!(reserve(900, file.as_fd()).is_some(), "it was given back");
        assert!(reserve(-1, file.as_fd()).is_none());
        assert!(Number::taken(-1).file().is_err() && Number::left(0).file().is_err());
    }

    #[test]
    fn others_who_have_the_file_open_are_noticed() {
        ignore_lease_breaks();
        let named = tempfile::NamedTempFile::new().unwrap();
        let file = OpenOptions::new().read(true).write(true).open(named.path()).unwrap();
        let path = named.into_temp_path();
        assert!(only_we_have(&file));
        let duplicate = file.try_clone().unwrap();
        assert!(only_we_have(&duplicate), "a duplicate is the same open file");
        let reader = File::open(&path).unwrap();
        assert!(!only_we_have(&file));
        drop(reader);
        assert!(only_we_have(&file));
    }
}
