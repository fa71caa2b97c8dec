//! Somebody who keeps descriptors, in this process.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use skimmer_keeper::{Error, Kept, Lasts};

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

    /// As if it had died and come back.
    pub fn lose_everything(&self) {
        self.kept.lock().unwrap().clear();
    }
}

impl skimmer_keeper::Keeper for Keeper {
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let fd = fd.try_clone_to_owned().unwrap();
        self.kept.lock().unwrap().insert(name.to_owned(), fd);
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
