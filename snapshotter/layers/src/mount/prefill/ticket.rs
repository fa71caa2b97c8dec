//! The answer to an event, owed until it is given.
//!
//! Whoever works on the event holds a ticket. When nobody does any more, the reader is answered: it reads if all of it
//! was filled, and gets EIO if not. When the process is about to end nobody is answered; the event stays in the
//! journal.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::Inner;
use super::journal::Slot;
use super::numbers::Number;

pub struct Ticket {
    inner: Arc<Inner>,
    slot: Slot,
    number: Number,
    /// Fills that are still needed before the reader may read.
    needed: AtomicUsize,
    /// Says that the reader waits for the first file that he [joined](Self::join) the others of.
    joined: OnceLock<Arc<()>>,
}

impl Ticket {
    pub fn new(inner: &Arc<Inner>, slot: Slot, number: Number, needed: usize) -> Arc<Self> {
        let (inner, needed) = (Arc::clone(inner), AtomicUsize::new(needed));
        Arc::new(Self { inner, slot, number, needed, joined: OnceLock::new() })
    }

    /// Holds a clone of `readers` for as long as the reader waits.
    pub fn join(&self, readers: &Arc<()>) {
        self.joined.get_or_init(|| Arc::clone(readers));
    }

    /// One of the needed fills is done.
    pub fn filled(&self) {
        self.needed.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.inner.is_stopped() {
            return;
        }
        let filled = self.needed.load(Ordering::Acquire) == 0;
        if let Err(error) = self.inner.settle(self.number.value(), self.slot, filled) {
            // It waits on, and the next process answers it.
            return tracing::error!(%error, "a reader can't be answered");
        }
        if self.inner.starved.swap(false, Ordering::AcqRel) {
            self.inner.wake();
        }
    }
}
