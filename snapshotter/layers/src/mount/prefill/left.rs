//! The numbers of events that an earlier process took.
//!
//! An answer names an event by a number that may mean something else in this process. As long as it does, no new event
//! gets it; but whatever has it may let go of it at any moment. So a number is reserved as soon as that can be done, and
//! events that came to have the same are answered at once and alike: nobody can say whose an answer is.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use super::journal::Slot;
use super::numbers::reserve;

/// The numbers of events that are left to be answered.
#[derive(Debug, Default)]
pub struct LeftNumbers(BTreeMap<RawFd, Shared>);

/// What has one number.
#[derive(Debug)]
struct Shared {
    /// Keeps new events from getting it; `None`: something else has it.
    reserved: Option<OwnedFd>,
    /// Events that are being worked on.
    pending: usize,
    /// Those that are not.
    settled: Vec<Slot>,
    /// Whether all of these may be read.
    filled: bool,
}

/// Events that are to be answered now, all with one number.
#[derive(Debug, PartialEq, Eq)]
pub struct Due {
    pub slots: Vec<Slot>,
    pub allow: bool,
}

impl LeftNumbers {
    /// Of the events of an earlier process, one number for each.
    pub fn new(numbers: impl Iterator<Item = RawFd>) -> Self {
        let mut all = BTreeMap::new();
        for number in numbers {
            let new = Shared { reserved: None, pending: 0, settled: Vec::new(), filled: true };
            all.entry(number).or_insert(new).pending += 1;
        }
        Self(all)
    }

    /// Has duplicates of `other` take the numbers that are free.
    pub fn reserve(&mut self, other: BorrowedFd<'_>) {
        for (number, shared) in self.0.iter_mut().filter(|(_, shared)| shared.reserved.is_none()) {
            shared.reserved = reserve(*number, other);
        }
    }

    /// A new event has this number.
    pub fn join(&mut self, number: RawFd) {
        if let Some(shared) = self.0.get_mut(&number) {
            shared.pending += 1;
        }
    }

    /// Nobody works any more on the event of this number in `slot`. What is to be answered now, if anything is; then
    /// the number is to be [forgotten](Self::forget).
    pub fn settle(&mut self, number: RawFd, slot: Slot, filled: bool) -> Option<Due> {
        let Some(shared) = self.0.get_mut(&number) else {
            return Some(Due { slots: vec![slot], allow: filled });
        };
        shared.pending = shared.pending.saturating_sub(1);
        shared.settled.push(slot);
        shared.filled &= filled;
        let due = || Due { slots: shared.settled.clone(), allow: shared.filled };
        (shared.pending == 0).then(due)
    }

    /// All events of this number are answered.
    pub fn forget(&mut self, number: RawFd) {
        self.0.remove(&number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;

    fn due(slots: &[usize], allow: bool) -> Option<Due> {
        Some(Due { slots: slots.iter().copied().map(Slot).collect(), allow })
    }

    #[test]
    fn what_has_one_number_is_answered_at_once_and_alike() {
        for (first, second) in [(true, true), (true, false), (false, true)] {
            let mut left = LeftNumbers::new([7, 9].into_iter());
            left.join(7);
            left.join(8);
            assert_eq!(left.settle(8, Slot(3), true), due(&[3], true), "it is alone");
            assert_eq!(left.settle(9, Slot(2), second), due(&[2], second), "so is this");
            assert_eq!(left.settle(7, Slot(1), first), None, "the other is not there yet");
            assert_eq!(left.settle(7, Slot(4), second), due(&[1, 4], first && second));
            left.forget(7);
            left.join(7);
            assert_eq!(left.settle(7, Slot(5), true), due(&[5], true), "that is over");
        }
        let mut twice = LeftNumbers::new([7, 7].into_iter());
        assert_eq!(twice.settle(7, Slot(1), true), None);
        assert_eq!(twice.settle(7, Slot(2), true), due(&[1, 2], true));
    }

    #[test]
    fn a_number_is_reserved_as_soon_as_it_is_free() {
        let file = tempfile::tempfile().unwrap();
        let other = reserve(800, file.as_fd());
        let mut left = LeftNumbers::new([800, -1].into_iter());
        let is_reserved = |left: &LeftNumbers| left.0[&800].reserved.is_some();
        left.reserve(file.as_fd());
        assert!(!is_reserved(&left));
        drop(other);
        left.reserve(file.as_fd());
        assert!(is_reserved(&left));
        assert!(reserve(800, file.as_fd()).is_none());
        left.forget(800);
        assert!(reserve(800, file.as_fd()).is_some(), "it was given back");
    }
}
