//! What is known of peers as correspondents, whatever the task.

use std::time::Duration;

use super::event::{Now, RequestId};

#[derive(Debug, Default)]
pub struct Link {
    /// Connected, by the caller's word.
    pub up: bool,
    /// Pieces asked for and not received.
    pub unanswered: u32,
    /// When it last brought something: since then it is at the next piece.
    pub free_since: Now,
    /// Failures in a row.
    pub strikes: u32,
    /// Requests before this one were under way when it last failed: as long as it is put off, they fail for the same reason.
    pub counts_from: RequestId,
    /// Wrong pieces that it sent, ever.
    pub wrong: u32,
    /// Not chosen before this, if there is a choice.
    pub not_before: Now,
    /// Not chosen before this at all.
    pub rest_until: Now,
}

impl Link {
    /// `next`: what will be asked after this failure.
    pub fn punish(&mut self, now: Now, next: RequestId, penalty: Duration, rest: Duration) {
        self.counts_from = next;
        let factor = 1 << self.strikes.min(5);
        self.strikes = self.strikes.saturating_add(1);
        self.not_before = now + penalty * factor;
        self.rest_until = now + rest * factor;
    }

    /// Nothing is held against it but wrong pieces.
    pub const fn pardon(&mut self) {
        self.strikes = 0;
        self.counts_from = RequestId(0);
        self.not_before = Now::ZERO;
        self.rest_until = Now::ZERO;
    }
}

/// The latest durations of something.
#[derive(Debug, Default)]
pub struct Times {
    ring: Vec<Duration>,
    next: usize,
}

/// Durations remembered.
const REMEMBERED: usize = 64;

/// So many say something about what is usual.
const ENOUGH: usize = 8;

impl Times {
    pub fn add(&mut self, time: Duration) {
        if self.ring.len() < REMEMBERED {
            self.ring.push(time);
        } else {
            self.ring[self.next] = time;
        }
        self.next = (self.next + 1) % REMEMBERED;
    }

    /// The duration that `percent` of them don't exceed; `None` while too few are known.
    pub fn percentile(&self, percent: usize) -> Option<Duration> {
        if self.ring.len() < ENOUGH {
            return None;
        }
        let mut sorted = self.ring.clone();
        let at = (sorted.len() * percent / 100).min(sorted.len() - 1);
        Some(*sorted.select_nth_unstable(at).1)
    }
}
