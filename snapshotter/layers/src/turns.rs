//! Who may wait for bytes: places are few, and no mount may take so many that another finds none.
//!
//! [`Turns`] decides (pure): a mount gets another place only while at least as many are free as it
//! holds already. So one mount alone gets half of them, two a third each, and whoever comes next always
//! finds some free. Those who don't get one at once wait in the order in which they came, mount by
//! mount in turn. [`Places`] is the shell around it.
//!
//! Invariants:
//! - No more places are taken than there are.
//! - Whoever holds none waits only if all places are taken.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Names a mount.
pub type Mount = u64;

/// See the module's documentation. `T` is whoever waits.
#[derive(Debug)]
pub struct Turns<T> {
    free: usize,
    held: BTreeMap<Mount, usize>,
    /// No queue is empty.
    queues: BTreeMap<Mount, VecDeque<T>>,
    /// The mounts with queues, the next to be served first.
    order: VecDeque<Mount>,
}

impl<T> Turns<T> {
    pub const fn new(places: usize) -> Self {
        Self {
            free: places,
            held: BTreeMap::new(),
            queues: BTreeMap::new(),
            order: VecDeque::new(),
        }
    }

    /// `Some`: the place is taken, and `who` given back; else `who` waits.
    pub fn take(&mut self, mount: Mount, who: T) -> Option<T> {
        if !self.queues.contains_key(&mount) && self.may_take(mount) {
            self.grant(mount);
            return Some(who);
        }
        let queue = self.queues.entry(mount).or_insert_with(|| {
            self.order.push_back(mount);
            VecDeque::new()
        });
        queue.push_back(who);
        None
    }

    /// `mount` gives a place back. Who has one now, and of which mount.
    pub fn give_back(&mut self, mount: Mount) -> Vec<(Mount, T)> {
        self.free += 1;
        if let Some(held) = self.held.get_mut(&mount) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(&mount);
            }
        }
        let mut next = Vec::new();
        let mut passed = 0;
        while passed < self.order.len() {
            let Some(mount) = self.order.pop_front() else { break };
            if !self.may_take(mount) {
                self.order.push_back(mount);
                passed += 1;
                continue;
            }
            passed = 0;
            if let Some(queue) = self.queues.get_mut(&mount) {
                next.extend(queue.pop_front().map(|who| (mount, who)));
                if queue.is_empty() {
                    self.queues.remove(&mount);
                } else {
                    self.order.push_back(mount);
                }
                self.grant(mount);
            }
        }
        next
    }

    fn may_take(&self, mount: Mount) -> bool {
        let held = self.held.get(&mount).copied().unwrap_or(0);
        held < self.free
    }

    fn grant(&mut self, mount: Mount) {
        self.free -= 1;
        *self.held.entry(mount).or_default() += 1;
    }
}

/// The places of all mounts.
#[derive(Debug)]
pub struct Places {
    turns: Mutex<Turns<oneshot::Sender<Place>>>,
    next_mount: AtomicU64,
}

/// What one mount has of the places.
#[derive(Debug)]
pub struct Share {
    mount: Mount,
    places: Arc<Places>,
}

/// A place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    mount: Mount,
    /// `None`: it has been given back.
    places: Option<Arc<Places>>,
}

impl Places {
    pub fn new(places: usize) -> Arc<Self> {
        let turns = Mutex::new(Turns::new(places.max(1)));
        Arc::new(Self { turns, next_mount: AtomicU64::new(0) })
    }

    /// For another mount.
    pub fn share(self: &Arc<Self>) -> Share {
        let mount = self.next_mount.fetch_add(1, Ordering::Relaxed);
        Share { mount, places: Arc::clone(self) }
    }

    fn place(self: &Arc<Self>, mount: Mount) -> Place {
        Place { mount, places: Some(Arc::clone(self)) }
    }

