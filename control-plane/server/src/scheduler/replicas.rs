//! The schedulers that run beside this one: each writes into the store that it runs, and reads who else does.

use std::sync::Arc;
use std::time::Duration;

use skimmer_control_store::Scheduler;
use skimmer_manager::{Error, Manager};
use tokio::sync::watch;

use super::ring::Ring;
use crate::clock::unix_now_ms;

/// A few of them fit into [`skimmer_manager::SILENCE`].
const BEAT: Duration = Duration::from_secs(1);

pub struct Replicas {
    manager: Arc<Manager>,
    own: Scheduler,
    ring: watch::Sender<Arc<Ring>>,
}

impl Replicas {
    /// The store knows of the scheduler `own` when this returns.
    pub async fn join(manager: Arc<Manager>, own: Scheduler) -> Result<Self, Error> {
        let all = manager.beat(&own, unix_now_ms()).await?;
        let ring = watch::Sender::new(Arc::new(Ring::new(&own, all)));
        Ok(Self { manager, own, ring })
    }

    /// Who runs; changes when that changes.
    pub fn ring(&self) -> watch::Receiver<Arc<Ring>> {
        self.ring.subscribe()
    }

    /// Keeps it current, for as long as it is polled.
    pub async fn keep(&self) {
        let mut ticks = tokio::time::interval(BEAT);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let all = match self.manager.beat(&self.own, unix_now_ms()).await {
                Ok(all) => all,
                Err(error) => {
                    let error = format!("{:#}", anyhow::Error::from(error));
                    tracing::error!(error, "say that this scheduler runs");
                    continue;
                }
            };
            let ring = Ring::new(&self.own, all);
            self.ring.send_if_modified(|known| {
                let changed = **known != ring;
                if changed {
                    tracing::info!(schedulers = ring.ids().count(), "the schedulers have changed");
                    *known = Arc::new(ring);
                }
                changed
            });
        }
    }

    /// The others needn't wait to notice that this scheduler is gone.
    pub async fn leave(&self) {
        if let Err(error) = self.manager.retire(&self.own.id).await {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(error, "say that this scheduler has ended");
        }
    }
}
