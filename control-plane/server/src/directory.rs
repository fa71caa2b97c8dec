//! What the store says of clusters and of who is out, kept current in this process.
//!
//! Owns: [`Trust`], and the watch through which the scheduler learns of revocations. Other processes
//! may write to the same store, so it is read again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use skimmer_identity::{PeerId, Trust};
use skimmer_manager::{Error, Manager};
use tokio::sync::{Mutex, watch};

use crate::clock::unix_now;

/// By cluster id.
pub type Blocked = BTreeMap<String, BTreeSet<PeerId>>;

pub struct Directory {
    manager: Arc<Manager>,
    trust: Arc<Trust>,
    blocked: watch::Sender<Arc<Blocked>>,
    /// Readings of the store don't overtake each other.
    reading: Mutex<()>,
}

impl Directory {
    /// As the store is now.
    pub async fn open(manager: Arc<Manager>, grace: Duration) -> anyhow::Result<Arc<Self>> {
        let trust = Arc::new(Trust::new(grace));
        let blocked = watch::Sender::new(Arc::default());
        let directory = Arc::new(Self { manager, trust, blocked, reading: Mutex::default() });
        directory.refresh().await?;
        Ok(directory)
    }

    pub const fn trust(&self) -> &Arc<Trust> {
        &self.trust
    }

    /// Who is out, in each cluster; changes when that changes.
    pub fn blocked(&self) -> watch::Receiver<Arc<Blocked>> {
        self.blocked.subscribe()
    }

    /// Reads the store. What it held at the call is in effect when this returns.
    pub async fn refresh(&self) -> Result<(), Error> {
        let _alone = self.reading.lock().await;
        for cluster in self.manager.clusters().await? {
            if let Err(error) =
                self.trust.set_authority(&cluster.id, &cluster.authority.certificate)
            {
                tracing::error!(cluster = cluster.name, %error, "the CA of a cluster can't be used");
            }
        }
        let mut blocked = Blocked::new();
        for (cluster, peer) in self.manager.blocked(unix_now()).await? {
            blocked.entry(cluster).or_default().insert(peer);
        }
        self.trust.set_blocked(blocked.values().flatten().copied());
        self.blocked.send_if_modified(|known| {
            let changed = **known != blocked;
            if changed {
                *known = Arc::new(blocked);
            }
            changed
        });
        Ok(())
    }

    /// Reads the store every `interval`, for as long as it is polled.
    pub async fn keep(self: Arc<Self>, interval: Duration) {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.refresh().await {
                tracing::error!(
                    error = format!("{:#}", anyhow::Error::from(error)),
                    "read the store"
                );
            }
        }
    }
}
