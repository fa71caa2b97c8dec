//! What the snapshot service counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

pub struct Metrics {
    prepared: Family<Outcome, Counter>,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let prepared = Family::default();
        registry.register(
            "snapshots_prepared",
            "Snapshots asked for, by outcome: lazy (the layer is provided), mounts, view",
            prepared.clone(),
        );
        Self { prepared }
    }

    pub fn prepared(&self, outcome: &'static str) {
        self.prepared.get_or_create(&Outcome { outcome }).inc();
    }
}
