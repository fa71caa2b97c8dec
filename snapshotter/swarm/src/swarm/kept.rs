//! Answers that are kept for a while, and never more than a number of them.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

/// See the module. Where there are too many, those that have run out go first, then those that will next.
#[derive(Debug)]
pub struct Kept<K, V> {
    most: usize,
    answers: Mutex<HashMap<K, (V, Instant)>>,
    /// Of those that somebody is asking for.
    turns: Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>,
}

impl<K: Hash + Eq + Clone, V: Clone> Kept<K, V> {
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), answers: Mutex::default(), turns: Mutex::default() }
    }

    /// If it hasn't run out.
    pub fn fresh(&self, key: &K) -> Option<V> {
        let answers = self.lock();
        answers
            .get(key)
            .filter(|(_, until)| *until > Instant::now())
            .map(|(value, _)| value.clone())
    }

    /// Waits until nobody else asks for this answer, which then may be known. Held while asking.
    pub async fn turn(&self, key: &K) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(key.clone()).or_default())
        };
        turn.lock_owned().await
    }

    /// However old it is.
    pub fn last(&self, key: &K) -> Option<V> {
        self.lock().get(key).map(|(value, _)| value.clone())
    }

    pub fn put(&self, key: K, value: V, keep: Duration) {
        let now = Instant::now();
        let mut answers = self.lock();
        if answers.len() >= self.most && !answers.contains_key(&key) {
            answers.retain(|_, (_, until)| *until > now);
            while answers.len() >= self.most {
                let next = answers.iter().min_by_key(|(_, (_, until))| *until);
                let Some(next) = next.map(|(key, _)| key.clone()) else { break };
                answers.remove(&next);
            }
        }
        answers.insert(key, (value, now + keep));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, (V, Instant)>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn there_are_never_more_than_the_most() {
        let kept = Kept::new(3);
        for n in 0..100_u64 {
            kept.put(n, n, LONG + Duration::from_secs(n));
            assert!(kept.lock().len() <= 3);
        }
        assert_eq!([97, 98, 99].map(|n| kept.fresh(&n)), [97, 98, 99].map(Some));
        kept.put(99, 7, LONG);
        assert_eq!(kept.fresh(&99), Some(7));
        assert_eq!(kept.lock().len(), 3, "replaced in its place");
    }

    #[tokio::test]
    async fn one_asks_for_an_answer_at_a_time() {
        let kept: Kept<char, u32> = Kept::new(2);
        let first = kept.turn(&'a').await;
        let _other = kept.turn(&'b').await;
        let mut second = Box::pin(kept.turn(&'a'));
        assert!(futures::poll!(&mut second).is_pending());
        drop(first);
        drop(second.await);
        let _last = kept.turn(&'c').await;
        assert_eq!(kept.turns.lock().unwrap().len(), 2, "what nobody asks for is forgotten");
    }

    #[test]
    fn what_has_run_out_is_known_still_and_goes_first() {
        let kept = Kept::new(2);
        kept.put('a', 1, Duration::ZERO);
        kept.put('b', 2, LONG);
        assert_eq!((kept.fresh(&'a'), kept.last(&'a')), (None, Some(1)));
        kept.put('c', 3, LONG);
        assert_eq!((kept.last(&'a'), kept.fresh(&'b'), kept.fresh(&'c')), (None, Some(2), Some(3)));
    }
}
