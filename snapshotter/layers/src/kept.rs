//! What is costly to make, kept for whoever needs one next.

use std::fmt;
use std::sync::{Mutex, PoisonError};

/// How many are kept when nobody needs one.
const KEPT: usize = 6;

/// See the module's documentation.
pub struct Kept<T>(Mutex<Vec<T>>);

impl<T> Kept<T> {
    pub fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    pub fn keep(&self, one: T) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(one);
        }
    }
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> fmt::Debug for Kept<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_kept_is_taken_first_and_few_are_kept() {
        let kept = Kept::default();
        assert_eq!(kept.take(), None);
        (0..KEPT + 2).for_each(|n| kept.keep(n));
        let taken: Vec<usize> = std::iter::from_fn(|| kept.take()).collect();
        assert_eq!(taken, (0..KEPT).rev().collect::<Vec<_>>());
    }
}
