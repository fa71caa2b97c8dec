//! systemd's descriptor store (sd_notify(3), sd_listen_fds(3)): for units with `FileDescriptorStoreMax=`,
//! `FileDescriptorStorePreserve=yes` and `NotifyAccess=main`.

use std::env;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use sd_notify::NotifyState;

use crate::{Error, Keeper, Kept, check};

/// The store of the unit that this process runs in.
pub struct Systemd;

impl Systemd {
    /// Whether this process's unit has a store: systemd says so from version 254 on, by `FDSTORE`.
    pub fn offered() -> bool {
        let max = env::var("FDSTORE").ok().and_then(|text| text.parse::<u64>().ok());
        max.is_some_and(|max| max > 0) && env::var_os("NOTIFY_SOCKET").is_some()
    }

    /// The store, and what it keeps. To be called once.
    #[expect(unsafe_code, reason = "what systemd hands over comes as numbers")]
    pub fn open() -> Result<(Self, Vec<Kept>), Error> {
        if !Self::offered() {
            return Err(Error::NoStore);
        }
        let kept = sd_notify::listen_fds_with_names().map_err(|source| Error::Notify { source })?;
        let own = |(fd, name)| {
            // SAFETY: systemd opened it for this process, and nobody else in it takes such descriptors.
            Kept { name, fd: unsafe { OwnedFd::from_raw_fd(fd) } }
        };
        let kept = kept.map(own).collect();
        Ok((Self, kept))
    }
}

impl Keeper for Systemd {
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
        check(name)?;
        // Kept twice under one name, it would come back twice.
        self.release(name)?;
        let state = [NotifyState::FdStore, NotifyState::FdName(name)];
        sd_notify::notify_with_fds(&state, &[fd]).map_err(|source| Error::Notify { source })
    }

    fn release(&self, name: &str) -> Result<(), Error> {
        check(name)?;
        let state = [NotifyState::FdStoreRemove, NotifyState::FdName(name)];
        sd_notify::notify(&state).map_err(|source| Error::Notify { source })
    }
}
