//! The holder: keeps descriptors by name for a process that may die, and does nothing else.
//!
//! One thread, no allocation that grows with time, no configuration: what it must not do is end.
//!
//! Invariants:
//! - Only root is answered.
//! - A client that doesn't read its answers is dropped, not waited for.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{PeerCredentials, SendTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, getsockopt,
    listen, setsockopt, socket,
};
use nix::sys::time::TimeVal;
use sd_notify::NotifyState;

use crate::check;
use crate::wire::{self, Message};

/// Descriptors that are kept at most.
const MAX_KEPT: usize = 16_384;

/// Connections at a time: the daemon's, its successor's, a person's.
const MAX_CLIENTS: usize = 8;

const SEND: TimeVal = TimeVal::new(2, 0);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make the folder of {}", address.display())]
    Folder { address: PathBuf, source: io::Error },
    #[error("another holder serves {}", address.display())]
    Taken { address: PathBuf },
    #[error("listen on {}", address.display())]
    Listen { address: PathBuf, source: io::Error },
    #[error("wait for requests")]
    Wait { source: nix::Error },
}

/// Serves at `address` for ever.
pub fn serve(address: &Path) -> Result<(), Error> {
    let listener = open(address)?;
    tracing::info!(address = %address.display(), "keeping descriptors");
    // Where systemd waits for this, whoever is to start after the holder finds it.
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        tracing::warn!(%error, "systemd isn't told that descriptors are kept");
    }
    let mut kept = BTreeMap::new();
    let mut clients: Vec<OwnedFd> = Vec::new();
    loop {
        let ready = {
            let mut polled: Vec<PollFd<'_>> = std::iter::once(listener.as_fd())
                .chain(clients.iter().map(AsFd::as_fd))
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(source) => return Err(Error::Wait { source }),
            }
            polled.iter().map(|fd| fd.any().unwrap_or(false)).collect::<Vec<_>>()
        };
        let mut answered = ready[1..].iter();
        clients.retain(|client| {
            !answered.next().is_some_and(|ready| *ready) || answer(client, &mut kept)
        });
        if ready[0] {
            if let Some(client) = take(&listener) {
                clients.push(client);
            }
            // The longest here is the likeliest to be of use to nobody.
            if clients.len() > MAX_CLIENTS {
                clients.remove(0);
            }
        }
    }
}

fn open(address: &Path) -> Result<OwnedFd, Error> {
    let folder = address.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)
        .map_err(|source| Error::Folder { address: address.to_owned(), source })?;
    let failed =
        |source: nix::Error| Error::Listen { address: address.to_owned(), source: source.into() };
    let new = || socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
    let at = UnixAddr::new(address).map_err(failed)?;
    if connect(new().map_err(failed)?.as_raw_fd(), &at).is_ok() {
        return Err(Error::Taken { address: address.to_owned() });
    }
    let failed_io = |source| Error::Listen { address: address.to_owned(), source };
    match fs::remove_file(address) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed_io(error)),
        _ => {}
    }
    let listener = new().map_err(failed)?;
    bind(listener.as_raw_fd(), &at).map_err(failed)?;
    fs::set_permissions(address, fs::Permissions::from_mode(0o600)).map_err(failed_io)?;
    listen(&listener, Backlog::MAXCONN).map_err(failed)?;
    Ok(listener)
}

/// The next client, if it is root's.
#[expect(unsafe_code, reason = "accept4(2) gives a number")]
fn take(listener: &OwnedFd) -> Option<OwnedFd> {
    let number = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).ok()?;
    // SAFETY: the kernel has just opened it for us.
    let client = unsafe { OwnedFd::from_raw_fd(number) };
    setsockopt(&client, SendTimeout, &SEND).ok()?;
    let is_root = getsockopt(&client, PeerCredentials).is_ok_and(|peer| peer.uid() == 0);
    is_root.then_some(client)
}

/// Answers one request. Whether the client is to stay.
fn answer(client: &OwnedFd, kept: &mut BTreeMap<String, OwnedFd>) -> bool {
    let Ok((message, fd)) = wire::receive(client.as_fd()) else { return false };
    let reply = |message: &Message, fd: Option<&OwnedFd>| {
        wire::send(client.as_fd(), message, fd.map(AsFd::as_fd)).is_ok()
    };
    match (message, fd) {
        (Message::Keep(name), Some(fd)) => match admit(&name, kept) {
            Ok(()) => {
                kept.insert(name, fd);
                reply(&Message::Kept, None)
            }
            Err(reason) => reply(&Message::Refused(reason), None),
        },
        (Message::Release(name), None) => {
            kept.remove(&name);
            reply(&Message::Released, None)
        }
        (Message::List, None) => {
            kept.iter().all(|(name, fd)| reply(&Message::Found(name.clone()), Some(fd)))
                && reply(&Message::Listed, None)
        }
        _ => false,
    }
}

fn admit(name: &str, kept: &BTreeMap<String, OwnedFd>) -> Result<(), String> {
    check(name).map_err(|error| error.to_string())?;
    if kept.len() >= MAX_KEPT && !kept.contains_key(name) {
        return Err(format!("{MAX_KEPT} descriptors are kept already"));
    }
    Ok(())
}
