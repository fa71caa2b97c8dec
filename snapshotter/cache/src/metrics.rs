//! What the cache counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Transfer {
    pub source: &'static str,
    pub class: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FromSource {
    pub source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Evicted {
    /// `blob`, `data` or `objects`.
    pub what: &'static str,
}

#[derive(Clone, Debug)]
pub struct Metrics {
    pub fetched: Family<Transfer, Counter>,
    pub runs: Family<Transfer, Counter>,
    pub failed_runs: Family<Transfer, Counter>,
    pub wrong_pieces: Family<FromSource, Counter>,
    pub fault_wait: Histogram,
    pub used: Gauge,
    pub quota: Gauge,
    pub evicted: Family<Evicted, Counter>,
}

impl Metrics {
    /// Registers everything under the prefix `cache`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            fetched: Family::default(),
            runs: Family::default(),
            failed_runs: Family::default(),
            wrong_pieces: Family::default(),
            fault_wait: Histogram::new(exponential_buckets(0.001, 2.0, 16)),
            used: Gauge::default(),
            quota: Gauge::default(),
            evicted: Family::default(),
        };
        let r = registry.sub_registry_with_prefix("cache");
        let fetched = metrics.fetched.clone();
        r.register_with_unit("fetched", "Blob bytes received", Unit::Bytes, fetched);
        r.register("runs", "Requests sent to sources", metrics.runs.clone());
        r.register("failed_runs", "Requests to sources that failed", metrics.failed_runs.clone());
        let wrong = metrics.wrong_pieces.clone();
        r.register("wrong_pieces", "Pieces dropped because their digest did not match", wrong);
        let wait = metrics.fault_wait.clone();
        r.register_with_unit("fault_wait", "Time that a reader waited", Unit::Seconds, wait);
        r.register_with_unit("used", "Disk space in use", Unit::Bytes, metrics.used.clone());
        r.register_with_unit("quota", "Disk space allowed", Unit::Bytes, metrics.quota.clone());
        let evicted = metrics.evicted.clone();
        r.register_with_unit("evicted", "Disk space freed by eviction", Unit::Bytes, evicted);
        metrics
    }
}
