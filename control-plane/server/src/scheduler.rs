//! The scheduler's shell: streams of nodes in, events to the pure scheduler of their cluster, its
//! actions back as messages.
//!
//! ```text
//! stream ─ convert ─► owner of the cluster ─► skimmer_scheduler ─► actions ─► queues of the nodes
//!                       └► records (who says how a blob decodes)
//! ```

mod attend;
mod cluster;
mod convert;
mod hub;
mod metrics;
mod records;
mod roster;

pub use attend::Service;
pub use cluster::{Detail, TaskRow};
pub use hub::Hub;
pub use metrics::Metrics;
