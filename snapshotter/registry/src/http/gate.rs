//! How many requests may be under way to one host: a bound for all, and a few places beside it that
//! only faults may use, so that a reader never waits behind bulk traffic.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use skimmer_cache::source::Class;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

const HOSTS: usize = 1024;
/// Places for faults beside the others.
pub const RESERVED: usize = 4;

pub struct Gate {
    places: usize,
    hosts: Mutex<HashMap<String, Places>>,
}

#[derive(Clone)]
struct Places {
    shared: Arc<Semaphore>,
    reserved: Arc<Semaphore>,
}

/// A place among the requests to a host, until it is dropped.
pub type Permit = Option<OwnedSemaphorePermit>;

impl Gate {
    pub fn new(places: usize) -> Self {
        Self { places: places.max(1), hosts: Mutex::default() }
    }

    pub async fn enter(&self, host: &str, class: Class) -> Permit {
        let places = self.places(host);
        let shared = places.shared.acquire_owned();
        // Acquiring fails only for a closed semaphore, and none is ever closed.
        if class != Class::Fault {
            return shared.await.ok();
        }
        tokio::select! {
            biased;
            permit = shared => permit.ok(),
            permit = places.reserved.acquire_owned() => permit.ok(),
        }
    }

    fn places(&self, host: &str) -> Places {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= HOSTS {
            let idle = |p: &Places| p.shared.available_permits() == self.places;
            hosts.retain(|_, places| !idle(places));
        }
        let fresh = || Places {
            shared: Arc::new(Semaphore::new(self.places)),
            reserved: Arc::new(Semaphore::new(RESERVED)),
        };
        hosts.entry(host.to_owned()).or_insert_with(fresh).clone()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn faults_pass_a_full_gate_within_bounds() {
        let gate = Gate::new(2);
        let _bulk =
            [gate.enter("a", Class::Background).await, gate.enter("a", Class::PullThrough).await];
        let soon = async |class| {
            tokio::time::timeout(Duration::from_millis(20), gate.enter("a", class)).await.ok()
        };
        assert!(soon(Class::PullThrough).await.is_none());
        let mut faults = Vec::new();
        for _ in 0..RESERVED {
            faults.push(soon(Class::Fault).await.unwrap());
        }
        assert!(soon(Class::Fault).await.is_none());
        faults.clear();
        assert!(soon(Class::Fault).await.is_some());
        let other =
            tokio::time::timeout(Duration::from_millis(20), gate.enter("b", Class::Background));
        assert!(other.await.is_ok());
    }
}
