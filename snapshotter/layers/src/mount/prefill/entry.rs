//! A data file that is marked, and who waits for its bytes.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::Filler;
use super::ticket::Ticket;

/// See the module's documentation.
pub struct Entry {
    pub file: File,
    /// `None`: nobody serves it yet, or any more.
    pub filler: Option<Arc<dyn Filler>>,
    /// What is mounted of it in the directory of mounts.
    pub mounts: usize,
    /// The names under which its descriptor is kept: one, unless an earlier process did otherwise.
    pub kept: Vec<String>,
    /// Those who wait for somebody to serve it.
    pub waiting: Vec<(Range<u64>, Arc<Ticket>)>,
    /// Each reader who waits has a clone.
    readers: Arc<()>,
    /// It was said that some don't get to wait.
    crowded: bool,
}

impl Entry {
    /// Of a file whose descriptor is kept under `name`.
    pub fn new(file: File, name: String) -> Self {
        Self {
            file,
            filler: None,
            mounts: 0,
            kept: vec![name],
            waiting: Vec::new(),
            readers: Arc::default(),
            crowded: false,
        }
    }

    /// A reader of `range` comes, who has `ticket`. Whether he may wait: not where more than `limit` would.
    pub fn admit(&mut self, range: &Range<u64>, ticket: &Arc<Ticket>, limit: usize) -> bool {
        ticket.join(&self.readers);
        let readers = Arc::strong_count(&self.readers) - 1;
        if readers > limit {
            if !self.crowded {
                tracing::warn!(
                    readers,
                    "so many wait for one layer that others would have to: more of them get errors"
                );
            }
            self.crowded = true;
            return false;
        }
        self.crowded &= readers > 1;
        if self.filler.is_none() && self.mounts > 0 {
            self.waiting.push((range.clone(), Arc::clone(ticket)));
        }
        true
    }
}

/// Answers at once, or when the bytes have come.
pub fn begin(filler: &Arc<dyn Filler>, range: Range<u64>, ticket: Arc<Ticket>) {
    if filler.has(&range) {
        return ticket.filled();
    }
    let done = move |there: bool| {
        if there {
            ticket.filled();
        }
    };
    Arc::clone(filler).fill(range, Box::new(done));
}
