//! What asks before a file is read, by itself: files that are filled when a test says so.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use skimmer_keeper::Lasts;
use skimmer_layers::mount::prefill::{Filler, LeftPrefill, Prefill};

use crate::folders::Folder;
use crate::keeper::{Keeper, SLOT_BYTES};
use crate::prefill::{PATIENCE, kernel_asks};

/// A file that is filled when the test says so.
struct Slow {
    file: File,
    asked: Mutex<mpsc::Sender<Box<dyn FnOnce(bool) + Send>>>,
}

impl Filler for Slow {
    fn file(&self) -> &File {
        &self.file
    }

    fn has(&self, _: &Range<u64>) -> bool {
        false
    }

    fn fill(self: Arc<Self>, _: Range<u64>, done: Box<dyn FnOnce(bool) + Send>) {
        self.asked.lock().unwrap().send(done).unwrap();
    }
}

/// A file of 4096 bytes that aren't there yet, at `path`.
struct Gap {
    path: PathBuf,
    filler: Arc<dyn Filler>,
    asked: mpsc::Receiver<Box<dyn FnOnce(bool) + Send>>,
}

impl Gap {
    fn new(path: PathBuf) -> Self {
        let file = File::create_new(&path).unwrap();
        file.set_len(4096).unwrap();
        let (sender, asked) = mpsc::channel();
        Self { path, filler: Arc::new(Slow { file, asked: Mutex::new(sender) }), asked }
    }

    /// Begins to read it.
    fn read(&self) -> mpsc::Receiver<[u8; 4096]> {
        let (path, (sender, read)) = (self.path.clone(), mpsc::channel());
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            File::open(path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
            sender.send(bytes).unwrap();
        });
        read
    }

    /// What is to be told when it is filled, once a reader waits.
    fn asked(&self) -> Box<dyn FnOnce(bool) + Send> {
        self.asked.recv_timeout(PATIENCE).expect("nobody asked")
    }

    /// Once a reader waits, gives it what it reads.
    fn fill(&self) {
        let done = self.asked();
        self.filler.file().write_all_at(&[7; 4096], 0).unwrap();
        done(true);
    }
}

#[test]
fn nobody_waits_for_a_reader_whose_event_has_a_number_that_is_in_use() {
    if !kernel_asks() {
        return;
    }
    let directory = Folder::new();
    let keeper = Keeper::new(Lasts::Process);
    let open = || {
        let (keeper, kept) = keeper.keeping();
        let of = |name| kept.iter().find(|kept| kept.name == name);
        let of = |name| of(name).map(|kept| kept.fd.try_clone().unwrap());
        let left = LeftPrefill { group: of("group"), journal: of("journal") };
        Prefill::open(left, Some(keeper), ["group", "journal"]).unwrap()
    };
    let [gap, other] = ["gap", "other"].map(|name| Gap::new(directory.path().join(name)));
    let (first, events) = open();
    first.start(events).unwrap();
    first.serve(&gap.filler, "first".to_owned()).unwrap();
    let waits = gap.read();
    let unanswered = gap.asked();
    first.leave();
    drop((unanswered, first));

    // The number of the event is among these.
    let taken: Vec<File> = (0..64).map(|_| File::open("/dev/null").unwrap()).collect();
    let (second, events) = open();
    let file = gap.filler.file().try_clone().unwrap();
    let id = second.expect(file, "first".to_owned(), true).unwrap();
    second.start(events).unwrap();
    second.serve(&other.filler, "second".to_owned()).unwrap();
    let read_other = || {
        let read = other.read();
        other.fill();
        assert_eq!(read.recv_timeout(PATIENCE).unwrap(), [7; 4096]);
    };
    read_other();
    drop(taken);
    read_other();
    assert!(waits.try_recv().is_err(), "nobody has answered it");
    second.resume(id, &gap.filler).unwrap();
    gap.fill();
    assert_eq!(waits.recv_timeout(PATIENCE).unwrap(), [7; 4096]);
}

#[test]
fn readers_of_one_file_leave_room_for_others() {
    // Of so many, so many get to wait: as many as there is room for others.
    const READERS: usize = 100;
    const WAIT: usize = SLOTS / 2;
    const SLOTS: usize = 64;
    if !kernel_asks() {
        return;
    }
    let directory = Folder::new();
    // Of an earlier process, with less room than one has now.
    let journal = File::create_new(directory.path().join("journal")).unwrap();
    journal.set_len((SLOTS * SLOT_BYTES) as u64).unwrap();
    let left = LeftPrefill { group: None, journal: Some(journal.into()) };
    let keeper: Arc<Keeper> = Keeper::new(Lasts::Process);
    let (prefill, events) = Prefill::open(left, Some(keeper), ["group", "journal"]).unwrap();
    prefill.start(events).unwrap();
    let [crowd, one] = ["crowd", "one"].map(|name| Gap::new(directory.path().join(name)));
    for (gap, name) in [(&crowd, "crowd"), (&one, "one")] {
        prefill.serve(&gap.filler, name.to_owned()).unwrap();
    }
    let file = Arc::new(File::open(&crowd.path).unwrap());
    let (sender, ended) = mpsc::channel();
    for _ in 0..READERS {
        let (file, sender) = (Arc::clone(&file), sender.clone());
        thread::spawn(move || sender.send(file.read_exact_at(&mut [0; 4096], 0).is_ok()));
    }
    let waiting: Vec<_> = (0..WAIT).map(|_| crowd.asked()).collect();
    for _ in WAIT..READERS {
        assert!(!ended.recv_timeout(PATIENCE).expect("others are told at once"));
    }
    let read = one.read();
    one.fill();
    assert_eq!(read.recv_timeout(PATIENCE).unwrap(), [7; 4096]);
    crowd.filler.file().write_all_at(&[7; 4096], 0).unwrap();
    waiting.into_iter().for_each(|done| done(true));
    for _ in 0..WAIT {
        assert!(ended.recv_timeout(PATIENCE).expect("who was let in waits for the bytes"));
    }
}
