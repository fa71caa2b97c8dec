//! What an earlier process took from the kernel and didn't answer, where the kernel doesn't send it again.
//!
//! Reads, which may wait for bytes, are begun anew, and answered on the device whenever that is. All else is asked of
//! the file system through a session of its own over a socket, by the request as it was written down; the answers are
//! then the kernel's. What that process had taken and is written down nowhere (the first request that a thread takes, or
//! one for which there was no room) nobody knows any more: such requests fail with ESTALE, upon which the kernel looks
//! names up once more, and asks again for pages that it has read ahead.
//!
//! Invariants:
//! - It is over before the next process takes anything: what is found unanswered is an earlier one's.
//! - A request stays written down until its answer is the kernel's; if this process dies too, the next one finds it.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use fuser::{Errno, Filesystem, InitFlags};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::time::TimeVal;
use nix::unistd::{read, write};

use super::device::{self, Device};
use super::journal::{Entry, Taken};
use super::request::{self, Request};
use super::{Content, LayerFs};
use crate::config::FuseConfig;

/// How far from the highest number that is known the number of a request may be that isn't written down: as many as may
/// be under way at once.
const NEAR: u64 = 1024;

/// By which the kernel counts.
const STEP: u64 = 2;

/// The session answers from memory.
const PATIENCE: TimeVal = TimeVal::new(10, 0);

/// Has room for a value of an extended attribute, the longest answer, and its header.
const ANSWER_BYTES: usize = (64 << 10) + 4096;

/// Answers what was `taken` on `device`, whose kernel agreed on `flags`, by what `file_system` says.
pub fn replay<C: Content>(
    device: &Device,
    file_system: &LayerFs<C>,
    flags: InitFlags,
    taken: Taken,
) -> io::Result<()> {
    let unknown = refuse_unknown(device, &taken)?;
    let (reads, others): (Vec<_>, Vec<_>) =
        taken.requests.into_iter().partition(|(request, _)| request.read().is_some());
    if unknown + reads.len() + others.len() > 0 {
        let (reads, others) = (reads.len(), others.len());
        tracing::info!(reads, others, unknown, "readers wait for what an earlier process began");
    }
    if !others.is_empty() {
        ask(device, file_system.twin(), flags, others)?;
    }
    if !reads.is_empty() {
        let own: Arc<OwnedFd> = Arc::new(device.as_fd().try_clone_to_owned()?);
        for (request, entry) in reads {
            file_system.read_again(&request, Arc::clone(&own), entry);
        }
    }
    Ok(())
}

/// Fails what was taken and isn't written down; how many requests there were.
fn refuse_unknown(device: &Device, taken: &Taken) -> io::Result<usize> {
    if taken.last == 0 {
        return Ok(0);
    }
    let known: BTreeSet<u64> = taken.requests.iter().map(|(request, _)| request.unique()).collect();
    let mut refused = 0;
    for n in 0..=2 * NEAR {
        let unique = taken.last.checked_add(STEP * n).and_then(|n| n.checked_sub(STEP * NEAR));
        if let Some(unique) = unique.filter(|unique| *unique > 0 && !known.contains(unique)) {
            refused += usize::from(give(device, &request::answer(unique, Err(Errno::ESTALE)))?);
        }
    }
    Ok(refused)
}

/// Asks `file_system`, and gives its answers to the kernel. What can't be answered fails.
fn ask<F: Filesystem>(
    device: &Device,
    file_system: F,
    flags: InitFlags,
    requests: Vec<(Request, Entry)>,
) -> io::Result<()> {
    let mut buffer = vec![0; ANSWER_BYTES];
    let mut asked = Asked::new(file_system, flags, &mut buffer);
    for (request, entry) in requests {
        let answer = asked.and_then(|asked| Ok((asked.answer(&request, &mut buffer)?, asked)));
        asked = match answer {
            Ok((len, asked)) => {
                give(device, &buffer[..len])?;
                Ok(asked)
            }
            Err(error) => {
                tracing::warn!(%error, "a request that an earlier process took fails");
                give(device, &request::answer(request.unique(), Err(Errno::ESTALE)))?;
                Err(error)
            }
        };
        drop(entry);
    }
    Ok(())
}

