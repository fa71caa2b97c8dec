//! fanotify's pre-content events (fanotify(7), Linux 6.14): the kernel says which range of a marked file somebody is
//! about to read, and reads it when it is told that it may.
//!
//! An answer names an event by the number that its descriptor had in the process that took the event.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// From the kernel's `linux/fanotify.h`; libc hasn't got them yet.
const FAN_PRE_ACCESS: u64 = 0x0010_0000;
const FAN_EVENT_INFO_TYPE_RANGE: u8 = 6;
const FAN_ERRNO_SHIFT: u32 = 24;

/// `struct fanotify_event_metadata`: length, version, reserved, length of this struct, mask, descriptor, process.
const METADATA_BYTES: usize = 24;
/// `struct fanotify_event_info_header`: type, padding, length.
const INFO_BYTES: usize = 4;
/// `struct fanotify_event_info_range`: the header, padding, offset, count.
const RANGE_BYTES: usize = 24;

/// An event of this kind takes so many bytes.
pub const EVENT_BYTES: usize = METADATA_BYTES + RANGE_BYTES;

/// Somebody is about to read, and waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Of the file's descriptor in the process that took the event.
    pub number: RawFd,
    /// What is about to be read; `None` if the kernel didn't say.
    pub range: Option<Range<u64>>,
}

/// The event at the start of `bytes`; `None`: there is none. Pure.
pub fn parse(bytes: &[u8]) -> Option<Event> {
    let number = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let len = usize::try_from(number(0)?).ok()?;
    let bytes = bytes.get(..len)?;
    let (version, first_info) = (*bytes.get(4)?, bytes.get(6..8)?.try_into().ok());
    if len < METADATA_BYTES || version != libc::FANOTIFY_METADATA_VERSION {
        return None;
    }
    let number = RawFd::from_ne_bytes(bytes.get(16..20)?.try_into().ok()?);
    let mut at = usize::from(u16::from_ne_bytes(first_info?));
    let mut range = None;
    while let Some(info) = bytes.get(at..).filter(|info| info.len() >= INFO_BYTES) {
        let len = usize::from(u16::from_ne_bytes([info[2], info[3]]));
        if info[0] == FAN_EVENT_INFO_TYPE_RANGE {
            range = range_of(info);
        }
        // One without a length would be looked at for ever.
        at += len.max(INFO_BYTES);
    }
    Some(Event { number, range })
}

fn range_of(info: &[u8]) -> Option<Range<u64>> {
    let word = |at: usize| info.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
    let (offset, count) = (word(8)?, word(16)?);
    Some(offset..offset.checked_add(count)?)
}

/// A group: what is marked, and the events that come of it.
#[derive(Debug)]
pub struct Group {
    descriptor: OwnedFd,
}

