//! How jobs of all layers share the processors: layer by layer, and readers before who only fills.

use std::sync::Arc;

use skimmer_cache::Class;

use crate::turns::{Place, Places, Share};

/// As many jobs as keep the processors busy.
#[derive(Debug)]
pub struct Decoders {
    /// Readers wait.
    urgent: Arc<Places>,
    /// Nobody waits: leaves room for those who do.
    background: Arc<Places>,
}

/// What one layer has of them.
#[derive(Debug)]
pub struct Turn {
    urgent: Share,
    background: Share,
}

impl Decoders {
    pub fn new(processors: usize) -> Self {
        Self { urgent: places(processors.max(1)), background: places((processors / 2).max(1)) }
    }

    /// For another layer.
    pub fn turn(&self) -> Turn {
        Turn { urgent: self.urgent.share(), background: self.background.share() }
    }
}

impl Turn {
    /// Waits until a job for `class` may begin. `None`: it never may.
    pub async fn take(&self, class: Class) -> Option<Place> {
        match class {
            Class::Background => self.background.take().await,
            Class::Fault | Class::PullThrough => self.urgent.take().await,
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
        for processors in 1..9 {
            let decoders = Decoders::new(processors);
            let (crowd, one) = (decoders.turn(), decoders.turn());
            let mut running = Vec::new();
            for _ in 0..processors {
                running.push(crowd.take(Class::Fault).await.unwrap());
            }
            let mut waiting = Box::pin(crowd.take(Class::Fault));
            assert!(poll!(&mut waiting).is_pending());
            if processors > 1 {
                drop(one.take(Class::Fault).await.unwrap());
            }
            running.clear();
            drop(waiting.await.unwrap());
            drop(one.take(Class::Background).await.unwrap());
        }
    }

    #[tokio::test]
    async fn layers_that_wait_are_served_in_turn() {
        let decoders = Decoders::new(1);
        let (crowd, one) = (decoders.turn(), decoders.turn());
        let running = crowd.take(Class::Fault).await.unwrap();
        let mut many: Vec<_> = (0..100).map(|_| Box::pin(crowd.take(Class::Fault))).collect();
        for waiting in &mut many {
            assert!(poll!(waiting).is_pending());
        }
        let mut victim = Box::pin(one.take(Class::Fault));
        assert!(poll!(&mut victim).is_pending());
        drop(running);
        drop(many.remove(0).await.unwrap());
        drop(victim.await.unwrap());
    }
}
