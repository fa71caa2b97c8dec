//! Schedulers: which run, and how they know each other.

use std::time::Duration;

use skimmer_control_store::Scheduler;
use skimmer_identity::{Membership, PeerId, Role};

use super::{Error, Manager, load};

/// A scheduler that hasn't said for so long that it runs has ended.
pub const SILENCE: Duration = Duration::from_secs(4);

impl Manager {
    /// Says that the scheduler runs, and returns all that do, by id.
    pub async fn beat(&self, own: &Scheduler, now_ms: i64) -> Result<Vec<Scheduler>, Error> {
        Ok(self.store.beat(own, now_ms, earliest(now_ms)).await?)
    }

    /// The schedulers that run, by id.
    pub async fn schedulers(&self, now_ms: i64) -> Result<Vec<Scheduler>, Error> {
        Ok(self.store.schedulers(earliest(now_ms)).await?)
    }

    /// The scheduler with this id has ended.
    pub async fn retire(&self, id: &str) -> Result<(), Error> {
        Ok(self.store.retire(id).await?)
    }

    /// A certificate, DER, by which a scheduler with this key shows to others that it may speak for
    /// nodes of the cluster (its id).
    pub async fn admit_scheduler(
        &self,
        cluster: &str,
        key: PeerId,
        now: i64,
    ) -> Result<Vec<u8>, Error> {
        let membership = Membership {
            peer: key,
            cluster: cluster.to_owned(),
            zone: String::new(),
            role: Role::Scheduler,
            not_before: now,
            not_after: self.end_of_certificate(now),
        };
        Ok(load(&self.cluster(cluster).await?.authority)?.issue(&membership)?)
    }
}

fn earliest(now_ms: i64) -> i64 {
    now_ms.saturating_sub(i64::try_from(SILENCE.as_millis()).unwrap_or(i64::MAX))
}
