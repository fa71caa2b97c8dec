//! Which endpoint to ask next, after which pause, and when to give up.
//!
//! Owns: the candidates of one operation, in order, and which of them are out. The decision is pure
//! ([`Tries::decide`]); [`Tries::failed`] carries it out.
//!
//! A round asks every candidate once. An error that will not go away takes a candidate out; between
//! rounds there is a pause: what a server asked for, else growing ones.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use skimmer_cache::source::Origin;
use tokio::time::Instant;

use crate::backoff;
use crate::hosts::Endpoint;
use crate::http;
use crate::redact::PlainUrl;

/// One endpoint of one origin of a blob.
#[derive(Clone)]
pub struct Candidate {
    pub origin: Origin,
    pub endpoint: Endpoint,
}

pub struct Tries {
    candidates: Vec<(Arc<Candidate>, bool)>,
    current: usize,
    /// Candidates asked in this round.
    asked: usize,
    rounds: u32,
    limit: u32,
    /// The shortest pause that a candidate of this round wants.
    pause: Option<Duration>,
    /// What the registry itself, not a mirror, said last: the error worth reporting.
    own: Option<http::Error>,
    /// A registry's answer that took it out: more telling than another's silence.
    answer: Option<http::Error>,
    until: Instant,
}

/// Rounds after one registry has answered that it hasn't got it, or won't give it: the others, often
/// guesses, are not waited for until the end.
const ROUNDS_AFTER_ANSWER: u32 = 3;

/// What to do after a failure.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask [`Tries::candidate`] at once.
    Now,
    After(Duration),
    GiveUp,
}

impl Tries {
    /// `None` without candidates. `limit` is the number of rounds.
    pub fn new(candidates: Vec<Candidate>, limit: u32, until: Instant) -> Option<Self> {
        let candidates: Vec<_> = candidates.into_iter().map(|c| (Arc::new(c), true)).collect();
        let tries = Self {
            candidates,
            current: 0,
            asked: 0,
            rounds: 0,
            limit,
            pause: None,
            own: None,
            answer: None,
            until,
        };
        (!tries.candidates.is_empty()).then_some(tries)
    }

    /// Whom to ask.
    pub fn candidate(&self) -> Arc<Candidate> {
        Arc::clone(&self.candidates[self.current].0)
    }

    /// When everything must be over.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// Time that was not spent waiting for a server doesn't count.
    pub fn extend(&mut self, by: Duration) {
        self.until += by;
    }

    /// A candidate delivered: what failed before is forgotten.
    pub fn succeeded(&mut self) {
        (self.asked, self.rounds, self.pause) = (0, 0, None);
    }

