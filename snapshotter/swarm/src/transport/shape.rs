//! Who may upload next. Pure: time is an argument.
//!
//! One token bucket for the node; what a reader waits for goes before everything else, then
//! pull-through, then background; within a class, peers take turns, slice by slice.
//!
//! Invariant: over any stretch of time at most `burst + one slice + rate × time` bytes are granted.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use skimmer_cache::Class;
use skimmer_identity::PeerId;

const NANOS: i128 = 1_000_000_000;

/// A slice of an upload that waits for its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

#[derive(Debug)]
pub struct Shaper {
    bytes_per_second: u64,
    burst: u64,
    /// In bytes × nanoseconds; below zero after a slice that was larger than what was there.
    tokens: i128,
    /// When the tokens were counted.
    counted: Duration,
    queues: BTreeMap<Class, Queue>,
    next: u64,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: BTreeMap<PeerId, VecDeque<(Ticket, u64)>>,
    /// Who had the last turn.
    last: Option<PeerId>,
}

impl Shaper {
    /// `burst`: bytes that may be granted at once after a pause.
    pub const fn new(bytes_per_second: u64, burst: u64) -> Self {
        Self {
            bytes_per_second,
            burst,
            tokens: burst as i128 * NANOS,
            counted: Duration::ZERO,
            queues: BTreeMap::new(),
            next: 0,
        }
    }

    /// Queues a slice of `bytes`.
    pub fn ask(&mut self, peer: PeerId, class: Class, bytes: u64) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        let queue = self.queues.entry(class).or_default();
        queue.waiting.entry(peer).or_default().push_back((ticket, bytes));
        ticket
    }

    /// The slices that may go at `now` (since any fixed instant; never going back).
    pub fn grant(&mut self, now: Duration) -> Vec<Ticket> {
        let passed = i128::try_from(now.saturating_sub(self.counted).as_nanos()).unwrap_or(0);
        let full = i128::from(self.burst) * NANOS;
        let earned = passed.saturating_mul(i128::from(self.bytes_per_second));
        self.tokens = full.min(self.tokens.saturating_add(earned));
        self.counted = self.counted.max(now);
        let mut granted = Vec::new();
        while self.tokens > 0 {
            let Some((ticket, bytes)) = self.queues.values_mut().find_map(Queue::turn) else {
                break;
            };
            self.tokens -= i128::from(bytes) * NANOS;
            granted.push(ticket);
        }
        granted
    }

    /// When [`Self::grant`] has something to grant next; `None`: nothing waits.
    pub fn next_grant(&self) -> Option<Duration> {
        if self.queues.values().all(|queue| queue.waiting.is_empty()) {
            return None;
        }
        // The smallest time after which tokens are above zero.
        let missing = (1 - self.tokens).max(0);
        let rate = i128::from(self.bytes_per_second.max(1));
        let nanos = u64::try_from((missing + rate - 1) / rate).unwrap_or(u64::MAX);
        Some(self.counted.saturating_add(Duration::from_nanos(nanos)))
    }
}

impl Queue {
    /// Takes one slice of the peer after the one that had the last turn.
    fn turn(&mut self) -> Option<(Ticket, u64)> {
        let later = |last: PeerId| self.waiting.keys().find(|peer| **peer > last).copied();
        let peer = self.last.and_then(later).or_else(|| self.waiting.keys().next().copied())?;
        let slices = self.waiting.get_mut(&peer)?;
        let slice = slices.pop_front();
        if slices.is_empty() {
            self.waiting.remove(&peer);
        }
        self.last = Some(peer);
        slice
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert, proptest};

    const SECOND: Duration = Duration::from_secs(1);

    fn peer(n: u8) -> PeerId {
        PeerId::from_public_key([n; 32])
    }

    #[test]
    fn readers_go_first_and_peers_take_turns() {
        let mut shaper = Shaper::new(1, 1);
        // (peer, class) in the order asked; the order granted, one a second.
        let asks = [
            (1, Class::Background),
            (1, Class::PullThrough),
            (1, Class::PullThrough),
            (1, Class::PullThrough),
            (2, Class::PullThrough),
            (3, Class::PullThrough),
            (2, Class::PullThrough),
            (2, Class::Fault),
        ];
        for (n, class) in asks {
            shaper.ask(peer(n), class, 1);
        }
        let order: Vec<_> = (0..8)
            .flat_map(|second| shaper.grant(second * SECOND))
            .map(|ticket| ticket.0)
            .collect();
        assert_eq!(order, [7, 1, 4, 5, 2, 6, 3, 0]);
        assert_eq!(shaper.next_grant(), None);
    }

    #[test]
    fn a_late_reader_waits_for_one_slice_at_most() {
        let mut shaper = Shaper::new(100, 100);
        for _ in 0..50 {
            shaper.ask(peer(1), Class::Background, 100);
        }
        assert_eq!(shaper.grant(SECOND).len(), 1);
        let fault = shaper.ask(peer(2), Class::Fault, 100);
        let next = shaper.next_grant().unwrap();
        assert!(next <= 2 * SECOND, "{next:?}");
        assert_eq!(shaper.grant(next), [fault]);
    }

    proptest! {
        #[test]
        fn the_rate_is_kept_and_used(
            rate in 1..10_000u64,
            burst in 1..10_000u64,
            slices in proptest::collection::vec((0..4u8, 0..3usize, 1..5_000u64), 1..60),
        ) {
            let mut shaper = Shaper::new(rate, burst);
            let mut sizes = BTreeMap::new();
            for (n, class, bytes) in slices {
                sizes.insert(shaper.ask(peer(n), Class::ALL[class], bytes), bytes);
            }
            let (mut now, mut sent, largest) = (Duration::ZERO, 0, *sizes.values().max().unwrap());
            while let Some(next) = shaper.next_grant() {
                prop_assert!(next >= now);
                now = next;
                let granted = shaper.grant(now);
                prop_assert!(!granted.is_empty(), "woken for nothing");
                for ticket in granted {
                    sent += sizes.remove(&ticket).unwrap();
                }
                let most = burst as f64 + largest as f64 + rate as f64 * now.as_secs_f64() + 1.0;
                prop_assert!(sent as f64 <= most);
            }
            prop_assert!(sizes.is_empty());
            // Not slower than the rate either.
            prop_assert!(now.as_secs_f64() <= sent as f64 / rate as f64 + 0.001);
        }
    }
}
