//! The scheduler's core: events in, actions out; no sockets, no clock, no randomness of its own.
//!
//! ```text
//! event ──► facts (who has, wants, failed) ──► leases ──► matching ──► actions
//! ```

mod bits;
pub mod check;
pub mod event;
mod fetch;
mod limits;
mod link;
mod node;
mod rarity;
mod scheduler;
mod task;
pub mod view;

pub use event::{Action, Class, Event, Fault, NodeId, NodeInfo, Now, Reason, Shape};
pub use limits::Limits;
pub use scheduler::Scheduler;
