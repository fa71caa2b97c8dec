//! Incomplete layers, served by the kernel: it asks before it reads of a data file, and what it is about to read is
//! put there first.
//!
//! Owns: the group of events, the journal of those that are not answered, which files are marked, the thread that
//! takes events.
//! Does not own: how bytes come (a [`Filler`]'s), the mounts.
//!
//! Invariants: no reader ever gets the zeros of a hole.
//! - A file is marked before it is mounted: what was opened earlier raises no events.
//! - It is written only by what was opened before it was marked; that descriptor is kept for the next process, as that
//!   one's own writes would raise events otherwise.
//! - Group and journal are kept before anything is marked, and for good: when nobody has the group any more, the kernel
//!   lets everybody read.
//! - An event is in the journal from the moment at which the kernel gives it away until it is answered. While one is
//!   unanswered, no other can have its number; or, if an earlier process took it, none is answered without it
//!   ([`left`]).
//! - A mark goes when the file is complete, or when nobody but us has it open.
//! - The thread that takes events never waits for bytes, nor for long for a slot: those who wait for one file are
//!   never more than there are slots for others.

mod entry;
pub mod fanotify;
mod journal;
mod left;
mod numbers;
mod ticket;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::stat::Mode;
use skimmer_keeper::Keeper;

use super::error_chain;
use entry::{Entry, begin};
use fanotify::Group;
pub use journal::{FileId, VERSION};
use journal::{Journal, LeftEvent, Slot};
use left::LeftNumbers;
use numbers::Number;
use ticket::Ticket;

/// How often it is looked whether somebody still uses what was unmounted; also the pause after a failure.
const LOOK_MS: u16 = 1000;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("ask for pre-content events (Linux 6.14 has them; needs CAP_SYS_ADMIN)")]
    Group { source: io::Error },
    #[error("make a journal of events")]
    Journal { source: io::Error },
    #[error("have the file system of {place} tell of reads (ext4, XFS and btrfs can)")]
    FileSystem { place: String, source: io::Error },
    #[error("mark a data file")]
    Mark { source: io::Error },
    #[error("the data file is another than the one that an earlier process mounted")]
    Replaced,
    #[error("have descriptors kept")]
    Keep { source: skimmer_keeper::Error },
    #[error("start the thread that takes events")]
    Thread { source: io::Error },
}

/// Puts bytes into one data file.
pub trait Filler: Send + Sync + 'static {
    /// The data file, as it was opened before it was marked.
    fn file(&self) -> &File;

    /// Somebody reads `range`. Whether it is there, for good.
    fn has(&self, range: &Range<u64>) -> bool;

    /// Gets `range`, and says whether it is there now. Returns at once.
    fn fill(self: Arc<Self>, range: Range<u64>, done: Box<dyn FnOnce(bool) + Send>);
}

/// What an earlier process left with the keeper.
#[derive(Debug, Default)]
pub struct LeftPrefill {
    pub group: Option<OwnedFd>,
    pub journal: Option<OwnedFd>,
}

/// See the module's documentation. Dropping it leaves what is unanswered to the next process.
pub struct Prefill {
    inner: Arc<Inner>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Inner {
    group: Group,
    journal: Journal,
    wake: EventFd,
    keeper: Option<Arc<dyn Keeper>>,
    files: Mutex<BTreeMap<FileId, Entry>>,
    /// Nothing is taken or answered any more.
    stopped: AtomicBool,
    /// The thread waits for a slot.
    starved: AtomicBool,
    /// Of an earlier process's events.
    left: Mutex<LeftNumbers>,
    /// Files that have become complete: what was asked before that is there.
    finished: Mutex<BTreeSet<FileId>>,
}

impl Prefill {
    /// Whether it can be done for files in the file system of directory `dir`.
    pub fn probe(dir: &std::path::Path) -> Result<(), Error> {
        let group = Group::new().map_err(|source| Error::Group { source })?;
        let place = || dir.display().to_string();
        let failed = |source| Error::FileSystem { place: place(), source };
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let file = nix::fcntl::open(dir, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|errno| failed(errno.into()))?;
        group.mark(&file.into()).map_err(failed)
    }

