//! systemd's descriptor store (sd_notify(3), sd_listen_fds(3)): for units with `FileDescriptorStoreMax=`,
//! `FileDescriptorStorePreserve=yes` and `NotifyAccess=main`.
//!
//! Messages to systemd wait in its queue, and it has to find out by then whose they are. So whoever hands over a
//! descriptor sends a barrier after it (sd_notify_barrier(3)) and waits until systemd has got that far.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sd_notify::NotifyState;

use crate::{Error, Keeper, Kept, Lasts, check};

/// How long systemd may take for what was sent to it.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest variable that a process can be started with (`MAX_ARG_STRLEN` of execve(2)): all names together are one.
const VARIABLE_BYTES: usize = 128 << 10;

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
        let lasts = if Self::survives_stop() { Lasts::Machine } else { Lasts::UntilStop };
        Ok((Self { lasts, max: max(), names: Mutex::new(names) }, kept))
    }

    /// Whether systemd says, now, that the store of this process's unit outlives the unit's stop: systemd forgets a stopped
    /// unit with its store, whatever that is to preserve, unless another unit wants it.
    pub fn survives_stop() -> bool {
        let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let Some(unit) = unit_of(&cgroups) else { return false };
        let asked = Command::new("systemctl")
            .args(["show", "--property=FileDescriptorStorePreserve,WantedBy,RequiredBy"])
            .args(["--", unit])
            .output();
        asked.is_ok_and(|said| preserves(&String::from_utf8_lossy(&said.stdout)))
    }

    /// Adds `name` to what is kept, as far as there is room. Whether it was there.
    fn enter(&self, name: &str) -> Result<bool, Error> {
        let mut names = self.names();
        if names.contains(name) {
            return Ok(true);
        }
        if names.len() >= self.max {
            return Err(Error::Full { max: self.max });
        }
        if !fit(names.iter().map(String::as_str).chain([name])) {
            return Err(Error::Names { limit: VARIABLE_BYTES });
        }
        names.insert(name.to_owned());
        Ok(false)
    }

    fn names(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until systemd has dealt with everything that this process sent to it before.
fn barrier(limit: Duration) -> Result<(), Error> {
    let notify = |source| Error::Notify { source };
    let (answer, systemds) = io::pipe().map_err(notify)?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[systemds.as_fd()])
        .map_err(notify)?;
    // From here on only systemd has it open, and closes it when it comes to this message.
    drop(systemds);
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(answer.as_fd(), PollFlags::empty())], left) {
            Ok(0) => return Err(Error::Unanswered { limit }),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(notify(error.into())),
        }
    }
}

/// Has systemd close what it keeps under `name`.
fn forget(name: &str) -> Result<(), Error> {
    let state = [NotifyState::FdStoreRemove, NotifyState::FdName(name)];
    sd_notify::notify(&state).map_err(|source| Error::Notify { source })
}

/// Whether the unit can be started with all of `names`, as `LISTEN_FDNAMES=<name>:…`: else it never would be again.
fn fit<'a>(names: impl Iterator<Item = &'a str>) -> bool {
    let bytes: usize = names.map(|name| name.len() + ":".len()).sum();
    "LISTEN_FDNAMES=".len() + bytes <= VARIABLE_BYTES
}

