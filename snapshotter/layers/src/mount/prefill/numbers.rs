//! Descriptors as numbers: by which events are answered, and by which it is known who has a file open.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SigHandler, Signal, signal};

/// From the kernel's `linux/fcntl.h`.
const F_SETLEASE: libc::c_int = 1024;

/// The number of an event: as long as this exists, the kernel gives no other event the same in this process, unless
/// it [is ambiguous](Number::is_ambiguous).
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

    /// Of an event that was given to an earlier process. A duplicate of `other` takes the number, if it is free.
    #[expect(unsafe_code, reason = "fcntl(2) gives a number")]
    pub fn reserve(value: RawFd, other: BorrowedFd<'_>) -> Self {
        let Ok(number) = fcntl(other, FcntlArg::F_DUPFD_CLOEXEC(value)) else {
            return Self { value, held: None };
        };
        // SAFETY: the kernel has just opened it for us.
        let duplicate = unsafe { OwnedFd::from_raw_fd(number) };
        Self { value, held: (number == value).then_some(duplicate) }
    }

    pub const fn value(&self) -> RawFd {
        self.value
    }

    /// Whether another event may get the number before this one is answered.
    pub const fn is_ambiguous(&self) -> bool {
        self.held.is_none() && self.value >= 0
    }

    /// The file that the event is about.
    pub fn file(&self) -> io::Result<BorrowedFd<'_>> {
        let held = self.held.as_ref().map(AsFd::as_fd);
        held.ok_or_else(|| io::Error::other("an event without a file"))
    }
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
    fn a_number_is_reserved_or_known_to_be_ambiguous() {
        let file = tempfile::tempfile().unwrap();
        let reserved = Number::reserve(900, file.as_fd());
        assert!(!reserved.is_ambiguous() && reserved.value() == 900);
        let taken = Number::reserve(900, file.as_fd());
        assert!(taken.is_ambiguous() && taken.value() == 900);
        drop(reserved);
        assert!(!Number::reserve(900, file.as_fd()).is_ambiguous(), "it was given back");
        let none = Number::taken(-1);
        assert!(none.file().is_err() && !none.is_ambiguous(), "nobody can be given it");
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
