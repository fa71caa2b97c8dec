//! How jobs of all layers share the processors: layer by layer, and readers before who only fills.

use std::sync::Arc;

use skimmer_cache::Class;
use skimmer_index::chunk::ChunkDecoder;
use tokio::sync::Notify;

use crate::buffers::Buffers;
use crate::kept::Kept;
use crate::turns::{Place, Places, Share};

/// Jobs of one layer beyond one for each processor: some wait for the disk, or for a thread. On two processors, six jobs
/// have a large file whose blob is on disk read in order 5 % faster than four do, and four 9 % faster than three.
const SPARE: usize = 4;

/// As many jobs as keep the processors busy.
#[derive(Debug)]
pub struct Decoders {
    /// Readers wait.
    urgent: Arc<Places>,
    /// Nobody waits: leaves room for those who do.
    background: Arc<Places>,
    buffers: Arc<Buffers>,
    idle: Arc<Kept<ChunkDecoder>>,
}

/// What one layer has of them.
#[derive(Debug)]
pub struct Turn {
    urgent: Share,
    background: Share,
    /// For what is decoded.
    pub buffers: Arc<Buffers>,
    /// Decoders that no job uses.
    pub idle: Arc<Kept<ChunkDecoder>>,
}

impl Decoders {
    pub fn new(processors: usize, buffers: Arc<Buffers>) -> Self {
        Self {
            urgent: places(processors + SPARE),
            background: places((processors / 2).max(1)),
            buffers,
            idle: Arc::default(),
        }
    }

    /// For another layer.
    pub fn turn(&self) -> Turn {
        let (urgent, background) = (self.urgent.share(), self.background.share());
        let (buffers, idle) = (Arc::clone(&self.buffers), Arc::clone(&self.idle));
        Turn { urgent, background, buffers, idle }
    }
}

impl Turn {
    /// Waits until a job for `class` may begin; one for the background needn't wait for its like once it is `urged`.
    /// `None`: it never may.
    pub async fn take(&self, class: Class, urged: &Notify) -> Option<Place> {
        if class != Class::Background {
            return self.urgent.take().await;
        }
        tokio::select! {
            biased;
            () = urged.notified() => self.urgent.take().await,
            place = self.background.take() => place,
        }
    }
}

/// One layer alone gets `busy` of them, and whoever comes next still finds one free.
fn places(busy: usize) -> Arc<Places> {
    Places::new(busy * 2 - 1)
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    #[tokio::test]
    async fn a_layer_alone_keeps_the_processors_busy_and_another_waits_for_no_turn() {
        let calm = Notify::new();
        for processors in 1..9 {
            let decoders = Decoders::new(processors, Arc::default());
            let (crowd, one) = (decoders.turn(), decoders.turn());
            let mut running = Vec::new();
            for _ in 0..processors + SPARE {
                running.push(crowd.take(Class::Fault, &calm).await.unwrap());
            }
            let mut waiting = Box::pin(crowd.take(Class::Fault, &calm));
            assert!(poll!(&mut waiting).is_pending());
            drop(one.take(Class::Fault, &calm).await.unwrap());
            running.clear();
            drop(waiting.await.unwrap());
            drop(one.take(Class::Background, &calm).await.unwrap());
        }
    }

    #[tokio::test]
    async fn layers_that_wait_are_served_in_turn() {
        let (urgent, background) = (places(1), places(1));
        let (decoders, calm) = (
            Decoders { urgent, background, buffers: Arc::default(), idle: Arc::default() },
            Notify::new(),
        );
        let (crowd, one) = (decoders.turn(), decoders.turn());
        let running = crowd.take(Class::Fault, &calm).await.unwrap();
        let mut many: Vec<_> =
            (0..100).map(|_| Box::pin(crowd.take(Class::Fault, &calm))).collect();
        for waiting in &mut many {
            assert!(poll!(waiting).is_pending());
        }
        let mut victim = Box::pin(one.take(Class::Fault, &calm));
        assert!(poll!(&mut victim).is_pending());
        drop(running);
        drop(many.remove(0).await.unwrap());
        drop(victim.await.unwrap());
    }

    #[tokio::test]
    async fn what_a_reader_comes_to_wait_for_leaves_the_background() {
        let (decoders, calm, urged) =
            (Decoders::new(1, Arc::default()), Notify::new(), Notify::new());
        let layer = decoders.turn();
        let running = layer.take(Class::Background, &calm).await.unwrap();
        let mut other = Box::pin(layer.take(Class::Background, &calm));
        let mut waiting = Box::pin(layer.take(Class::Background, &urged));
        assert!(poll!(&mut other).is_pending() && poll!(&mut waiting).is_pending());
        urged.notify_one();
        drop(waiting.await.unwrap());
        assert!(poll!(&mut other).is_pending());
        drop(running);
        drop(other.await.unwrap());
    }
}