    /// Takes over from an earlier process, or begins. `names`: of group and journal, for the keeper; without one, only
    /// what an earlier process left is served. Nothing is taken before [`Prefill::start`].
    pub fn open(
        left: LeftPrefill,
        keeper: Option<Arc<dyn Keeper>>,
        names: [&str; 2],
    ) -> Result<(Self, LeftEvents), Error> {
        // What was left is kept already, and at no moment not: then nobody might have it.
        let [group_name, journal_name] = names;
        let group = match left.group {
            Some(descriptor) => Group::left(descriptor),
            None => {
                let group = Group::new().map_err(|source| Error::Group { source })?;
                keep(keeper.as_ref(), group_name, group.as_fd())?;
                group
            }
        };
        let failed = |source| Error::Journal { source };
        let (journal, events) = match left.journal {
            Some(descriptor) => Journal::left(descriptor).map_err(failed)?,
            None => {
                let journal = Journal::new().map_err(failed)?;
                keep(keeper.as_ref(), journal_name, journal.as_fd())?;
                (journal, Vec::new())
            }
        };
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let wake = wake.map_err(|errno| Error::Thread { source: errno.into() })?;
        // Before anything else takes the numbers.
        let mut left = LeftNumbers::new(events.iter().map(|left| left.event.number));
        left.reserve(wake.as_fd());
        let inner = Inner {
            group,
            journal,
            wake,
            keeper,
            files: Mutex::default(),
            stopped: AtomicBool::new(false),
            starved: AtomicBool::new(false),
            left: Mutex::new(left),
            finished: Mutex::default(),
        };
        numbers::ignore_lease_breaks();
        Ok((Self { inner: Arc::new(inner), thread: Mutex::default() }, LeftEvents(events)))
    }

    /// Events are taken from now on. All that was left has to be known.
    pub fn start(&self, left: LeftEvents) -> Result<(), Error> {
        self.inner.take_over(left.0);
        let inner = Arc::clone(&self.inner);
        let thread = thread::Builder::new()
            .name("prefill".to_owned())
            .spawn(move || inner.run())
            .map_err(|source| Error::Thread { source })?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    /// A descriptor of a data file that an earlier process marked, kept under `name`. `mounted`: somebody
    /// [will serve](Prefill::resume) it, once for each time that this is said, and its readers wait; else they get
    /// errors.
    pub fn expect(&self, file: File, name: String, mounted: bool) -> io::Result<FileId> {
        let id = FileId::of(file.as_fd())?;
        let mut files = self.inner.files();
        self.inner.finished().remove(&id);
        let entry = files.entry(id).or_insert_with(|| Entry::new(file, name.clone()));
        if !entry.kept.contains(&name) {
            entry.kept.push(name);
        }
        entry.mounts += usize::from(mounted);
        Ok(id)
    }

    /// Serves a file that was [expected](Prefill::expect), which is marked once more in case that the mark was lost.
    pub fn resume(&self, id: FileId, filler: &Arc<dyn Filler>) -> Result<(), Error> {
        if !FileId::of(filler.file().as_fd()).is_ok_and(|found| found == id) {
            return Err(Error::Replaced);
        }
        let waiting = {
            let mut files = self.inner.files();
            self.inner.group.mark(filler.file()).map_err(|source| Error::Mark { source })?;
            let Some(entry) = files.get_mut(&id) else { return Ok(()) };
            entry.filler = Some(Arc::clone(filler));
            std::mem::take(&mut entry.waiting)
        };
        waiting.into_iter().for_each(|(range, ticket)| begin(filler, range, ticket));
        Ok(())
    }

    /// Marks the file of `filler`, which is then to be mounted, and serves it. Its descriptor is kept under `name`, or
    /// under that which it has from an earlier mount: nobody keeps one twice. The second is the name that it has.
    pub fn serve(&self, filler: &Arc<dyn Filler>, name: String) -> Result<(FileId, String), Error> {
        let failed = |source| Error::Mark { source };
        let id = FileId::of(filler.file().as_fd()).map_err(failed)?;
        if let Some(entry) = self.inner.files().get_mut(&id) {
            return self.inner.add_mount(entry, filler).map(|name| (id, name));
        }
        let file = filler.file().try_clone().map_err(failed)?;
        keep(self.inner.keeper.as_ref(), &name, file.as_fd())?;
        let mut files = self.inner.files();
        self.inner.finished().remove(&id);
        let entry = files.entry(id).or_insert_with(|| Entry::new(file, name));
        self.inner.add_mount(entry, filler).map(|name| (id, name))
    }

    /// The file is complete: nobody is asked any more before it is read.
    pub fn finish(&self, id: FileId) -> Result<(), Error> {
        let mut files = self.inner.files();
        let Some(entry) = files.get(&id) else { return Ok(()) };
        self.inner.group.unmark(&entry.file).map_err(|source| Error::Mark { source })?;
        // Those who asked before may still wait to be taken.
        self.inner.finished().insert(id);
        let finished = files.remove(&id);
        drop(files);
        if let Some(entry) = finished {
            self.inner.forget(&entry);
        }
        Ok(())
    }

    /// One mount of the file is gone from the directory of mounts. Who has files open on it is still served.
    pub fn unmounted(&self, id: FileId) {
        let mut files = self.inner.files();
        if let Some(entry) = files.get_mut(&id) {
            entry.mounts = entry.mounts.saturating_sub(1);
            if entry.mounts == 0 {
                entry.waiting.clear();
            }
        }
        drop(files);
        self.inner.reap();
        self.inner.wake();
    }

    /// Whether all that was unmounted is unused by now.
    pub fn is_settled(&self) -> bool {
        self.inner.reap();
        self.inner.files().is_empty()
    }

    /// What is not answered yet is the next process's.
    pub fn leave(&self) {
        self.inner.stopped.store(true, Ordering::Release);
        self.inner.wake();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that takes events ended by mistake");
        }
    }
}

impl Drop for Prefill {
    fn drop(&mut self) {
        self.leave();
    }
}

/// What an earlier process took and didn't answer.
pub struct LeftEvents(Vec<LeftEvent>);

impl Inner {
    /// One more mount of the file of `entry`, which `filler` serves from now on. The name under which it is kept.
    fn add_mount(&self, entry: &mut Entry, filler: &Arc<dyn Filler>) -> Result<String, Error> {
        self.group.mark(filler.file()).map_err(|source| Error::Mark { source })?;
        entry.mounts += 1;
        entry.filler = Some(Arc::clone(filler));
        Ok(entry.kept[0].clone())
    }

