//! What the snapshot service counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::materialize::Way;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct How {
    how: &'static str,
}

/// Blobs that containerd was given.
#[derive(Clone, Debug)]
pub struct Adoptions {
    adopted: Family<How, Counter>,
}

impl Adoptions {
    pub fn register(registry: &mut Registry) -> Self {
        let adopted = Family::default();
        registry.register(
            "content_adopted",
            "Blobs put into containerd's content store, by how: linked, copied, streamed",
            adopted.clone(),
        );
        Self { adopted }
    }

    pub fn count(&self, way: Way) {
        if way != Way::Present {
            self.adopted.get_or_create(&How { how: way.name() }).inc();
        }
    }
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
