//! Somebody who keeps descriptors, in this process, and is as particular as systemd: what is kept already, under this name
//! or another, isn't to be handed over again.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use nix::sys::stat::{SFlag, fstat};
use skimmer_keeper::{Error, Kept, Lasts};

/// Of a journal of events: 72 for the event, 16 for its file.
pub const SLOT_BYTES: usize = 72 + 16;

pub struct Keeper {
    lasts: Lasts,
    kept: Mutex<BTreeMap<String, OwnedFd>>,
}

impl Keeper {
    pub fn new(lasts: Lasts) -> Arc<Self> {
        Arc::new(Self { lasts, kept: Mutex::default() })
    }

    /// For a process that starts now.
    pub fn keeping(self: &Arc<Self>) -> (Arc<dyn skimmer_keeper::Keeper>, Vec<Kept>) {
        let kept = self.kept.lock().unwrap();
        let duplicate = |(name, fd): (&String, &OwnedFd)| Kept {
            name: name.clone(),
            fd: fd.try_clone().unwrap(),
        };
        (Arc::clone(self) as _, kept.iter().map(duplicate).collect())
    }

    /// The names of what is kept.
    pub fn names(&self) -> Vec<String> {
        self.kept.lock().unwrap().keys().cloned().collect()
    }

    /// As if the process had ended between the taking of each event in its journal and the look at its file.
    pub fn forget_files(&self) {
        const EVENT: usize = SLOT_BYTES - 16;
        let kept = self.kept.lock().unwrap();
        let journal = kept.iter().find(|(name, _)| name.contains("journal")).unwrap().1;
        let journal = File::from(journal.try_clone().unwrap());
        let len = usize::try_from(journal.metadata().unwrap().len()).unwrap();
        let mut slots = vec![0; len];
        journal.read_exact_at(&mut slots, 0).unwrap();
        let mut forgotten = 0;
        for (n, slot) in slots.chunks(SLOT_BYTES).enumerate() {
            if slot[..4] != [0; 4] {
                assert_ne!(slot[EVENT..], [0; SLOT_BYTES - EVENT]);
                let at = n * SLOT_BYTES + EVENT;
                journal.write_all_at(&[0; SLOT_BYTES - EVENT], at as u64).unwrap();
                forgotten += 1;
            }
        }
        assert!(forgotten > 0, "nothing is in flight");
    }

    /// As if it had died and come back.
    pub fn lose_everything(&self) {
        self.kept.lock().unwrap().clear();
    }
}

impl skimmer_keeper::Keeper for Keeper {
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let fd = fd.try_clone_to_owned().unwrap();
        let mut kept = self.kept.lock().unwrap();
        let same = kept.iter().find(|(_, other)| is_same_file(other, &fd)).map(|(name, _)| name);
        assert_eq!(same, None, "{name} is kept already");
        assert!(kept.insert(name.to_owned(), fd).is_none(), "{name} is kept twice");
        Ok(())
    }

    fn release(&self, name: &str) -> Result<(), Error> {
        self.kept.lock().unwrap().remove(name);
        Ok(())
    }

    fn lasts(&self) -> Lasts {
        self.lasts
    }
}

/// Whether both are of one regular file.
fn is_same_file(one: &OwnedFd, other: &OwnedFd) -> bool {
    let [one, other] = [one, other].map(|fd| fstat(fd).unwrap());
    let is_regular = SFlag::from_bits_truncate(one.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
    is_regular && (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}