    fn give_back(self: &Arc<Self>, mount: Mount) {
        let mut back = vec![mount];
        while let Some(mount) = back.pop() {
            let next = self.turns().give_back(mount);
            for (mount, who) in next {
                // Who doesn't wait any more passes it on.
                if let Err(mut place) = who.send(self.place(mount)) {
                    place.places = None;
                    back.push(mount);
                }
            }
        }
    }

    fn turns(&self) -> MutexGuard<'_, Turns<oneshot::Sender<Place>>> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// Waits for a place. `None`: there will be none.
    pub async fn take(&self) -> Option<Place> {
        let (sender, receiver) = oneshot::channel();
        let at_once = self.places.turns().take(self.mount, sender).is_some();
        if at_once { Some(self.places.place(self.mount)) } else { receiver.await.ok() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(places) = self.places.take() {
            places.give_back(self.mount);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert, proptest};

    /// Takes until it has to wait; how many it got.
    fn fill(turns: &mut Turns<u32>, mount: Mount) -> usize {
        (0..).take_while(|who| turns.take(mount, *who).is_some()).count()
    }

    #[test]
    fn a_mount_leaves_room_for_others() {
        let mut turns = Turns::new(256);
        assert_eq!(fill(&mut turns, 1), 128);
        assert_eq!(fill(&mut turns, 2), 64);
        assert_eq!(fill(&mut turns, 3), 32);
        let mut turns = Turns::new(1);
        assert_eq!((fill(&mut turns, 1), fill(&mut turns, 2)), (1, 0));
    }

    #[test]
    fn those_who_wait_are_served_mount_by_mount_in_their_order() {
        let mut turns = Turns::new(2);
        assert_eq!(turns.take(1, 'a'), Some('a'));
        assert_eq!(turns.take(2, 'b'), Some('b'));
        for (mount, who) in [(1, 'c'), (1, 'd'), (3, 'e'), (2, 'f')] {
            assert_eq!(turns.take(mount, who), None);
        }
        assert_eq!(turns.give_back(1), [(1, 'c')]);
        assert_eq!(turns.give_back(2), [(3, 'e')]);
        assert_eq!(turns.give_back(1), [(2, 'f')]);
        assert_eq!(turns.give_back(2), [(1, 'd')]);
    }

    proptest! {
        #[test]
        fn places_are_bounded_used_and_shared(
            places in 1..20usize, steps in proptest::collection::vec((any::<bool>(), 0..4u64), 0..200)
        ) {
            let mut turns = Turns::new(places);
            let mut held = [0usize; 4];
            let mut waiting = [0usize; 4];
            for (take, mount) in steps {
                let at = usize::try_from(mount).unwrap();
                if take {
                    match turns.take(mount, ()) {
                        Some(()) => held[at] += 1,
                        None => waiting[at] += 1,
                    }
                } else if held[at] > 0 {
                    held[at] -= 1;
                    for (mount, ()) in turns.give_back(mount) {
                        let at = usize::try_from(mount).unwrap();
                        held[at] += 1;
                        waiting[at] -= 1;
                    }
                }
                let taken: usize = held.iter().sum();
                prop_assert!(taken <= places);
                for (held, waiting) in held.iter().zip(&waiting) {
                    prop_assert!(*waiting == 0 || *held >= places - taken, "waits in vain");
                }
            }
        }
    }

    #[tokio::test]
    async fn whoever_gives_up_waiting_passes_the_place_on() {
        let places = Places::new(2);
        let (one, other) = (places.share(), places.share());
        let (first, second) = (one.take().await.unwrap(), other.take().await.unwrap());
        let mut given_up: Vec<_> = (0..10_000).map(|_| Box::pin(one.take())).collect();
        for waiting in &mut given_up {
            assert!(futures::poll!(waiting).is_pending());
        }
        let mut last = Box::pin(other.take());
        assert!(futures::poll!(&mut last).is_pending());
        drop(given_up);
        drop(first);
        drop(second);
        drop(last.await.unwrap());
        drop((one.take().await.unwrap(), other.take().await.unwrap()));
    }
}
