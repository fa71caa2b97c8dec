//! The answer to a read, owed until it is given.
//!
//! A reply of fuser's that is dropped answers EIO. When this process is about to end and somebody keeps its mounts, no
//! answer is the right one: the kernel asks the next process again, or that one finds the read [written down](Entry).

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{Errno, ReplyData};

use super::journal::Entry;
use super::request;

/// Whether what is not answered yet is left to the next process. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Leaving(Arc<AtomicBool>);

impl Leaving {
    /// From now on nothing fails any more: what can't be answered isn't.
    pub fn begin(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub fn has_begun(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// To whom an answer goes.
pub enum To {
    /// Who asked through a session.
    Session(ReplyData),
    /// Who asked an earlier process on this device, by the number of the request.
    Device(Arc<OwnedFd>, u64),
}

/// See the module's documentation.
pub struct Answer {
    to: Option<To>,
    /// Where the read is written down, if it is.
    entry: Option<Entry>,
    leaving: Leaving,
}

impl Answer {
    pub fn new(to: To, entry: Option<Entry>, leaving: &Leaving) -> Self {
        Self { to: Some(to), entry, leaving: leaving.clone() }
    }

    pub fn data(mut self, bytes: &[u8]) {
        match self.to.take() {
            Some(To::Session(reply)) => reply.data(bytes),
            Some(To::Device(device, unique)) => give(&device, unique, Ok(bytes)),
            None => {}
        }
    }

    /// The read fails, unless it is left to the next process.
    pub fn error(mut self, errno: Errno) {
        if !self.is_left() {
            self.fail(errno);
        }
    }

    fn fail(&mut self, errno: Errno) {
        match self.to.take() {
            Some(To::Session(reply)) => reply.error(errno),
            Some(To::Device(device, unique)) => give(&device, unique, Err(errno)),
            None => {}
        }
    }

    /// Whether a failure is nothing to tell anybody.
    pub fn is_left(&self) -> bool {
        self.leaving.has_begun()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.to.is_none() {
            return;
        }
        if self.is_left() {
            std::mem::forget((self.to.take(), self.entry.take()));
        } else {
            self.fail(Errno::EIO);
        }
    }
}

fn give(device: &OwnedFd, unique: u64, result: Result<&[u8], Errno>) {
    let header = request::answer(unique, result.map(<[u8]>::len));
    let parts = [IoSlice::new(&header), IoSlice::new(result.unwrap_or_default())];
    match nix::sys::uio::writev(device, &parts) {
        // The reader was killed, or its mount is gone.
        Ok(_) | Err(nix::Error::ENOENT | nix::Error::ENODEV) => {}
        Err(errno) => {
            let error = io::Error::from(errno);
            tracing::error!(%error, "a reader who waits since an earlier process can't be answered");
        }
    }
}
