//! The scheduler's shell: streams of nodes in, events to the pure scheduler of their cluster, its
//! actions back as messages.
//!
//! ```text
//! stream ─ convert ─► owner of the cluster ─► skimmer_scheduler ─► actions ─► queues of the nodes
//!    │                  └► records (who says how a blob decodes)
//!    └► front ─► the scheduler that owns the task (relay ─► its owner of the cluster ─► …)
//! ```
//!
//! Several schedulers share the tasks of every cluster: each task has one owner (ring), whichever
//! scheduler a node attends at.

mod attend;
mod cluster;
mod convert;
mod front;
mod hub;
mod metrics;
mod records;
mod relay;
mod replicas;
mod ring;
mod roster;

pub use attend::Service;
pub use cluster::{Detail, TaskRow};
pub use hub::Hub;
pub use metrics::Metrics;
pub use replicas::Replicas;
