//! Turns at pulling layers through, in the order in which the layers were begun.
//!
//! Nodes that pull an image together then fetch the same layers at a time. If each took others first, the origin would
//! send a bit of every layer, of which no node could use more than the part that it is at.

use std::pin::Pin;
use std::sync::Arc;

use futures::FutureExt as _;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

type Waiting = dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send;

/// So many layers at once.
pub struct Pulls(Arc<Semaphore>);

/// A place in the queue, or a turn that has come; dropping it gives it up.
pub enum Turn {
    Waiting(Pin<Box<Waiting>>),
    Come(OwnedSemaphorePermit),
}

impl Pulls {
    pub fn new(at_once: usize) -> Self {
        Self(Arc::new(Semaphore::new(at_once.max(1))))
    }

    /// Queues behind all that did so before, from now on.
    pub fn queue(&self) -> Turn {
        let mut waiting: Pin<Box<Waiting>> = Box::pin(Arc::clone(&self.0).acquire_owned());
        // The place in the queue is taken by the first look at it.
        match waiting.as_mut().now_or_never() {
            Some(Ok(permit)) => Turn::Come(permit),
            _ => Turn::Waiting(waiting),
        }
    }
}

impl Turn {
    /// Waits for it. `None`: there are no turns any more.
    pub async fn come(self) -> Option<OwnedSemaphorePermit> {
        match self {
            Self::Waiting(waiting) => waiting.await.ok(),
            Self::Come(permit) => Some(permit),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pulls;

    #[tokio::test]
    async fn turns_come_in_the_order_of_queueing_whoever_waits_first() {
        let pulls = Pulls::new(1);
        let [first, second, third, fourth] = std::array::from_fn(|_| pulls.queue());
        let first = first.come().await;
        assert!(first.is_some());
        let mut fourth = Box::pin(fourth.come());
        assert!(futures::poll!(&mut fourth).is_pending());
        // One that needs no turn makes room.
        drop(second);
        drop(first);
        assert!(futures::poll!(&mut fourth).is_pending(), "the third is before it");
        drop(third.come().await);
        assert!(fourth.await.is_some());
    }
}
