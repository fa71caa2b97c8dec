//! Chunks whose bytes were wrong time and again: for a while, nobody fetches them once more. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Error;

/// How long readers of such a chunk are told so from memory.
const FOR: Duration = Duration::from_secs(10);

/// Chunks of one layer that are remembered; a layer with more is no use anyway.
const MOST: usize = 64;

/// What came of those chunks, and when.
#[derive(Debug, Default)]
pub struct Lies {
    known: BTreeMap<usize, (Instant, Arc<Error>)>,
}

impl Lies {
    /// Why `chunk` can't be had, if that was found out a short while ago.
    pub fn of(&self, chunk: usize, now: Instant) -> Option<Arc<Error>> {
        let (at, error) = self.known.get(&chunk)?;
        (now.saturating_duration_since(*at) < FOR).then(|| Arc::clone(error))
    }

    pub fn note(&mut self, chunk: usize, now: Instant, error: Arc<Error>) {
        self.known.retain(|_, (at, _)| now.saturating_duration_since(*at) < FOR);
        if self.known.len() < MOST {
            self.known.insert(chunk, (now, error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lies_are_remembered_for_a_while_and_not_all() {
        let (mut lies, start) = (Lies::default(), Instant::now());
        let error = |chunk| Arc::new(Error::Interrupted { chunk });
        lies.note(3, start, error(3));
        assert!(lies.of(3, start + FOR / 2).is_some() && lies.of(4, start).is_none());
        assert!(lies.of(3, start + FOR).is_none());
        for chunk in 0..MOST * 2 {
            lies.note(chunk, start + FOR, error(chunk));
        }
        assert_eq!(lies.known.len(), MOST);
        lies.note(1000, start + FOR * 2, error(1000));
        assert_eq!(lies.known.len(), 1, "the old ones make room");
    }
}
