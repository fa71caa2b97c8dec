//! When containerd's images are looked at: soon after news, and now and then without any. Pure: time is an argument.
//!
//! Invariants:
//! - However much news there is, two looks are never closer than the first of [`PAUSES`].
//! - News never puts off a look.

use std::time::Duration;

use tokio::time::Instant;

/// From news to the look for it: more of the same follows at once.
const SETTLED: Duration = Duration::from_secs(2);
/// After the looks since the last news; the last of them repeats. What failed is tried again then, and news may come
/// too early: some clients record an image after its last layer is complete, others before.
const PAUSES: [Duration; 3] =
    [Duration::from_secs(10), Duration::from_secs(60), Duration::from_secs(300)];

pub struct Looks {
    next: Instant,
    /// No look before that.
    earliest: Instant,
    /// How many there were since the last news, as far as that makes a difference.
    since_news: usize,
}

impl Looks {
    /// What came before is news as well.
    pub fn new(now: Instant) -> Self {
        Self { next: now + SETTLED, earliest: now, since_news: 0 }
    }

    pub fn next(&self) -> Instant {
        self.next
    }

    /// A layer has become complete, or an image was recorded.
    pub fn heard(&mut self, now: Instant) {
        self.since_news = 0;
        self.next = self.next.min(self.earliest.max(now + SETTLED));
    }

    /// A look has ended.
    pub fn looked(&mut self, now: Instant) {
        self.next = now + PAUSES[self.since_news];
        self.earliest = now + PAUSES[0];
        self.since_news = (self.since_news + 1).min(PAUSES.len() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds at which looks begin, none of which takes any time, if there is news at those in `news`.
    fn looks(news: &[u64], until: u64) -> Vec<u64> {
        let start = Instant::now();
        let mut looks = Looks::new(start);
        let mut begun = Vec::new();
        for second in 0..until {
            let now = start + Duration::from_secs(second);
            if news.contains(&second) {
                looks.heard(now);
            }
            if looks.next() <= now {
                looks.looked(now);
                begun.push(second);
            }
        }
        begun
    }

    #[test]
    fn looks_come_soon_after_news_and_never_end() {
        let cases: [(&[u64], &[u64]); 5] = [
            (&[], &[2, 12, 72, 372, 672, 972]),
            // Long after a look, right before and right after one, and twice between two.
            (&[500], &[2, 12, 72, 372, 502, 512, 572, 872]),
            (&[11], &[2, 12, 22, 82, 382, 682, 982]),
            (&[3], &[2, 12, 22, 82, 382, 682, 982]),
            (&[20, 21], &[2, 12, 22, 32, 92, 392, 692, 992]),
        ];
        for (news, expected) in cases {
            assert_eq!(looks(news, 1000), expected, "{news:?}");
        }
    }

    #[test]
    fn endless_news_neither_hurries_nor_stops_them() {
        let always: Vec<u64> = (0..60).collect();
        assert_eq!(looks(&always, 60), [2, 12, 22, 32, 42, 52]);
    }
}
