//! What this crate counts.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Counters of all layers together.
#[derive(Debug)]
pub struct Metrics {
    pub mounts: Gauge,
    pub reads: Counter,
    pub faults: Counter,
    pub failed_reads: Counter,
    pub chunks: Counter,
    pub pulls: Counter,
    pub failed_pulls: Counter,
    pub pulled_bytes: Counter,
    pub checked_bytes: Counter,
    pub rotten_pieces: Counter,
    pub rotten_chunks: Counter,
    pub rotten_objects: Counter,
    fault_wait: Histogram,
    pull_time: Histogram,
}

impl Metrics {
    /// Makes the counters and registers them as `layers_…`.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            mounts: Gauge::default(),
            reads: Counter::default(),
            faults: Counter::default(),
            failed_reads: Counter::default(),
            chunks: Counter::default(),
            pulls: Counter::default(),
            failed_pulls: Counter::default(),
            pulled_bytes: Counter::default(),
            checked_bytes: Counter::default(),
            rotten_pieces: Counter::default(),
            rotten_chunks: Counter::default(),
            rotten_objects: Counter::default(),
            // 0.5 ms to 65 s, then one for what is longer.
            fault_wait: Histogram::new(exponential_buckets(0.0005, 2.0, 18)),
            // 10 ms to 330 s.
            pull_time: Histogram::new(exponential_buckets(0.01, 2.0, 16)),
        };
        let registry = registry.sub_registry_with_prefix("layers");
        registry.register("mounts", "Layers mounted now", metrics.mounts.clone());
        for (name, help, counter) in [
            ("reads", "Reads that the kernel asked for", &metrics.reads),
            ("faults", "Reads that had to wait for bytes", &metrics.faults),
            ("failed_reads", "Reads answered with EIO", &metrics.failed_reads),
            ("chunks", "Chunks decoded on demand or in the background", &metrics.chunks),
            ("pulls", "Layers pulled through", &metrics.pulls),
            ("failed_pulls", "Layers whose pull-through failed", &metrics.failed_pulls),
            ("pulled_bytes", "Compressed bytes of layers pulled through", &metrics.pulled_bytes),
            ("checked_bytes", "Cached bytes checked for bit rot", &metrics.checked_bytes),
            ("rotten_pieces", "Cached pieces that had changed on disk", &metrics.rotten_pieces),
            ("rotten_chunks", "Decoded chunks that had changed on disk", &metrics.rotten_chunks),
            (
                "rotten_objects",
                "Indexes and inodes that had changed on disk",
                &metrics.rotten_objects,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        for (name, help, histogram) in [
            ("fault_wait", "How long reads waited for bytes", &metrics.fault_wait),
            ("pull_time", "How long pulling a layer through took", &metrics.pull_time),
        ] {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        }
        metrics
    }

    /// A read waited for `time`.
    pub fn waited(&self, time: Duration) {
        self.faults.inc();
        self.fault_wait.observe(time.as_secs_f64());
    }

    /// A layer of `bytes` compressed bytes was pulled through in `time`.
    pub fn pulled(&self, bytes: u64, time: Duration) {
        self.pulls.inc();
        self.pulled_bytes.inc_by(bytes);
        self.pull_time.observe(time.as_secs_f64());
    }
}
