//! What [`crate::Holder`] and [`crate::hold`] say to each other: messages of a SOCK_SEQPACKET unix socket.
//!
//! A message is one letter and a text. Asked: `K` name (with one descriptor: keep it), `R` name (release it), `L`
//! (list). Answered: `k`, `r`; for a list one `f` name with a descriptor each, then `l`; or `e` and why not.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// Longest name of a descriptor, in bytes.
pub const MAX_NAME: usize = 200;

/// Longest message.
const MAX_LEN: usize = 1 + 4 * MAX_NAME;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("send a message")]
    Send { source: nix::Error },
    #[error("receive a message")]
    Receive { source: nix::Error },
    #[error("the connection has ended")]
    Ended,
    #[error("a message that nobody understands")]
    Message,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    Keep(String),
    Release(String),
    List,
    Kept,
    Released,
    Found(String),
    Listed,
    Refused(String),
}

impl Message {
    fn encode(&self) -> Vec<u8> {
        let (letter, text) = match self {
            Self::Keep(name) => (b'K', name.as_str()),
            Self::Release(name) => (b'R', name.as_str()),
            Self::List => (b'L', ""),
            Self::Kept => (b'k', ""),
            Self::Released => (b'r', ""),
            Self::Found(name) => (b'f', name.as_str()),
            Self::Listed => (b'l', ""),
            Self::Refused(reason) => (b'e', reason.as_str()),
        };
        let text = &text.as_bytes()[..text.len().min(MAX_LEN - 1)];
        [&[letter], text].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (letter, text) = bytes.split_first()?;
        let text = || std::str::from_utf8(text).ok().map(str::to_owned);
        Some(match letter {
            b'K' => Self::Keep(text()?),
            b'R' => Self::Release(text()?),
            b'L' => Self::List,
            b'k' => Self::Kept,
            b'r' => Self::Released,
            b'f' => Self::Found(text()?),
            b'l' => Self::Listed,
            b'e' => Self::Refused(text()?),
            _ => return None,
        })
    }
}

pub fn send(
    socket: BorrowedFd<'_>,
    message: &Message,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), Error> {
    let bytes = message.encode();
    let fds: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    // Whoever is at the other end may be gone: that is an error, not a signal.
    let flags = MsgFlags::MSG_NOSIGNAL;
    let parts = [IoSlice::new(&bytes)];
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &parts, control, flags, None)
        .map_err(|source| Error::Send { source })?;
    Ok(())
}

/// The next message, with the descriptor that came along.
#[expect(unsafe_code, reason = "received descriptors come as numbers")]
pub fn receive(socket: BorrowedFd<'_>) -> Result<(Message, Option<OwnedFd>), Error> {
    let mut bytes = [0; MAX_LEN];
    let mut control = nix::cmsg_space!([RawFd; 4]);
    let (len, fds) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received =
            recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)
                .map_err(|source| Error::Receive { source })?;
        let mut fds = Vec::new();
        for part in received.cmsgs().map_err(|source| Error::Receive { source })? {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                // SAFETY: the kernel has just opened them for us, and nobody else knows of them.
                fds.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (received.bytes, fds)
    };
    if len == 0 {
        return Err(Error::Ended);
    }
    let message = Message::decode(&bytes[..len]).ok_or(Error::Message)?;
    Ok((message, fds.into_iter().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_as_they_were() {
        for message in [
            Message::Keep("fuse.1".to_owned()),
            Message::Release("fuse.1".to_owned()),
            Message::List,
            Message::Kept,
            Message::Released,
            Message::Found("x".repeat(MAX_NAME)),
            Message::Listed,
            Message::Refused("why".to_owned()),
        ] {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        for wrong in [&b""[..], b"Z", b"K\xff"] {
            assert_eq!(Message::decode(wrong), None, "{wrong:?}");
        }
    }
}
