//! How much disk the cache uses, and the call for room when there is too little.
//!
//! Owns: the estimate of bytes in use; the hand-over between writers that are out of space and the
//! upkeep job that evicts.
//! Does not own: what is evicted.
//!
//! The estimate is the last scan plus what was written since; a scan corrects it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};

/// How long a writer waits for an eviction. Unlinking is quick; this is for a stuck disk.
const ROOM_WAIT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Space {
    pub quota_bytes: u64,
    used: AtomicU64,
    /// Rounds of eviction asked for by writers that got "no space left on device".
    asked: watch::Sender<u64>,
    /// Of these, how many are done.
    done: watch::Sender<u64>,
    /// Wakes the upkeep job: over quota, or something finished that is worth a checkpoint.
    pub upkeep: Notify,
}

impl Space {
    pub fn new(quota_bytes: u64) -> Self {
        Self {
            quota_bytes,
            used: AtomicU64::new(0),
            asked: watch::Sender::new(0),
            done: watch::Sender::new(0),
            upkeep: Notify::new(),
        }
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// A scan has seen this much.
    pub fn correct(&self, used: u64) {
        self.used.store(used, Ordering::Relaxed);
    }

    pub fn charge(&self, bytes: u64) {
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        if before <= self.quota_bytes && before + bytes > self.quota_bytes {
            self.upkeep.notify_one();
        }
    }

    /// So much has gone since.
    pub fn discharge(&self, bytes: u64) {
        let less = |used: u64| Some(used.saturating_sub(bytes));
        _ = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Asks for an eviction although the quota isn't reached, and waits for it.
    pub async fn make_room(&self) {
        let mut round = 0;
        self.asked.send_modify(|asked| {
            *asked += 1;
            round = *asked;
        });
        self.upkeep.notify_one();
        let mut done = self.done.subscribe();
        let finished = done.wait_for(|done| *done >= round);
        // Too late or not, the writer tries once more and reports what the disk says.
        _ = tokio::time::timeout(ROOM_WAIT, finished).await;
    }

    /// The round that writers wait for, if any.
    pub fn asked(&self) -> Option<u64> {
        let asked = *self.asked.borrow();
        (asked > *self.done.borrow()).then_some(asked)
    }

    pub fn made_room(&self, round: u64) {
        self.done.send_replace(round);
    }
}
