//! Metrics of the scheduler: a fold over what nodes say and what the scheduler decides.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use skimmer_scheduler::Action;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Cluster {
    pub cluster: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Decided {
    pub cluster: String,
    pub action: Kind,
    /// The scheduler's own words.
    pub reason: String,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
pub enum Kind {
    Assign,
    Lease,
    Neighbours,
    Cancel,
    Queued,
    Seed,
}

#[derive(Clone, Debug, Default)]
pub struct Metrics {
    nodes: Family<Cluster, Gauge>,
    tasks: Family<Cluster, Gauge>,
    messages: Family<Cluster, Counter>,
    decisions: Family<Decided, Counter>,
    pieces: Family<Decided, Counter>,
    refused: Family<Cluster, Counter>,
    overflows: Family<Cluster, Counter>,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("scheduler_nodes", "Connected nodes", metrics.nodes.clone());
        let help = "Tasks that some node has or wants";
        registry.register("scheduler_tasks", help, metrics.tasks.clone());
        registry.register("scheduler_messages", "Messages of nodes", metrics.messages.clone());
        let help = "What was decided and why";
        registry.register("scheduler_decisions", help, metrics.decisions.clone());
        let help = "Pieces that the decisions were about";
        registry.register("scheduler_decided_pieces", help, metrics.pieces.clone());
        let help = "Messages that contradict what is known or exceed a bound";
        registry.register("scheduler_refused_messages", help, metrics.refused.clone());
        let help = "Streams closed because the node didn't take its messages";
        registry.register("scheduler_overflows", help, metrics.overflows.clone());
        metrics
    }

    /// The view of one cluster.
    pub fn of(&self, cluster: &str) -> Fold {
        Fold { metrics: self.clone(), cluster: Cluster { cluster: cluster.to_owned() } }
    }
}

/// The metrics of one cluster.
#[derive(Clone, Debug)]
pub struct Fold {
    metrics: Metrics,
    cluster: Cluster,
}

impl Fold {
    pub fn size(&self, nodes: usize, tasks: usize) {
        let gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.metrics.nodes.get_or_create(&self.cluster).set(gauge(nodes));
        self.metrics.tasks.get_or_create(&self.cluster).set(gauge(tasks));
    }

    pub fn message(&self) {
        self.metrics.messages.get_or_create(&self.cluster).inc();
    }

    pub fn refused(&self) {
        self.metrics.refused.get_or_create(&self.cluster).inc();
    }

    pub fn overflow(&self) {
        self.metrics.overflows.get_or_create(&self.cluster).inc();
    }

    pub fn action(&self, action: &Action) {
        let (action, pieces, reason) = match action {
            Action::Assign { pieces, reason, .. } => (Kind::Assign, pieces.len(), reason),
            Action::Lease { pieces, reason, .. } => (Kind::Lease, pieces.len(), reason),
            Action::Neighbours { reason, .. } => (Kind::Neighbours, 0, reason),
            Action::Cancel { pieces, reason, .. } => (Kind::Cancel, pieces.len(), reason),
            Action::Queued { reason, .. } => (Kind::Queued, 0, reason),
            Action::Seed { reason, .. } => (Kind::Seed, 0, reason),
        };
        let cluster = self.cluster.cluster.clone();
        let label = Decided { cluster, action, reason: reason.to_string() };
        self.metrics.decisions.get_or_create(&label).inc();
        self.metrics.pieces.get_or_create(&label).inc_by(pieces.into());
    }
}