impl Group {
    /// Nothing is marked. Takes CAP_SYS_ADMIN.
    #[expect(unsafe_code, reason = "nix doesn't know this class without its limits")]
    pub fn new() -> io::Result<Self> {
        // An event that finds the queue full is allowed unseen: so there is no limit. Events wait in the kernel for
        // those who wait for them, of whom there are so many.
        let flags = libc::FAN_CLASS_PRE_CONTENT
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_UNLIMITED_QUEUE
            | libc::FAN_UNLIMITED_MARKS;
        let opens = (libc::O_RDONLY | libc::O_LARGEFILE | libc::O_CLOEXEC).cast_unsigned();
        // SAFETY: the call takes no pointers.
        let number = unsafe { libc::fanotify_init(flags, opens) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened it for us.
        Ok(Self { descriptor: unsafe { OwnedFd::from_raw_fd(number) } })
    }

    /// One that an earlier process made, with its marks and its events.
    pub const fn left(descriptor: OwnedFd) -> Self {
        Self { descriptor }
    }

    /// From now on, whoever opens `file` raises an event before each read and write. Who has it open does not.
    pub fn mark(&self, file: &File) -> io::Result<()> {
        self.change(libc::FAN_MARK_ADD, file)
    }

    /// Nobody raises events by `file` any more.
    pub fn unmark(&self, file: &File) -> io::Result<()> {
        match self.change(libc::FAN_MARK_REMOVE, file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    #[expect(unsafe_code, reason = "nix doesn't know this event")]
    fn change(&self, how: libc::c_uint, file: &File) -> io::Result<()> {
        let (group, file) = (self.descriptor.as_raw_fd(), file.as_raw_fd());
        // SAFETY: without a path the call is about the open file; it takes no other pointer.
        let done =
            unsafe { libc::fanotify_mark(group, how, FAN_PRE_ACCESS, file, std::ptr::null()) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The event that this process knows by `number` is over: its reader reads, or gets EIO.
    pub fn answer(&self, number: RawFd, allow: bool) -> io::Result<()> {
        let eio = libc::EIO.cast_unsigned() << FAN_ERRNO_SHIFT;
        let response = if allow { libc::FAN_ALLOW } else { libc::FAN_DENY | eio };
        let bytes = [number.to_ne_bytes(), response.to_ne_bytes()].concat();
        match nix::unistd::write(&self.descriptor, &bytes) {
            // Whoever waited was killed, or got this answer before.
            Ok(_) | Err(nix::errno::Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, proptest};

    /// As the kernel writes it: `infos` are types with what follows their header's four bytes.
    fn event(number: i32, infos: &[(u8, Vec<u8>)]) -> Vec<u8> {
        let mut tail = Vec::new();
        for (kind, body) in infos {
            let len = u16::try_from(INFO_BYTES + body.len()).unwrap();
            tail.extend([*kind, 0]);
            tail.extend(len.to_ne_bytes());
            tail.extend(body);
        }
        let len = u32::try_from(METADATA_BYTES + tail.len()).unwrap();
        let mut out = len.to_ne_bytes().to_vec();
        out.extend([libc::FANOTIFY_METADATA_VERSION, 0]);
        out.extend(24u16.to_ne_bytes());
        out.extend(FAN_PRE_ACCESS.to_ne_bytes());
        out.extend(number.to_ne_bytes());
        out.extend(4711i32.to_ne_bytes());
        out.extend(tail);
        out
    }

    fn range(offset: u64, count: u64) -> (u8, Vec<u8>) {
        let body = [&[0; 4][..], &offset.to_ne_bytes(), &count.to_ne_bytes()].concat();
        (FAN_EVENT_INFO_TYPE_RANGE, body)
    }

    #[test]
    fn events_say_what_is_about_to_be_read() {
        let whole = event(9, &[range(4096, 512)]);
        assert_eq!(whole.len(), EVENT_BYTES);
        let expected = Event { number: 9, range: Some(4096..4608) };
        assert_eq!(parse(&whole), Some(expected.clone()));
        let padded = [&whole[..], &[0xff; 40]].concat();
        assert_eq!(parse(&padded), Some(expected), "what follows is another's");
        let other = (1, vec![7; 12]);
        assert_eq!(parse(&event(3, &[other, range(0, 1)])).unwrap().range, Some(0..1));
        assert_eq!(parse(&event(3, &[])).unwrap().range, None);
        assert_eq!(parse(&event(3, &[range(u64::MAX, 2)])).unwrap().range, None);
        assert_eq!(parse(&whole[..EVENT_BYTES - 1]), None);
        assert_eq!(parse(&[0; 64]), None, "nothing was read here");
        let mut newer = whole;
        newer[4] += 1;
        assert_eq!(parse(&newer), None);
    }

    proptest! {
        #[test]
        fn any_bytes_do(bytes in any::<Vec<u8>>(), len in 0..80u32) {
            let _ = parse(&bytes);
            let mut bytes = bytes;
            bytes.splice(0..bytes.len().min(4), len.to_ne_bytes());
            let _ = parse(&bytes);
        }
    }
}
