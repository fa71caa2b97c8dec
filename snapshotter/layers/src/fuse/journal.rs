//! Requests that were taken from `/dev/fuse` and are not answered yet, in memory that outlives the process: for kernels
//! that don't send them to the next process by themselves (before Linux 6.9).
//!
//! Owns: a memfd of words of 8 bytes, which all mounts share. First [`MAGIC`] and the layout; then [`SEATS`] seats, one
//! a mount, each the mount's id, zero if it is free, and the highest number of a request that was taken; then [`SLOTS`]
//! slots, one a request, each the id of its mount, zero if it is free, and the [`Request`]; then [`PAGES`] labels, each
//! the id of a mount, zero if it is free, and the number of the last request in the label's page that is written down;
//! then those pages, in which the kernel writes (see [`buffer`]).
//! Does not own: who keeps the memory (see [`crate::mount`]), what is done about the requests (see [`super::replay`]).
//!
//! Invariants:
//! - The id in a slot is written last and cleared first: a request that is found is whole.
//! - A request is in its slot until it has been answered, and may be a moment longer: the kernel refuses an answer to
//!   what it has one to, and gives no number twice.
//! - What is in a page and not written down yet was taken by a thread that was killed with it.
//! - Whoever finds no slot goes without: that request is lost with the process, the others aren't.

mod buffer;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::request::{MAX_BYTES, Request};
use buffer::PAGE_BYTES;

/// Changes with the layout, so that nobody takes another's for his own.
pub const VERSION: u32 = 1;

const MAGIC: u64 = u64::from_be_bytes(*b"skimmerj");
const LAYOUT: u64 = (VERSION as u64) << 48 | (SEATS as u64) << 32 | SLOTS as u64;

/// Mounts.
const SEATS: usize = 4096;
const SEAT_WORDS: usize = 2;

/// Requests, of all mounts. Most of those that aren't answered at once are reads that wait for bytes.
const SLOTS: usize = 4096;
const SLOT_WORDS: usize = 1 + MAX_BYTES.div_ceil(WORD_BYTES);

/// Threads that take requests, of all mounts.
const PAGES: usize = 4096;
const LABEL_WORDS: usize = 2;

const WORD_BYTES: usize = size_of::<u64>();
const FIRST_SEAT: usize = 2;
const FIRST_SLOT: usize = FIRST_SEAT + SEATS * SEAT_WORDS;
const FIRST_LABEL: usize = FIRST_SLOT + SLOTS * SLOT_WORDS;
const WORDS: usize = FIRST_LABEL + PAGES * LABEL_WORDS;
const FIRST_PAGE: usize = (WORDS * WORD_BYTES).next_multiple_of(PAGE_BYTES);
const BYTES: usize = FIRST_PAGE + PAGES * PAGE_BYTES;

thread_local! {
    /// Where this thread's buffer is, and which page it begins with.
    static BUFFER: Cell<(usize, Option<usize>)> = const { Cell::new((0, None)) };
}

/// See the module's documentation.
pub struct Journal {
    file: File,
    map: MmapRaw,
    free: Mutex<Free>,
    /// Whether it was said that there are more requests than slots.
    is_short: AtomicBool,
}

/// What isn't in use, the next to be taken last.
struct Free {
    seats: Vec<usize>,
    slots: Vec<usize>,
    pages: Vec<usize>,
}

/// Writes down the requests of one mount.
pub struct Recorder {
    journal: Arc<Journal>,
    mount: u64,
    seat: usize,
    /// Those with which its threads' buffers begin.
    pages: Mutex<Vec<usize>>,
}

/// A request that is written down until this is dropped.
pub struct Entry {
    journal: Arc<Journal>,
    slot: usize,
}

/// What an earlier process took of one mount and didn't answer, as far as it is written down.
#[derive(Default)]
pub struct Taken {
    /// The highest number that was taken; zero if it isn't known.
    pub last: u64,
    pub requests: Vec<(Request, Entry)>,
}

/// By mount.
pub type Left = BTreeMap<u64, Taken>;

