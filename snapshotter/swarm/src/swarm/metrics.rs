//! What the swarm counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Because {
    pub why: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Failing {
    pub from: &'static str,
    pub fault: &'static str,
}

#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub origin: Family<Because, Counter>,
    pub received: Counter,
    pub served: Counter,
    pub failures: Family<Failing, Counter>,
    pub peers: Gauge,
    pub scheduler: Gauge,
}

impl Metrics {
    /// Registers everything under the prefix `swarm`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let r = registry.sub_registry_with_prefix("swarm");
        let origin = metrics.origin.clone();
        r.register_with_unit("origin", "Bytes read from origins, by reason", Unit::Bytes, origin);
        let received = metrics.received.clone();
        r.register_with_unit("received", "Bytes received from peers", Unit::Bytes, received);
        let served = metrics.served.clone();
        r.register_with_unit("served", "Bytes served to peers", Unit::Bytes, served);
        r.register("failures", "Requests that failed", metrics.failures.clone());
        r.register("peers", "Peers connected", metrics.peers.clone());
        r.register("scheduler", "Whether a scheduler is connected", metrics.scheduler.clone());
        metrics
    }
}
