//! When cached bytes are read again to see whether they are still right, and how fast: the schedule
//! alone. Pure; time is an argument.
//!
//! Everything on disk is checked once in each *pass*, in the order of digests. A pass begins an
//! interval after the one before it began, however long that took; what comes into the cache behind
//! the present place is checked in the same pass. The place outlives the process as one line of text:
//! `<when the pass began, s since 1970> <last digest checked, or "-" before the first, or "end">`.

use std::time::Duration;

use skimmer_proto::Digest;

/// Seconds since 1970.
pub type Now = u64;

/// How far the present pass has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    began: Now,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Start,
    After(Digest),
    End,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Check(Digest),
    Wait(Duration),
}

impl Pass {
    /// Where there was none before: nothing is due until an interval has passed.
    pub const fn first(now: Now) -> Self {
        Self { began: now, place: Place::End }
    }

    /// `all`: what is on disk, in order.
    pub fn next(&mut self, now: Now, interval: Duration, all: &[Digest]) -> Next {
        // A clock that was set back would put the next pass off for as long.
        self.began = self.began.min(now);
        if self.place == Place::End {
            let due = self.began.saturating_add(interval.as_secs());
            if now < due {
                return Next::Wait(Duration::from_secs(due - now));
            }
            *self = Self { began: now, place: Place::Start };
        }
        let next = match self.place {
            Place::Start => 0,
            Place::After(digest) => all.partition_point(|other| *other <= digest),
            Place::End => all.len(),
        };
        match all.get(next) {
            Some(digest) => {
                self.place = Place::After(*digest);
                Next::Check(*digest)
            }
            None => {
                self.place = Place::End;
                let due = self.began.saturating_add(interval.as_secs());
                Next::Wait(Duration::from_secs(due.saturating_sub(now).max(1)))
            }
        }
    }

    pub fn encode(&self) -> String {
        let place = match self.place {
            Place::Start => "-".to_owned(),
            Place::After(digest) => digest.hex(),
            Place::End => "end".to_owned(),
        };
        format!("{} {place}\n", self.began)
    }

    /// `None`: the text is none of [`Self::encode`]'s.
    pub fn decode(text: &str) -> Option<Self> {
        let (began, place) = text.trim_end().split_once(' ')?;
        let place = match place {
            "-" => Place::Start,
            "end" => Place::End,
            hex => Place::After(Digest::from_hex(hex).ok()?),
        };
        Some(Self { began: began.parse().ok()?, place })
    }
}

/// Keeps a reader to so many bytes a second.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// 0: as many as there are.
    bytes_per_second: u64,
    /// When the bytes so far have been paid for, since the start.
    paid: Duration,
}

impl Pace {
    pub const fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, paid: Duration::ZERO }
    }

    /// How long to pause after `bytes` more were read. `now`: since the start.
    pub fn pause(&mut self, now: Duration, bytes: u64) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.paid = self.paid.max(now).saturating_add(cost);
        self.paid.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    const DAY: Duration = Duration::from_secs(86_400);

    fn digests(names: &str) -> Vec<Digest> {
        let mut all: Vec<_> = names.bytes().map(|name| Digest::of(&[name])).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn each_pass_checks_everything_once_and_begins_on_time() {
        let (all, more) = (digests("abc"), digests("abcd"));
        let mut pass = Pass::first(1000);
        assert_eq!(pass.next(1000, DAY, &all), Next::Wait(DAY));
        let begin = 1000 + 86_400;
        assert_eq!(pass.next(begin - 1, DAY, &all), Next::Wait(Duration::from_secs(1)));
        for digest in &all {
            assert_eq!(pass.next(begin + 7, DAY, &all), Next::Check(*digest));
        }
        // One that sorts last comes in just in time.
        let late = more.last().filter(|last| !all.contains(last));
        if let Some(digest) = late {
            assert_eq!(pass.next(begin + 8, DAY, &more), Next::Check(*digest));
        }
        assert_eq!(pass.next(begin + 10, DAY, &more), Next::Wait(DAY - Duration::from_secs(3)));
        assert_eq!(pass.next(begin + 7 + 86_400, DAY, &[]), Next::Wait(DAY));
    }

    #[test]
    fn a_clock_set_back_does_not_put_it_off() {
        let mut pass = Pass::first(1_000_000);
        assert_eq!(pass.next(5, DAY, &[]), Next::Wait(DAY));
    }

    #[test]
    fn a_pass_that_takes_too_long_is_followed_by_the_next() {
        let mut pass = Pass::first(0);
        let all = digests("a");
        assert_eq!(pass.next(86_400, DAY, &all), Next::Check(all[0]));
        assert_eq!(pass.next(900_000, DAY, &all), Next::Wait(Duration::from_secs(1)));
        assert_eq!(pass.next(900_001, DAY, &all), Next::Check(all[0]));
    }

    #[test]
    fn bytes_cost_time() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(100);
        assert_eq!(pace.pause(second * 5, 100), second);
        assert_eq!(pace.pause(second * 5, 50), second + second / 2);
        // Time that was not used isn't saved up.
        assert_eq!(pace.pause(second * 100, 200), second * 2);
        assert_eq!(Pace::new(0).pause(second, u64::MAX), Duration::ZERO);
        assert!(Pace::new(1).pause(second, u64::MAX) > second * 1_000_000);
    }

    proptest! {
        #[test]
        fn the_place_reads_back(began in any::<u64>(), place in 0..3u8, name in any::<[u8; 32]>()) {
            let place = match place {
                0 => Place::Start,
                1 => Place::After(Digest::from_bytes(name)),
                _ => Place::End,
            };
            let pass = Pass { began, place };
            prop_assert_eq!(Pass::decode(&pass.encode()), Some(pass));
        }

        #[test]
        fn any_text_and_any_time_do(text in any::<String>(), now in any::<u64>(), wait in any::<u32>()) {
            let mut pass = Pass::decode(&text).unwrap_or(Pass::first(now));
            let all = digests("ab");
            let interval = Duration::from_secs(wait.into());
            for _ in 0..4 {
                if let Next::Check(digest) = pass.next(now, interval, &all) {
                    prop_assert!(all.contains(&digest));
                }
            }
        }
    }
}