impl Journal {
    pub fn new() -> io::Result<Arc<Self>> {
        let file = File::from(memfd_create(c"skimmer-requests", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(BYTES as u64)?;
        let journal = Self::open(file)?;
        journal.word(0).store(MAGIC, Ordering::Relaxed);
        journal.word(1).store(LAYOUT, Ordering::Relaxed);
        Ok(journal.found().0)
    }

    /// One that an earlier process wrote, and what it says.
    pub fn left(descriptor: OwnedFd) -> io::Result<(Arc<Self>, Left)> {
        let journal = Self::open(File::from(descriptor))?;
        let said = [0, 1].map(|at| journal.word(at).load(Ordering::Relaxed));
        if said != [MAGIC, LAYOUT] {
            return Err(io::Error::other("a journal of another layout"));
        }
        Ok(journal.found())
    }

    fn open(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        if len != BYTES as u64 {
            return Err(io::Error::other(format!("a journal of {len} bytes")));
        }
        let map = MmapOptions::new().len(WORDS * WORD_BYTES).map_raw(&file)?;
        let free = Free { seats: Vec::new(), slots: Vec::new(), pages: Vec::new() };
        Ok(Self { file, map, free: Mutex::new(free), is_short: AtomicBool::new(false) })
    }

    /// Finds out what is in use.
    fn found(self) -> (Arc<Self>, Left) {
        let journal = Arc::new(self);
        let mut left = Left::new();
        for seat in (0..SEATS).rev() {
            match journal.seat(seat, 0).load(Ordering::Acquire) {
                0 => journal.free().seats.push(seat),
                mount => {
                    let last = journal.seat(seat, 1).load(Ordering::Relaxed);
                    left.entry(mount).or_default().last = last;
                }
            }
        }
        for slot in (0..SLOTS).rev() {
            // From now on it is cleared when nobody needs it any more, which may be at once.
            let entry = Entry { journal: Arc::clone(&journal), slot };
            match journal.slot(slot, 0).load(Ordering::Acquire) {
                0 => {}
                mount => match journal.read(slot) {
                    Some(request) => {
                        left.entry(mount).or_default().requests.push((request, entry));
                    }
                    None => tracing::warn!(mount, "a request that nobody understands was left"),
                },
            }
        }
        for page in (0..PAGES).rev() {
            match journal.label(page, 0).load(Ordering::Acquire) {
                0 => journal.free().pages.push(page),
                mount => {
                    if let Some(found) = journal.rescue(page, mount) {
                        left.entry(mount).or_default().requests.push(found);
                    }
                    journal.let_go(page);
                }
            }
        }
        (journal, left)
    }

    /// Writes down what only the kernel has written.
    fn rescue(self: &Arc<Self>, page: usize, mount: u64) -> Option<(Request, Entry)> {
        let mut bytes = [0; PAGE_BYTES];
        let at = FIRST_PAGE + page * PAGE_BYTES;
        self.file.read_exact_at(&mut bytes, at as u64).ok()?;
        let request = Request::parse(&bytes[buffer::BEGIN..])?;
        let is_new = self.label(page, 1).load(Ordering::Relaxed) != request.unique();
        let slot = if is_new { self.free().slots.pop() } else { None };
        let entry = Entry { journal: Arc::clone(self), slot: slot? };
        self.write(entry.slot, mount, &request);
        Some((request, entry))
    }

    /// A page for the buffer of this thread, which takes requests of `mount`.
    fn lend(&self, mount: u64, buffer: *const u8) -> Option<usize> {
        let page = self.free().pages.pop()?;
        let offset = FIRST_PAGE + page * PAGE_BYTES;
        match buffer::lend(&self.file, offset as u64, buffer) {
            Ok(()) => {
                // Another mount may have had a request of the same number.
                self.label(page, 1).store(0, Ordering::Relaxed);
                self.label(page, 0).store(mount, Ordering::Release);
                Some(page)
            }
            Err(error) => {
                tracing::debug!(mount, %error, "a thread's last request may be lost with it");
                self.let_go(page);
                None
            }
        }
    }

    fn let_go(&self, page: usize) {
        self.label(page, 0).store(0, Ordering::Release);
        self.free().pages.push(page);
    }

    /// For the requests of `mount`; `None`: there are too many mounts.
    pub fn recorder(self: &Arc<Self>, mount: u64) -> Option<Recorder> {
        let mut free = self.free();
        let known = |seat: &usize| self.seat(*seat, 0).load(Ordering::Relaxed) == mount;
        let seat = match (0..SEATS).find(known) {
            Some(seat) => seat,
            None => {
                let seat = free.seats.pop()?;
                self.seat(seat, 1).store(0, Ordering::Relaxed);
                self.seat(seat, 0).store(mount, Ordering::Release);
                seat
            }
        };
        Some(Recorder { journal: Arc::clone(self), mount, seat, pages: Mutex::default() })
    }

    /// Nothing of `mount` has to be known any more.
    pub fn forget(self: &Arc<Self>, mount: u64) {
        let known = |seat: &usize| self.seat(*seat, 0).load(Ordering::Relaxed) == mount;
        if let Some(seat) = (0..SEATS).find(known) {
            self.vacate(seat);
        }
    }

    fn vacate(&self, seat: usize) {
        let mut free = self.free();
        self.seat(seat, 0).store(0, Ordering::Release);
        free.seats.push(seat);
    }

    fn write(&self, slot: usize, mount: u64, request: &Request) {
        for (n, bytes) in request.bytes().chunks(WORD_BYTES).enumerate() {
            let mut word = [0; WORD_BYTES];
            word[..bytes.len()].copy_from_slice(bytes);
            self.slot(slot, 1 + n).store(u64::from_ne_bytes(word), Ordering::Relaxed);
        }
        self.slot(slot, 0).store(mount, Ordering::Release);
    }

    fn read(&self, slot: usize) -> Option<Request> {
        let word = |n| self.slot(slot, n).load(Ordering::Relaxed).to_ne_bytes();
        let bytes: Vec<u8> = (1..SLOT_WORDS).flat_map(word).collect();
        Request::parse(&bytes)
    }

    fn seat(&self, seat: usize, n: usize) -> &AtomicU64 {
        self.word(FIRST_SEAT + seat * SEAT_WORDS + n)
    }

    fn slot(&self, slot: usize, n: usize) -> &AtomicU64 {
        self.word(FIRST_SLOT + slot * SLOT_WORDS + n)
    }

    fn label(&self, page: usize, n: usize) -> &AtomicU64 {
        self.word(FIRST_LABEL + page * LABEL_WORDS + n)
    }

    #[expect(unsafe_code, reason = "the memory is shared with the next process")]
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < WORDS, "word {at} of {WORDS}");
        // SAFETY: the word lies inside the map, which lives as long as `self`, and is aligned, as the map is by pages.
        // Any value is valid, and all that is ever made of the map are such references.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().cast::<u64>().add(at)) }
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Recorder {
    /// This thread takes its requests into `buffer`. To be called from within it, while the buffer is nobody else's.
    pub fn meet(&self, buffer: *const u8) {
        if BUFFER.get().0 != buffer.addr() {
            let page = self.journal.lend(self.mount, buffer);
            self.pages().extend(page);
            BUFFER.set((buffer.addr(), page));
        }
    }

    /// Request `unique` was taken by this thread, and nobody waits for an answer any more than for its entry.
    pub fn took(&self, unique: u64) {
        self.journal.seat(self.seat, 1).fetch_max(unique, Ordering::Relaxed);
        if let (_, Some(page)) = BUFFER.get() {
            self.journal.label(page, 1).store(unique, Ordering::Release);
        }
    }

    /// Writes down `request`, if there is a slot for it.
    pub fn record(&self, request: &Request) -> Option<Entry> {
        let slot = self.journal.free().slots.pop();
        if slot.is_none() && !self.journal.is_short.swap(true, Ordering::Relaxed) {
            tracing::debug!(slots = SLOTS, "more requests wait than can be written down");
        }
        let slot = slot.map(|slot| {
            self.journal.write(slot, self.mount, request);
            Entry { journal: Arc::clone(&self.journal), slot }
        });
        self.took(request.unique());
        slot
    }

    fn pages(&self) -> MutexGuard<'_, Vec<usize>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Recorder {
    /// Its threads have ended, and their buffers with them.
    fn drop(&mut self) {
        let pages = std::mem::take(&mut *self.pages());
        pages.into_iter().for_each(|page| self.journal.let_go(page));
        self.journal.vacate(self.seat);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.journal.slot(self.slot, 0).store(0, Ordering::Release);
        self.journal.free().slots.push(self.slot);
    }
}

#[cfg(test)]
mod tests;
