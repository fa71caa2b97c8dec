//! The events that were taken from the kernel and are not answered yet, in memory that outlives the process.
//!
//! A memfd of slots, mapped: the kernel itself writes an event into its slot, so that there is no moment at which it
//! is taken and nowhere. A slot is [`SLOT_BYTES`] long: the event as the kernel gives it, in
//! [`AREA_BYTES`]; then device and inode number of its file, 8 bytes each, zero until they are known. A slot whose
//! first four bytes, the event's length, are zero is free.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::fanotify::{EVENT_BYTES, Event, parse};

/// Changes with the layout, so that nobody takes another's for his own.
pub const VERSION: u32 = 1;

/// Has room for one event, and not for two: each read takes one.
const AREA_BYTES: usize = EVENT_BYTES + 24;
const SLOT_BYTES: usize = AREA_BYTES + 2 * 8;

/// Events that may be taken and not answered: as many readers wait in this process, more in the kernel.
const SLOTS: usize = 16 << 10;

/// Each takes a descriptor: others need some too.
const DESCRIPTORS_SHARE: i64 = 4;

/// Which file it is, as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    pub device: u64,
    pub inode: u64,
}

impl FileId {
    pub fn of(file: BorrowedFd<'_>) -> io::Result<Self> {
        let stat = nix::sys::stat::fstat(file)?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// The place of one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(pub(super) usize);

/// An event that an earlier process took.
#[derive(Debug, PartialEq, Eq)]
pub struct LeftEvent {
    pub slot: Slot,
    pub event: Event,
    /// `None`: that process ended before it knew.
    pub file: Option<FileId>,
}

pub struct Journal {
    file: File,
    map: MmapRaw,
    free: Mutex<Vec<Slot>>,
}

impl Journal {
    pub fn new() -> io::Result<Self> {
        let file = File::from(memfd_create(c"skimmer-journal", MFdFlags::MFD_CLOEXEC)?);
        file.set_len((SLOTS * SLOT_BYTES) as u64)?;
        Self::open(file).map(|(journal, _)| journal)
    }

    /// One that an earlier process wrote, and what was not answered.
    pub fn left(descriptor: OwnedFd) -> io::Result<(Self, Vec<LeftEvent>)> {
        Self::open(File::from(descriptor))
    }

    fn open(file: File) -> io::Result<(Self, Vec<LeftEvent>)> {
        let len = file.metadata()?.len();
        let bytes = usize::try_from(len).ok().filter(|len| *len > 0 && len % SLOT_BYTES == 0);
        let bytes = bytes.ok_or_else(|| io::Error::other(format!("a journal of {len} bytes")))?;
        // An earlier process may have made it for more or fewer.
        let slots = bytes / SLOT_BYTES;
        let map = MmapOptions::new().len(bytes).populate().map_raw(&file)?;
        // The kernel fails an event that it can't write: the pages have to stay.
        map.lock()?;
        let descriptors = nix::unistd::sysconf(nix::unistd::SysconfVar::OPEN_MAX)?;
        let bound =
            descriptors.map_or(slots, |n| usize::try_from(n / DESCRIPTORS_SHARE).unwrap_or(1));
        let journal = Self { file, map, free: Mutex::default() };
        let mut left = Vec::new();
        for slot in (0..slots).rev().map(Slot) {
            match journal.event(slot) {
                Some(event) => left.push(LeftEvent { slot, event, file: journal.file_of(slot) }),
                None if journal.free().len() < bound.max(1) => journal.clear(slot),
                None => {}
            }
        }
        Ok((journal, left))
    }

    /// A slot for the next event; `None` as long as there is none.
    pub fn take(&self) -> Option<Slot> {
        self.free().pop()
    }

    /// How many slots are free.
    pub fn room(&self) -> usize {
        self.free().len()
    }

    /// Has the kernel write the next event into `slot`, which goes back if there is none.
    #[expect(unsafe_code, reason = "the kernel writes to memory that others may have mapped")]
    pub fn read(&self, slot: Slot, group: BorrowedFd<'_>) -> io::Result<Option<Event>> {
        let area = self.at(slot, 0);
        // SAFETY: the area lies inside the map, which lives as long as `self`; no reference to it exists.
        let read = unsafe { libc::read(group.as_raw_fd(), area.cast(), AREA_BYTES) };
        if read > 0 {
            let event = self.event(slot);
            return event
                .map(Some)
                .ok_or_else(|| io::Error::other("an event that nobody understands"));
        }
        let error = io::Error::last_os_error();
        self.clear(slot);
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        }
    }

    /// Remembers which file the event in `slot` is about.
    pub fn identify(&self, slot: Slot, file: FileId) {
        self.write(slot, AREA_BYTES, &file.device.to_ne_bytes());
        self.write(slot, AREA_BYTES + 8, &file.inode.to_ne_bytes());
    }

    /// The event in `slot` is answered.
    pub fn clear(&self, slot: Slot) {
        self.write(slot, 0, &[0; 4]);
        self.write(slot, AREA_BYTES, &[0; 16]);
        self.free().push(slot);
    }

    fn event(&self, slot: Slot) -> Option<Event> {
        parse(&self.copy::<AREA_BYTES>(slot, 0))
    }

    fn file_of(&self, slot: Slot) -> Option<FileId> {
        let word = |at| u64::from_ne_bytes(self.copy::<8>(slot, AREA_BYTES + at));
        let (device, inode) = (word(0), word(8));
        (inode != 0).then_some(FileId { device, inode })
    }

    #[expect(unsafe_code, reason = "the memory is shared with the kernel, and has no references")]
    fn copy<const N: usize>(&self, slot: Slot, offset: usize) -> [u8; N] {
        // SAFETY: the bytes lie inside the slot, hence inside the map; any bytes are valid. Nobody writes to a slot
        // but who holds it.
        unsafe { self.at(slot, offset).cast::<[u8; N]>().read_unaligned() }
    }

    #[expect(unsafe_code, reason = "the memory is shared with the kernel, and has no references")]
    fn write(&self, slot: Slot, offset: usize, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            // SAFETY: as above. Volatile, because whoever reads it next may be another process.
            unsafe { self.at(slot, offset + n).write_volatile(*byte) }
        }
    }

