//! One direction of a node's link: what is on it, and when it will be free.
//!
//! A parent is given its next transfer shortly before the last one ends: early enough that the request is there in
//! time, late enough that pieces which arrive meanwhile can go first. Copies of a new piece then double about once a piece's time.

use std::time::Duration;

use crate::event::Now;
use crate::fetch::Fetch;

#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Bytes per second; 0 while unknown.
    rate: u64,
    /// Transfers that were given out and haven't ended.
    transfers: u32,
    /// Their bytes.
    bytes: u64,
    /// When they will have been reported, if the rate is known.
    free_at: Now,
    /// The last report while there were others behind it.
    busy_since: Option<Now>,
}

impl Link {
    pub fn new(rate: u64) -> Self {
        Self { rate, ..Self::default() }
    }

    pub const fn rate(&self) -> u64 {
        self.rate
    }

    pub const fn transfers(&self) -> u32 {
        self.transfers
    }

    /// Whether one more may be given out: `lead` is the time from a decision to its first byte and back.
    pub fn is_due(&self, now: Now, lead: Duration, most: u32) -> bool {
        self.transfers == 0
            || self.transfers < most
                && if self.rate == 0 { self.transfers < 2 } else { self.free_at <= now + lead }
    }

    /// When [`Self::is_due`] turns true without a report.
    pub fn due_at(&self, lead: Duration, most: u32) -> Option<Now> {
        (self.transfers > 0 && self.transfers < most && self.rate > 0)
            .then(|| self.free_at.saturating_sub(lead))
    }

    /// A transfer is given out. Returns when its end should be reported.
    pub fn begin(&mut self, now: Now, lead: Duration, bytes: u64) -> Now {
        let start = if self.transfers == 0 { now + lead } else { self.free_at.max(now) };
        self.transfers += 1;
        self.bytes += bytes;
        self.free_at = start + self.time(bytes);
        self.free_at
    }

    /// A transfer has been reported as ended, or taken back if `whole` is false.
    pub fn end(&mut self, now: Now, fetch: &Fetch, whole: bool) {
        if whole {
            // Only what followed another without a gap shows the link's rate; what was faster than that shows it too.
            let since = self.busy_since.map_or(fetch.since, |since| since.max(fetch.since));
            let took = now.saturating_sub(since);
            if self.busy_since.is_some() || took < self.time(fetch.bytes) {
                self.learn(fetch.bytes, took);
            }
        }
        self.transfers = self.transfers.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(fetch.bytes);
        self.free_at = now + self.time(self.bytes);
        self.busy_since = (whole && self.transfers > 0).then_some(now);
    }

    /// A transfer that takes longer than it should shows that the rate is lower than it was thought.
    pub fn is_at_most(&mut self, rate: u64) {
        if self.rate == 0 || self.rate > rate {
            self.rate = rate.max(1);
        }
    }

    /// Seconds for `bytes` at the known rate; none while it is unknown.
    pub fn time(&self, bytes: u64) -> Duration {
        if self.rate == 0 { Duration::ZERO } else { time(bytes, self.rate) }
    }

    /// Moves an eighth of the way towards what was seen. Reports that come together say nothing.
    fn learn(&mut self, bytes: u64, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if micros < 100 {
            return;
        }
        let seen = (bytes.saturating_mul(1_000_000) / micros).max(1);
        self.rate = match self.rate {
            0 => seen,
            rate => (rate - rate / 8 + seen.min(rate.saturating_mul(2)) / 8).max(1),
        };
    }
}

/// How long `bytes` take at `rate` bytes per second.
pub fn time(bytes: u64, rate: u64) -> Duration {
    Duration::from_micros(bytes.saturating_mul(1_000_000) / rate.max(1))
}
