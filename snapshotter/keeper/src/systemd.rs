//! systemd's descriptor store (sd_notify(3), sd_listen_fds(3)): for units with `FileDescriptorStoreMax=`,
//! `FileDescriptorStorePreserve=yes` and `NotifyAccess=main`.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use sd_notify::NotifyState;

use crate::{Error, Keeper, Kept, Lasts, check};

/// The store of the unit that this process runs in.
pub struct Systemd {
    lasts: Lasts,
    /// What it holds at most: it drops what is beyond, and doesn't say so.
    max: usize,
    names: Mutex<BTreeSet<String>>,
}

impl Systemd {
    /// Whether this process's unit has a store: systemd says so from version 254 on, by `FDSTORE`.
    pub fn offered() -> bool {
        max() > 0 && env::var_os("NOTIFY_SOCKET").is_some()
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
        let kept: Vec<Kept> = kept.map(own).collect();
        let names = kept.iter().map(|kept| kept.name.clone()).collect();
        let lasts = if survives_stop() { Lasts::Machine } else { Lasts::UntilStop };
        Ok((Self { lasts, max: max(), names: Mutex::new(names) }, kept))
    }

    fn names(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn max() -> usize {
    env::var("FDSTORE").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Whether systemd says that the store of this process's unit outlives the unit's stop.
fn survives_stop() -> bool {
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(unit) = unit_of(&cgroups) else { return false };
    let asked = Command::new("systemctl")
        .args(["show", "--property=FileDescriptorStorePreserve", "--value", "--", unit])
        .output();
    asked.is_ok_and(|said| said.stdout.trim_ascii() == b"yes")
}

/// The service that a process with these `/proc/<id>/cgroup` lines runs in: `0::/system.slice/skimmerd.service`, or
/// with version 1 `1:name=systemd:/…`.
fn unit_of(cgroups: &str) -> Option<&str> {
    let of = |start: &str| cgroups.lines().find(|line| line.starts_with(start));
    let line = of("1:name=systemd:").or_else(|| of("0::"))?;
    line.split('/').rfind(|part| part.ends_with(".service"))
}

impl Keeper for Systemd {
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
        check(name)?;
        // Kept twice under one name, it would come back twice.
        self.release(name)?;
        let mut names = self.names();
        if names.len() >= self.max {
            return Err(Error::Full { max: self.max });
        }
        names.insert(name.to_owned());
        let state = [NotifyState::FdStore, NotifyState::FdName(name)];
        sd_notify::notify_with_fds(&state, &[fd]).map_err(|source| Error::Notify { source })
    }

    fn release(&self, name: &str) -> Result<(), Error> {
        check(name)?;
        self.names().remove(name);
        let state = [NotifyState::FdStoreRemove, NotifyState::FdName(name)];
        sd_notify::notify(&state).map_err(|source| Error::Notify { source })
    }

    fn lasts(&self) -> Lasts {
        self.lasts
    }
}

#[cfg(test)]
mod tests {
    use super::unit_of;

    #[test]
    fn the_unit_is_the_innermost_service() {
        for (cgroups, unit) in [
            ("0::/system.slice/skimmerd.service\n", Some("skimmerd.service")),
            ("0::/system.slice/a.service/b.service/x\n", Some("b.service")),
            ("4:cpu:/x.service\n1:name=systemd:/system.slice/s.service\n0::/\n", Some("s.service")),
            ("0::/user.slice/user-0.slice/session-1.scope\n", None),
            ("", None),
        ] {
            assert_eq!(unit_of(cgroups), unit, "{cgroups}");
        }
    }
}