    /// A place inside the map: `offset` is one inside a slot.
    fn at(&self, slot: Slot, offset: usize) -> *mut u8 {
        self.map.as_mut_ptr().wrapping_add(slot.0 * SLOT_BYTES + offset)
    }

    fn free(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    /// What a kernel would write of a read of `4096..4608` by descriptor `number`.
    fn event(number: i32) -> Vec<u8> {
        let mut out = 48u32.to_ne_bytes().to_vec();
        out.extend([libc::FANOTIFY_METADATA_VERSION, 0, 24, 0]);
        out.extend([0; 8]);
        out.extend(number.to_ne_bytes());
        out.extend([0; 4]);
        out.extend([6, 0, 24, 0, 0, 0, 0, 0]);
        out.extend(4096u64.to_ne_bytes());
        out.extend(512u64.to_ne_bytes());
        out
    }

    #[test]
    fn what_was_not_answered_is_found_by_the_next_process() {
        let kind = SockType::SeqPacket;
        let flags = SockFlag::SOCK_NONBLOCK;
        let (kernel, group) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        let journal = Journal::new().unwrap();
        let read = || {
            let slot = journal.take().unwrap();
            journal.read(slot, group.as_fd()).unwrap().map(|event| (slot, event))
        };
        assert_eq!(read(), None);
        for number in [5, 6, 7] {
            nix::unistd::write(&kernel, &event(number)).unwrap();
        }
        let (answered, _) = read().unwrap();
        let (known, first) = read().unwrap();
        let (unknown, second) = read().unwrap();
        assert_eq!(first, Event { number: 6, range: Some(4096..4608) });
        let file = FileId { device: 2049, inode: 77 };
        journal.identify(answered, file);
        journal.identify(known, file);
        journal.clear(answered);
        let kept = journal.as_fd().try_clone_to_owned().unwrap();
        drop(journal);
        let (journal, mut left) = Journal::left(kept).unwrap();
        left.sort_by_key(|left| left.event.number);
        let expected = [
            LeftEvent { slot: known, event: first, file: Some(file) },
            LeftEvent { slot: unknown, event: second, file: None },
        ];
        assert_eq!(left, expected);
        let slots: Vec<_> = std::iter::from_fn(|| journal.take()).collect();
        assert!(!slots.contains(&known) && !slots.contains(&unknown) && slots.contains(&answered));
    }

    #[test]
    fn another_file_is_no_journal() {
        let file = tempfile::tempfile().unwrap();
        assert!(Journal::left(file.try_clone().unwrap().into()).is_err());
        file.set_len(3 * SLOT_BYTES as u64 + 1).unwrap();
        assert!(Journal::left(file.into()).is_err());
    }

    #[test]
    fn an_earlier_journal_has_the_slots_that_it_has() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * SLOT_BYTES as u64).unwrap();
        let (journal, left) = Journal::left(file.into()).unwrap();
        assert_eq!((journal.room(), left), (3, Vec::new()));
    }
}