/// Gives an answer to the kernel; whether it waited for it.
fn give(device: &Device, answer: &[u8]) -> io::Result<bool> {
    match write(device, answer) {
        Ok(_) => Ok(true),
        // It doesn't wait for this one, or for none any more.
        Err(nix::Error::ENOENT | nix::Error::ENODEV) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// A session over a socket, which ends when this is dropped.
struct Asked(OwnedFd);

impl Asked {
    /// `buffer`: for its answer to the greeting.
    fn new<F: Filesystem>(file_system: F, flags: InitFlags, buffer: &mut [u8]) -> io::Result<Self> {
        let config = FuseConfig { threads: 1, ..FuseConfig::default() };
        let (kernel, session) = device::greet_over_socket(file_system, flags, &config)?;
        setsockopt(&kernel, ReceiveTimeout, &PATIENCE)?;
        read(&kernel, buffer)?;
        thread::Builder::new().name("fuse-replay".to_owned()).spawn(move || {
            if let Err(error) = session.run() {
                tracing::warn!(%error, "what an earlier process took is not answered in full");
            }
        })?;
        Ok(Self(kernel))
    }

    /// Puts the answer into `buffer`, and says how long it is.
    fn answer(&self, request: &Request, buffer: &mut [u8]) -> io::Result<usize> {
        write(&self.0, request.bytes())?;
        let len = read(&self.0, buffer)?;
        if request::answered(&buffer[..len]) != Some(request.unique()) {
            return Err(io::Error::other("an answer to something else"));
        }
        Ok(len)
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        // It ends anyway, only less politely, when the socket is closed.
        let _ = write(&self.0, &request::farewell()).and_then(|_| read(&self.0, &mut [0; 64]));
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use fuser::{INodeNo, ReplyAttr, ReplyEntry};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::super::journal::Journal;
    use super::super::request::Operation;
    use super::*;

    /// A kernel, and the device that it answers for.
    fn kernel() -> (OwnedFd, Device) {
        let kind = SockType::SeqPacket;
        let (kernel, device) =
            socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        (kernel, Device::left(device))
    }

    /// All that the kernel was told.
    fn told(kernel: OwnedFd) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; ANSWER_BYTES];
        let mut next = || read(&kernel, &mut buffer).ok().map(|len| buffer[..len].to_vec());
        std::iter::from_fn(|| next().filter(|message| !message.is_empty())).collect()
    }

    fn requests(operations: &[(u64, Operation<'_>)]) -> Vec<(Request, Entry)> {
        let recorder = Journal::new().unwrap().recorder(1).unwrap();
        let record = |(unique, operation): &(u64, Operation<'_>)| {
            let request = Request::new(*unique, 1, operation).unwrap();
            let entry = recorder.record(&request).unwrap();
            (request, entry)
        };
        operations.iter().map(record).collect()
    }

    struct Nothing;

    impl Filesystem for Nothing {
        fn lookup(&self, _: &fuser::Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
            assert_eq!(name, "etc");
            reply.error(Errno::ENOENT);
        }

        fn getattr(
            &self,
            _: &fuser::Request,
            _: INodeNo,
            _: Option<fuser::FileHandle>,
            reply: ReplyAttr,
        ) {
            reply.error(Errno::ENODATA);
        }
    }

    #[test]
    fn the_kernel_gets_the_answers_of_the_file_system() {
        let (kernel, device) = kernel();
        let asked = [(6, Operation::Lookup { name: b"etc" }), (10, Operation::GetAttr)];
        ask(&device, Nothing, InitFlags::empty(), requests(&asked)).unwrap();
        drop(device);
        let expected = [(6, Errno::ENOENT), (10, Errno::ENODATA)]
            .map(|(unique, errno)| request::answer(unique, Err(errno)).to_vec());
        assert_eq!(told(kernel), expected);
    }

    #[test]
    fn what_nobody_knows_fails() {
        for last in [6, 2 * 2 * NEAR] {
            let (kernel, device) = kernel();
            let known = requests(&[(4, Operation::GetAttr), (last, Operation::GetAttr)]);
            let telling = thread::spawn(move || {
                refuse_unknown(&device, &Taken { last, requests: known }).unwrap()
            });
            let told: Vec<u64> = told(kernel).iter().filter_map(|t| request::answered(t)).collect();
            assert_eq!(telling.join().unwrap(), told.len());
            let from = last.saturating_sub(2 * NEAR).max(2);
            let expected: Vec<u64> = (from..=last + 2 * NEAR)
                .step_by(2)
                .filter(|unique| *unique != last && *unique != 4)
                .collect();
            assert_eq!(told, expected);
        }
        let (kernel, device) = kernel();
        assert_eq!(refuse_unknown(&device, &Taken::default()).unwrap(), 0);
        drop(device);
        assert!(told(kernel).is_empty());
    }
}