fn max() -> usize {
    env::var("FDSTORE").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Whether a unit with these properties keeps its store when it is stopped.
fn preserves(properties: &str) -> bool {
    let all: BTreeMap<_, _> =
        properties.lines().filter_map(|property| property.split_once('=')).collect();
    let is_wanted = ["WantedBy", "RequiredBy"]
        .iter()
        .any(|name| all.get(name).is_some_and(|units| !units.is_empty()));
    is_wanted && all.get("FileDescriptorStorePreserve") == Some(&"yes")
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
        if self.enter(name)? {
            // Kept twice under one name, it would come back twice.
            forget(name)?;
        }
        let state = [NotifyState::FdStore, NotifyState::FdName(name)];
        sd_notify::notify_with_fds(&state, &[fd]).map_err(|source| Error::Notify { source })?;
        barrier(PATIENCE)
    }

    fn release(&self, name: &str) -> Result<(), Error> {
        check(name)?;
        self.names().remove(name);
        forget(name)
    }

    fn lasts(&self) -> Lasts {
        self.lasts
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSliceMut, Read as _};
    use std::os::fd::AsRawFd as _;
    use std::os::unix::net::UnixDatagram;
    use std::path::Path;
    use std::process::{Child, Stdio};
    use std::thread;

    use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

    use super::*;
    use crate::memory;

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

    #[test]
    fn a_store_outlives_a_stop_if_somebody_wants_the_unit() {
        for (preserve, wanted, required, expected) in [
            ("yes", "multi-user.target", "", true),
            ("yes", "", "a.service b.service", true),
            ("yes", "", "", false),
            ("restart", "multi-user.target", "", false),
        ] {
            let properties = format!(
                "RequiredBy={required}\nWantedBy={wanted}\nFileDescriptorStorePreserve={preserve}\n"
            );
            assert_eq!(preserves(&properties), expected, "{properties}");
        }
        assert!(!preserves(""));
    }

    #[test]
    fn a_unit_is_never_given_more_names_than_it_can_be_started_with() {
        for bytes in [1, 30, 255] {
            let name = "n".repeat(bytes);
            let most = VARIABLE_BYTES / (bytes + 1) - "LISTEN_FDNAMES=".len().div_ceil(bytes + 1);
            let all = |count| std::iter::repeat_n(name.as_str(), count);
            assert!(fit(all(most)) && !fit(all(most + 20)));
            let starts = |count| {
                let names = all(count).collect::<Vec<_>>().join(":");
                Command::new("true").env("LISTEN_FDNAMES", names).status().is_ok()
            };
            assert!(starts(most), "{bytes}");
            assert!(!starts(most + 20), "{bytes}");
        }
    }

    /// Tells [`keeps`] and [`gives_up`] that they are to be a service.
    const SERVICE: &str = "SKIMMER_TEST_SERVICE";

    /// Runs the test `name` as a process of a unit whose systemd listens at `socket`.
    fn service(name: &str, socket: &Path) -> Child {
        Command::new(env::current_exe().unwrap())
            .args(["--exact", &format!("systemd::tests::{name}")])
            .env(SERVICE, name)
            .env("NOTIFY_SOCKET", socket)
            .env("FDSTORE", "16")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// The next message, and the descriptors that came with it.
    #[expect(unsafe_code, reason = "the kernel hands descriptors over as numbers")]
    fn receive(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
        let mut text = [0; 256];
        let mut space = nix::cmsg_space!([i32; 4]);
        let mut parts = [IoSliceMut::new(&mut text)];
        let fd = socket.as_raw_fd();
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(fd, &mut parts, Some(&mut space), flags).unwrap();
        let mut descriptors = Vec::new();
        for control in message.cmsgs().unwrap() {
            let ControlMessageOwned::ScmRights(all) = control else { continue };
            // SAFETY: the kernel has just opened them for this process, and nobody else knows of them.
            descriptors.extend(all.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
        let length = message.bytes;
        (String::from_utf8_lossy(&text[..length]).into_owned(), descriptors)
    }

    fn said(mut child: Child) -> String {
        let mut said = String::new();
        child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(child.wait().unwrap().success(), "{said}");
        said
    }

    #[test]
    fn a_descriptor_is_kept_when_systemd_has_taken_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let mut child = service("keeps", &path);
        let (text, kept) = receive(&socket);
        assert_eq!((&text[..], kept.len()), ("FDSTORE=1\nFDNAME=name\n", 1));
        let (text, answer) = receive(&socket);
        assert_eq!((&text[..], answer.len()), ("BARRIER=1\n", 1));
        thread::sleep(Duration::from_millis(200));
        assert!(child.try_wait().unwrap().is_none(), "it didn't wait");
        drop(answer);
        said(child);
    }

    #[test]
    fn a_systemd_that_is_silent_is_not_waited_for_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let _silent = UnixDatagram::bind(&path).unwrap();
        said(service("gives_up", &path));
    }

    /// Not a test by itself: the body of a [`service`].
    #[test]
    fn keeps() {
        if env::var_os(SERVICE).is_none() {
            return;
        }
        let (keeper, _) = Systemd::open().unwrap();
        memory::open(&(std::sync::Arc::new(keeper) as _), &mut Vec::new(), "name").unwrap();
    }

    /// Not a test by itself: the body of a [`service`].
    #[test]
    fn gives_up() {
        if env::var_os(SERVICE).is_none() {
            return;
        }
        let error = barrier(Duration::from_millis(100)).unwrap_err();
        assert!(matches!(error, Error::Unanswered { .. }), "{error}");
    }
}
