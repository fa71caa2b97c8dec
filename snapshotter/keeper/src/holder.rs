//! The client of [`crate::hold`].
//!
//! Owns: the connection, and duplicates of everything that it had kept: a holder that was started anew gets them again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{ReceiveTimeout, SendTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket};
use nix::sys::time::TimeVal;

use crate::wire::{self, Message};
use crate::{Error, Keeper, Kept, Lasts, check};

/// How long the holder, which does nothing else, may take to answer.
const PATIENCE: TimeVal = TimeVal::new(5, 0);

/// How often it is looked whether the holder is there.
const LOOK: Duration = Duration::from_secs(1);

/// A connection to the process that keeps descriptors.
pub struct Holder {
    address: PathBuf,
    state: Mutex<State>,
}

struct State {
    /// `None` once it has broken, until there is a new one.
    connection: Option<OwnedFd>,
    kept: BTreeMap<String, OwnedFd>,
    /// Released while the holder couldn't be told.
    untold: BTreeSet<String>,
}

impl Holder {
    /// Whether a holder is at `address` now.
    pub fn answers(address: &Path) -> bool {
        dial(address).is_ok()
    }

    /// Connects to the holder at `address`, and takes what it keeps.
    pub fn connect(address: &Path) -> Result<(Arc<Self>, Vec<Kept>), Error> {
        let connection = dial(address)?;
        let talk = |source| Error::Talk { address: address.to_owned(), source };
        wire::send(connection.as_fd(), &Message::List, None).map_err(talk)?;
        let (mut found, mut kept) = (Vec::new(), BTreeMap::new());
        loop {
            match wire::receive(connection.as_fd()).map_err(talk)? {
                (Message::Found(name), Some(fd)) => {
                    kept.insert(name.clone(), duplicate(fd.as_fd(), address)?);
                    found.push(Kept { name, fd });
                }
                (Message::Listed, None) => break,
                _ => return Err(talk(wire::Error::Message)),
            }
        }
        let state = State { connection: Some(connection), kept, untold: BTreeSet::new() };
        let holder = Arc::new(Self { address: address.to_owned(), state: Mutex::new(state) });
        let watched = Arc::downgrade(&holder);
        thread::Builder::new()
            .name("holder-watch".to_owned())
            .spawn(move || watch(&watched))
            .map_err(|source| Error::Connect { address: address.to_owned(), source })?;
        Ok((holder, found))
    }

    /// Asks over the connection, or over a new one if that has broken.
    fn ask(
        &self,
        state: &mut State,
        message: &Message,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Message, Error> {
        if let Some(connection) = &state.connection {
            match self.call(connection, message, fd) {
                Ok(answer) => return Ok(answer),
                Err(_broken) => state.connection = None,
            }
        }
        let connection = self.again(state)?;
        let answer = self.call(&connection, message, fd)?;
        state.connection = Some(connection);
        Ok(answer)
    }

    fn call(
        &self,
        connection: &OwnedFd,
        message: &Message,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Message, Error> {
        let talk = |source| Error::Talk { address: self.address.clone(), source };
        wire::send(connection.as_fd(), message, fd).map_err(talk)?;
        Ok(wire::receive(connection.as_fd()).map_err(talk)?.0)
    }

    /// A new connection, over which the holder was told everything once more: it may be a new one, or the old one that
    /// hadn't answered.
    fn again(&self, state: &mut State) -> Result<OwnedFd, Error> {
        let connection = dial(&self.address)?;
        for name in &state.untold {
            self.call(&connection, &Message::Release(name.clone()), None)?;
        }
        for (name, fd) in &state.kept {
            self.call(&connection, &Message::Keep(name.clone()), Some(fd.as_fd()))?;
        }
        state.untold.clear();
        tracing::info!(address = %self.address.display(), kept = state.kept.len(), "the holder of descriptors is there again");
        Ok(connection)
    }

    /// Connects again if the holder has gone and come back; says so when either happens.
    fn look(&self, was_there: &mut bool) {
        let mut state = self.state();
        if state.connection.as_ref().is_some_and(has_ended) {
            state.connection = None;
        }
        if state.connection.is_none() {
            match self.again(&mut state) {
                Ok(connection) => {
                    state.connection = Some(connection);
                    *was_there = true;
                }
                Err(_) if !*was_there => {}
                Err(error) => {
                    tracing::warn!(address = %self.address.display(), error = &error as &dyn std::error::Error,
                        "the holder of descriptors is gone: mounts will not survive this process until it is back");
                    *was_there = false;
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Keeper for Holder {
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
        check(name)?;
        let own = duplicate(fd, &self.address)?;
        let mut state = self.state();
        let answer = match self.ask(&mut state, &Message::Keep(name.to_owned()), Some(fd)) {
            Ok(Message::Refused(reason)) => {
                return Err(Error::Refused { name: name.to_owned(), reason });
            }
            Ok(Message::Kept) => Ok(()),
            Ok(_) => {
                Err(Error::Talk { address: self.address.clone(), source: wire::Error::Message })
            }
            Err(away) => Err(away),
        };
        // Also for a holder that isn't there now.
        state.untold.remove(name);
        state.kept.insert(name.to_owned(), own);
        answer
    }

    fn release(&self, name: &str) -> Result<(), Error> {
        check(name)?;
        let mut state = self.state();
        state.kept.remove(name);
        if let Err(away) = self.ask(&mut state, &Message::Release(name.to_owned()), None) {
            tracing::debug!(
                name,
                error = &away as &dyn std::error::Error,
                "released once the holder is there"
            );
            state.untold.insert(name.to_owned());
        }
        Ok(())
    }

    fn lasts(&self) -> Lasts {
        Lasts::Process
    }
}

/// Gives everything to a holder that was started anew, for as long as somebody uses the client.
fn watch(holder: &Weak<Holder>) {
    let mut was_there = true;
    while let Some(holder) = holder.upgrade() {
        holder.look(&mut was_there);
        drop(holder);
        thread::sleep(LOOK);
    }
}
/// Whether the other end has closed the connection.
fn has_ended(connection: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
    let ended = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLIN;
    // Nothing ever comes unasked, so that something to read is the end.
    poll(&mut polled, PollTimeout::ZERO).is_ok()
        && polled[0].revents().is_some_and(|events| events.intersects(ended))
}

fn dial(address: &Path) -> Result<OwnedFd, Error> {
    let failed =
        |source: nix::Error| Error::Connect { address: address.to_owned(), source: source.into() };
    let flags = SockFlag::SOCK_CLOEXEC;
    let connection =
        socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(failed)?;
    setsockopt(&connection, ReceiveTimeout, &PATIENCE).map_err(failed)?;
    setsockopt(&connection, SendTimeout, &PATIENCE).map_err(failed)?;
    let at = UnixAddr::new(address).map_err(failed)?;
    connect(connection.as_raw_fd(), &at).map_err(failed)?;
    Ok(connection)
}

fn duplicate(fd: BorrowedFd<'_>, address: &Path) -> Result<OwnedFd, Error> {
    let failed = |source: io::Error| Error::Connect { address: address.to_owned(), source };
    fd.try_clone_to_owned().map_err(failed)
}
