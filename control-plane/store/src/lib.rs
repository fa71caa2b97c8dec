//! What the control plane keeps: clusters and their CAs, join tokens, nodes, running schedulers, events.
//!
//! One trait, [`Store`], an SQL database and a twin in memory, and one set of tests that both pass.

pub mod memory;
pub mod model;
pub mod sqlite;
pub mod store;

#[cfg(test)]
mod conformance;

pub use memory::Memory;
pub use model::{
    Authority, Cluster, Enrolment, Event, Joined, Node, Refusal, Role, Scheduler, Token, TokenHash,
};
pub use sqlite::Sqlite;
pub use store::{Error, Store};
