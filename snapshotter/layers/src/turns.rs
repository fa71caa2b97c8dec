//! Whose turn it is, where layers share something scarce: places to wait for bytes, and processors.
//!
//! [`Turns`] decides (pure): a layer gets another place only while more are free than it holds already. So
//! one alone gets half of them (of an odd number the larger half), two get a third each, and one more finds a
//! place free unless each is taken by another. Those who don't get one at once wait in the order in which they
//! came, layer by layer in turn. [`Places`] is the shell around it.
//!
//! Invariants:
//! - No more places are taken than there are.
//! - Whoever holds none waits only if all places are taken.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::oneshot;
use tokio::time::timeout_at;

/// Names a layer.
pub type LayerId = u64;

/// See the module's documentation. `T` is whoever waits.
#[derive(Debug)]
pub struct Turns<T> {
    free: usize,
    held: BTreeMap<LayerId, usize>,
    /// No queue is empty.
    queues: BTreeMap<LayerId, VecDeque<T>>,
    /// The layers with queues, the next to be served first.
    order: VecDeque<LayerId>,
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
    pub fn take(&mut self, layer: LayerId, who: T) -> Option<T> {
        if !self.queues.contains_key(&layer) && self.may_take(layer) {
            self.grant(layer);
            return Some(who);
        }
        let queue = self.queues.entry(layer).or_insert_with(|| {
            self.order.push_back(layer);
            VecDeque::new()
        });
        queue.push_back(who);
        None
    }

    /// `layer` gives a place back. Who has one now, and of which layer.
    pub fn give_back(&mut self, layer: LayerId) -> Vec<(LayerId, T)> {
        self.free += 1;
        if let Some(held) = self.held.get_mut(&layer) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(&layer);
            }
        }
        let mut next = Vec::new();
        let mut passed = 0;
        while passed < self.order.len() {
            let Some(layer) = self.order.pop_front() else { break };
            if !self.may_take(layer) {
                self.order.push_back(layer);
                passed += 1;
                continue;
            }
            passed = 0;
            if let Some(queue) = self.queues.get_mut(&layer) {
                next.extend(queue.pop_front().map(|who| (layer, who)));
                if queue.is_empty() {
                    self.queues.remove(&layer);
                } else {
                    self.order.push_back(layer);
                }
                self.grant(layer);
            }
        }
        next
    }

    fn may_take(&self, layer: LayerId) -> bool {
        let held = self.held.get(&layer).copied().unwrap_or(0);
        held < self.free
    }

    fn grant(&mut self, layer: LayerId) {
        self.free -= 1;
        *self.held.entry(layer).or_default() += 1;
    }
}

/// The places of all layers.
#[derive(Debug)]
pub struct Places {
    turns: Mutex<Turns<oneshot::Sender<Place>>>,
    next_layer: AtomicU64,
}

/// What one layer has of the places.
#[derive(Debug)]
pub struct Share {
    layer: LayerId,
    places: Arc<Places>,
}

/// A place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    layer: LayerId,
    /// `None`: it has been given back.
    places: Option<Arc<Places>>,
}

impl Places {
    pub fn new(places: usize) -> Arc<Self> {
        let turns = Mutex::new(Turns::new(places.max(1)));
        Arc::new(Self { turns, next_layer: AtomicU64::new(0) })
    }

    /// For another layer.
    pub fn share(self: &Arc<Self>) -> Share {
        let layer = self.next_layer.fetch_add(1, Ordering::Relaxed);
        Share { layer, places: Arc::clone(self) }
    }

    fn place(self: &Arc<Self>, layer: LayerId) -> Place {
        Place { layer, places: Some(Arc::clone(self)) }
    }

    fn give_back(self: &Arc<Self>, layer: LayerId) {
        let mut back = vec![layer];
        while let Some(layer) = back.pop() {
            let next = self.turns().give_back(layer);
            for (layer, who) in next {
                // Who doesn't wait any more passes it on.
                if let Err(mut place) = who.send(self.place(layer)) {
                    place.places = None;
                    back.push(layer);
                }
            }
        }
    }

    fn turns(&self) -> MutexGuard<'_, Turns<oneshot::Sender<Place>>> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// There was no place in time.
#[derive(Debug, thiserror::Error)]
#[error("too many were waiting already: no turn came before the deadline")]
pub struct Late;

impl Share {
    /// Waits for a place. `None`: there will be none. Cancelling it is safe: the place goes to who is next.
    pub async fn take(&self) -> Option<Place> {
        let (sender, receiver) = oneshot::channel();
        let at_once = self.places.turns().take(self.layer, sender).is_some();
        if at_once { Some(self.places.place(self.layer)) } else { receiver.await.ok() }
    }

    /// Waits for a place until `until`. One that is free is taken even later.
    pub async fn take_until(&self, until: Instant) -> Result<Place, Late> {
        let place = timeout_at(until.into(), self.take()).await;
        place.ok().flatten().ok_or(Late)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(places) = self.places.take() {
            places.give_back(self.layer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use proptest::prelude::{any, prop_assert, proptest};

    /// Takes until it has to wait; how many it got.
    fn fill(turns: &mut Turns<u32>, layer: LayerId) -> usize {
        (0..).take_while(|who| turns.take(layer, *who).is_some()).count()
    }

    #[test]
    fn a_layer_leaves_room_for_others() {
        let mut turns = Turns::new(256);
        assert_eq!(fill(&mut turns, 1), 128);
        assert_eq!(fill(&mut turns, 2), 64);
        assert_eq!(fill(&mut turns, 3), 32);
        let mut turns = Turns::new(1);
        assert_eq!((fill(&mut turns, 1), fill(&mut turns, 2)), (1, 0));
    }

    #[test]
    fn those_who_wait_are_served_layer_by_layer_in_their_order() {
        let mut turns = Turns::new(2);
        assert_eq!(turns.take(1, 'a'), Some('a'));
        assert_eq!(turns.take(2, 'b'), Some('b'));
        for (layer, who) in [(1, 'c'), (1, 'd'), (3, 'e'), (2, 'f')] {
            assert_eq!(turns.take(layer, who), None);
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
            for (take, layer) in steps {
                let at = usize::try_from(layer).unwrap();
                if take {
                    match turns.take(layer, ()) {
                        Some(()) => held[at] += 1,
                        None => waiting[at] += 1,
                    }
                } else if held[at] > 0 {
                    held[at] -= 1;
                    for (layer, ()) in turns.give_back(layer) {
                        let at = usize::try_from(layer).unwrap();
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

    #[tokio::test]
    async fn nobody_waits_for_a_place_beyond_the_deadline() {
        let share = Places::new(1).share();
        let place = share.take().await.unwrap();
        let began = Instant::now();
        let until = began + Duration::from_millis(50);
        let late = futures::future::join(share.take_until(until), share.take_until(until)).await;
        assert!(matches!(late, (Err(Late), Err(Late))));
        assert!(began.elapsed() >= Duration::from_millis(50));
        drop(place);
        assert!(share.take_until(until).await.is_ok(), "it is free");
    }
}