    /// The thread that takes events.
    fn run(self: &Arc<Self>) {
        while !self.is_stopped() {
            let hungry = !self.is_starved();
            let idle =
                if self.has_unmounted() { PollTimeout::from(LOOK_MS) } else { PollTimeout::NONE };
            let mut polled = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
            if hungry {
                polled.push(PollFd::new(self.group.as_fd(), PollFlags::POLLIN));
            }
            // A failure shows when events are read.
            let _ = poll(&mut polled, idle);
            // It is empty, or is made so.
            let _ = self.wake.read();
            self.reap();
            if hungry {
                self.take_all();
            }
        }
    }

    /// Takes events for as long as there are any, and slots for them.
    fn take_all(self: &Arc<Self>) {
        while !self.is_stopped() {
            match self.take_one() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::error!(%error, "events of readers can't be taken, trying again");
                    return thread::sleep(std::time::Duration::from_millis(LOOK_MS.into()));
                }
            }
        }
    }

    /// Takes one event and begins on it; whether there was one.
    fn take_one(self: &Arc<Self>) -> io::Result<bool> {
        self.starved.store(true, Ordering::Release);
        let Some(slot) = self.journal.take() else { return Ok(false) };
        self.starved.store(false, Ordering::Release);
        let event = {
            let (mut finished, mut left) = (self.finished(), self.left());
            left.reserve(self.wake.as_fd());
            let event = self.journal.read(slot, self.group.as_fd())?;
            match &event {
                Some(event) => left.join(event.number),
                // Nobody waits who asked before they were.
                None => finished.clear(),
            }
            event
        };
        let Some(event) = event else { return Ok(false) };
        let number = Number::taken(event.number);
        let file = number.file().and_then(FileId::of);
        let ticket = Ticket::new(self, slot, number, 1);
        let file = file?;
        self.journal.identify(slot, file);
        // As many for each as there is room for others: so there always is some.
        self.begin(file, event.range, &ticket, self.journal.room());
        Ok(true)
    }

    /// Begins on what a reader waits for, unless more than `limit` would wait for this file. Dropping the ticket, which
    /// nobody has filled, is an error for the reader.
    fn begin(&self, id: FileId, range: Option<Range<u64>>, ticket: &Arc<Ticket>, limit: usize) {
        let Some(range) = range else { return };
        let (filler, admitted) = {
            let mut files = self.files();
            let Some(entry) = files.get_mut(&id) else {
                if self.finished().contains(&id) {
                    ticket.filled();
                }
                return;
            };
            let admitted = entry.admit(&range, ticket, limit);
            (entry.filler.clone(), admitted)
        };
        let Some(filler) = filler else { return };
        if admitted {
            begin(&filler, range, Arc::clone(ticket));
        } else if filler.has(&range) {
            ticket.filled();
        }
    }

    /// Begins on what an earlier process took. If that one ended before it knew the file, the range is had in all: so
    /// it is there, whichever it was.
    fn take_over(self: &Arc<Self>, left: Vec<LeftEvent>) {
        for LeftEvent { slot, event, file } in left {
            let expected =
                || self.files().iter().filter(|(_, e)| e.mounts > 0).map(|(id, _)| *id).collect();
            let files: Vec<FileId> = file.map_or_else(expected, |file| vec![file]);
            let number = Number::left(event.number);
            let ticket = Ticket::new(self, slot, number, files.len().max(1));
            tracing::info!(range = ?event.range, files = files.len(), "a reader waits for what an earlier process began");
            for file in files {
                self.begin(file, event.range.clone(), &ticket, usize::MAX);
            }
        }
    }

    /// Answers the event in `slot`, unless another of its number is still worked on: then that is answered with it.
    fn settle(&self, number: RawFd, slot: Slot, filled: bool) -> io::Result<()> {
        // Nothing is taken meanwhile that could have the number.
        let mut left = self.left();
        let Some(due) = left.settle(number, slot, filled) else { return Ok(()) };
        for _ in &due.slots {
            self.group.answer(number, due.allow)?;
        }
        left.forget(number);
        drop(left);
        due.slots.into_iter().for_each(|slot| self.journal.clear(slot));
        Ok(())
    }

    /// Forgets files that nobody but us has open any more.
    fn reap(&self) {
        let mut files = self.files();
        let unused = |entry: &Entry| entry.mounts == 0 && numbers::only_we_have(&entry.file);
        let ids: Vec<FileId> =
            files.iter().filter(|(_, entry)| unused(entry)).map(|(id, _)| *id).collect();
        let gone: Vec<Entry> = ids.iter().filter_map(|id| files.remove(id)).collect();
        for entry in &gone {
            if let Err(error) = self.group.unmark(&entry.file) {
                tracing::warn!(%error, "a data file that nobody uses stays marked");
            }
            self.forget(entry);
        }
        drop(files);
    }

    /// Nobody needs the kept descriptors of `entry`.
    fn forget(&self, entry: &Entry) {
        let Some(keeper) = &self.keeper else { return };
        for name in &entry.kept {
            if let Err(error) = keeper.release(name) {
                tracing::warn!(
                    name,
                    error = error_chain(&error),
                    "the descriptor of a data file stays kept"
                );
            }
        }
    }

    fn has_unmounted(&self) -> bool {
        self.files().values().any(|entry| entry.mounts == 0)
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn is_starved(&self) -> bool {
        self.starved.load(Ordering::Acquire)
    }

    fn wake(&self) {
        // It can only be full, which wakes as well.
        let _ = self.wake.write(1);
    }

    /// Never held while the files are waited for.
    fn finished(&self) -> MutexGuard<'_, BTreeSet<FileId>> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never held while one of the others is waited for.
    fn left(&self) -> MutexGuard<'_, LeftNumbers> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<FileId, Entry>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn keep(
    keeper: Option<&Arc<dyn Keeper>>,
    name: &str,
    descriptor: BorrowedFd<'_>,
) -> Result<(), Error> {
    let Some(keeper) = keeper else { return Ok(()) };
    keeper.keep(name, descriptor).map_err(|source| {
        // Nothing is served by what isn't kept: nor is it to be kept later. Who can't be asked has nothing.
        let _ = keeper.release(name);
        Error::Keep { source }
    })
}
