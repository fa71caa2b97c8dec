//! One direction of a node's link: what is on it, and when it will be free.
//!
//! A parent whose rate is known from its node is given its next transfer shortly before the last one ends: early enough
//! that the request is there in time, late enough that pieces which arrive meanwhile can go first. Copies of a new piece then
//! double about once a piece's time. A rate that was only learned can't pace a link: it shows what was given out, so a
//! link that idles between transfers would be taken for a slow one, and idle ever after. Such links have a few
//! transfers at a time, and the reports set the pace.

use std::time::Duration;

use crate::event::Now;
use crate::fetch::Fetch;

/// The part by which a rate that was learned grows each time that it fades.
const FADING: u64 = 16;

#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Bytes per second; 0 while unknown.
    rate: u64,
    /// The rate is the node's own word, corrected by what is seen.
    told: bool,
    /// When each transfer was given out that hasn't ended, oldest first.
    pending: Vec<Now>,
    /// Their bytes.
    bytes: u64,
    /// When they will have been reported, if the rate is known.
    free_at: Now,
    /// The last report while there were others behind it.
    busy_since: Option<Now>,
    /// The rate follows what is seen.
    learns: bool,
}

impl Link {
    /// An upload: its rate is learned from how reports follow each other.
    pub fn up(rate: u64) -> Self {
        Self { rate, told: rate > 0, learns: true, ..Self::default() }
    }

    /// A download. Reports say nothing of its rate: it may be the parents that are slow.
    pub fn down(rate: u64) -> Self {
        Self { rate, told: rate > 0, ..Self::default() }
    }

    pub const fn rate(&self) -> u64 {
        self.rate
    }

    pub fn transfers(&self) -> u32 {
        u32::try_from(self.pending.len()).unwrap_or(u32::MAX)
    }

    /// The most transfers that it may have: `told` if its rate is known from its node, else `untold`.
    pub const fn most(&self, told: u32, untold: u32) -> u32 {
        if self.told { told } else { untold }
    }

    /// Whether one more may be given out: `lead` is the time from a decision to its first byte and back.
    pub fn is_due(&self, now: Now, lead: Duration, most: u32) -> bool {
        let transfers = self.transfers();
        transfers == 0 || transfers < most && (!self.told || self.free_at <= now + lead)
    }

    /// When [`Self::is_due`] turns true without a report.
    pub fn due_at(&self, lead: Duration, most: u32) -> Option<Now> {
        let transfers = self.transfers();
        (transfers > 0 && transfers < most && self.told).then(|| self.free_at.saturating_sub(lead))
    }

    /// A transfer is given out. Returns when its end should be reported.
    pub fn begin(&mut self, now: Now, lead: Duration, bytes: u64) -> Now {
        let start = if self.pending.is_empty() { now + lead } else { self.free_at.max(now) };
        self.pending.push(now);
        self.bytes += bytes;
        self.free_at = start + self.time(bytes);
        self.free_at
    }

    /// A transfer has been reported as ended, or taken back if `whole` is false.
    pub fn end(&mut self, now: Now, fetch: &Fetch, whole: bool) {
        let place = self.pending.iter().position(|since| *since == fetch.since);
        if let Some(place) = place {
            self.pending.remove(place);
        }
        // What overtook another says nothing: the other may be stuck. Of the rest, only what followed another without a
        // gap shows the link's rate; what was faster than that shows it too.
        if self.learns && whole && place == Some(0) {
            let since = self.busy_since.map_or(fetch.since, |since| since.max(fetch.since));
            let took = now.saturating_sub(since);
            if self.busy_since.is_some() || took < self.time(fetch.bytes) {
                self.learn(fetch.bytes, took);
            }
        }
        self.bytes = self.bytes.saturating_sub(fetch.bytes);
        self.free_at = now + self.time(self.bytes);
        self.busy_since = (whole && !self.pending.is_empty()).then_some(now);
    }

    /// A transfer that takes longer than it should shows that the rate is lower than it was thought.
    pub fn is_at_most(&mut self, rate: u64) {
        if self.rate == 0 || self.rate > rate {
            self.rate = rate.max(1);
        }
    }

    /// The rate may be higher by now than it is thought.
    pub const fn fade(&mut self) {
        self.rate += self.rate / FADING + 1;
    }

    /// For `bytes` at the rate; none while it is unknown.
    fn time(&self, bytes: u64) -> Duration {
        match self.rate {
            0 => Duration::ZERO,
            rate => time(bytes, rate),
        }
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
fn time(bytes: u64, rate: u64) -> Duration {
    Duration::from_micros(bytes.saturating_mul(1_000_000) / rate.max(1))
}
