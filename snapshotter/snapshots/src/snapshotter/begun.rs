//! Layers begun for a pull and not bound to a snapshot yet. Pure but for its lock; time is an
//! argument.
//!
//! A pull that fails half-way leaves layers behind that no removal will ever release; and while one
//! image with a layer is being removed, another with the same layer may be on its way.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use skimmer_proto::Digest;

/// How long a begun layer may stay without a snapshot. A pull begins its layers again with each
/// Prepare, so it only has to get from one to the next.
pub const GRACE: Duration = Duration::from_secs(600);

#[derive(Default)]
pub struct Begun {
    since: Mutex<BTreeMap<Digest, Instant>>,
}

impl Begun {
    pub fn note(&self, blob: Digest, now: Instant) {
        self.since().insert(blob, now);
    }

    /// A snapshot holds the layer now, or it has turned out bad.
    pub fn forget(&self, blob: &Digest) {
        self.since().remove(blob);
    }

    pub fn contains(&self, blob: &Digest) -> bool {
        self.since().contains_key(blob)
    }

    /// Takes out the layers that were given up.
    pub fn take_stale(&self, now: Instant) -> Vec<Digest> {
        let mut since = self.since();
        let is_stale = |begun: &Instant| now.saturating_duration_since(*begun) >= GRACE;
        let stale: Vec<_> =
            since.iter().filter(|(_, begun)| is_stale(begun)).map(|(blob, _)| *blob).collect();
        since.retain(|_, begun| !is_stale(begun));
        stale
    }

    fn since(&self) -> MutexGuard<'_, BTreeMap<Digest, Instant>> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_up_what_was_not_bound_in_time() {
        let (a, b, c) = (Digest::of(b"a"), Digest::of(b"b"), Digest::of(b"c"));
        let (begun, start) = (Begun::default(), Instant::now());
        for blob in [a, b, c] {
            begun.note(blob, start);
        }
        begun.forget(&a);
        begun.note(b, start + GRACE / 2);
        assert!(begun.take_stale(start + GRACE / 2).is_empty());
        assert_eq!(begun.take_stale(start + GRACE), [c]);
        assert!(begun.contains(&b) && !begun.contains(&a) && !begun.contains(&c));
        assert_eq!(begun.take_stale(start + GRACE * 2), [b]);
    }
}