    /// Waits until it is the next candidate's turn, or gives up with the most telling error.
    pub async fn failed(&mut self, error: http::Error) -> Result<(), http::Error> {
        let candidate = self.candidate();
        let random = RandomState::new().build_hasher().finish();
        let retryable = error.is_retryable();
        let next = self.decide(retryable, error.retry_after(), Instant::now(), random);
        tracing::debug!(
            endpoint = %PlainUrl::from(&candidate.endpoint.base),
            repository = candidate.origin.repository,
            %error,
            ?next,
            "a request failed"
        );
        match next {
            Next::GiveUp => return Err(self.account(error, &candidate)),
            Next::Now | Next::After(_) if !candidate.endpoint.is_mirror && !retryable => {
                self.answer.get_or_insert(error);
            }
            Next::Now | Next::After(_) if !candidate.endpoint.is_mirror => {
                self.own = Some(error);
            }
            Next::Now | Next::After(_) => {}
        }
        if let Next::After(pause) = next {
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    /// The most telling error when `candidate`'s is the last.
    fn account(&mut self, last: http::Error, candidate: &Candidate) -> http::Error {
        let answered = !last.is_retryable() && !candidate.endpoint.is_mirror;
        let earlier = if answered { None } else { self.answer.take() };
        let own = if candidate.endpoint.is_mirror { self.own.take() } else { None };
        earlier.or(own).unwrap_or(last)
    }

    fn decide(
        &mut self,
        retryable: bool,
        retry_after: Option<Duration>,
        now: Instant,
        random: u64,
    ) -> Next {
        self.candidates[self.current].1 = retryable;
        if retryable {
            self.asked += 1;
            let pause =
                backoff::pause(self.rounds + 1, random).max(retry_after.unwrap_or_default());
            self.pause = Some(self.pause.map_or(pause, |other| other.min(pause)));
        }
        if now >= self.until || !self.advance() {
            return Next::GiveUp;
        }
        if self.asked < self.candidates.iter().filter(|(_, alive)| *alive).count() {
            return Next::Now;
        }
        let pause = self.pause.take().unwrap_or_default();
        (self.asked, self.rounds) = (0, self.rounds + 1);
        let answered = self.candidates.iter().any(|(c, alive)| !alive && !c.endpoint.is_mirror);
        let limit = if answered { self.limit.min(ROUNDS_AFTER_ANSWER) } else { self.limit };
        if self.rounds >= limit || now + pause >= self.until {
            return Next::GiveUp;
        }
        Next::After(pause)
    }

    /// Goes to the next candidate that is not out.
    fn advance(&mut self) -> bool {
        let len = self.candidates.len();
        let next = (1..=len).map(|step| (self.current + step) % len);
        match next.into_iter().find(|i| self.candidates[*i].1) {
            Some(next) => {
                self.current = next;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use reqwest::Url;
    use reqwest::header::HeaderMap;

    use super::*;
    use crate::tls::Material;

    fn tries(count: usize, limit: u32, until: Duration) -> (Tries, Instant) {
        let now = Instant::now();
        let candidate = |i: usize| Candidate {
            origin: Origin { host: "r.io".to_owned(), repository: "a".to_owned() },
            endpoint: Endpoint {
                base: Url::parse(&format!("http://{i}.io")).unwrap(),
                can_pull: true,
                can_resolve: true,
                tls: Arc::new(Material::default()),
                headers: HeaderMap::new(),
                namespace: None,
                is_mirror: false,
            },
        };
        (Tries::new((0..count).map(candidate).collect(), limit, now + until).unwrap(), now)
    }

    /// Feeds failures (retryable, Retry-After in seconds) and says who was asked and what came next.
    fn check(
        count: usize,
        limit: u32,
        failures: &[(bool, Option<u64>)],
        expected: &[(usize, Next)],
    ) {
        let (mut tries, now) = tries(count, limit, Duration::from_secs(60));
        let mut got = Vec::new();
        for (retryable, after) in failures {
            let asked = tries.current;
            let next = tries.decide(*retryable, after.map(Duration::from_secs), now, 0);
            got.push((asked, next));
        }
        assert_eq!(got, expected);
    }

    #[test]
    fn asks_in_order_and_pauses_between_rounds() {
        let ms = |ms| Next::After(Duration::from_millis(ms));
        let again = (true, None);
        check(1, 3, &[again; 3], &[(0, ms(100)), (0, ms(200)), (0, Next::GiveUp)]);
        check(
            2,
            2,
            &[again; 4],
            &[(0, Next::Now), (1, ms(100)), (0, Next::Now), (1, Next::GiveUp)],
        );
        // Those that will never have it are not asked again.
        check(
            3,
            2,
            &[(false, None), (false, None), again, again],
            &[(0, Next::Now), (1, Next::Now), (2, ms(100)), (2, Next::GiveUp)],
        );
        check(2, 9, &[(false, None); 2], &[(0, Next::Now), (1, Next::GiveUp)]);
        check(
            2,
            9,
            &[again, (false, None), again, again, again],
            &[(0, Next::Now), (1, ms(100)), (0, ms(200)), (0, Next::GiveUp), (0, Next::GiveUp)],
        );
        // A server's wish counts, but not beyond the deadline.
        check(1, 3, &[(true, Some(7)), (true, Some(60))], &[(0, ms(7000)), (0, Next::GiveUp)]);
        check(2, 3, &[(true, Some(60)), (true, Some(3))], &[(0, Next::Now), (1, ms(3000))]);
    }

    #[test]
    fn success_starts_afresh_and_the_deadline_ends_all() {
        let (mut tries, now) = tries(1, 2, Duration::from_secs(60));
        for _ in 0..5 {
            assert!(matches!(tries.decide(true, None, now, 0), Next::After(_)));
            tries.succeeded();
        }
        let late = now + Duration::from_secs(60);
        assert_eq!(tries.decide(true, None, late, 0), Next::GiveUp);
    }
}
