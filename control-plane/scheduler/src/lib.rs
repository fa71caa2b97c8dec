//! The scheduler's core: events in, actions out; no sockets, no clock, no randomness of its own.

pub mod event;

pub use event::{Action, Class, Event, Fault, NodeId, NodeInfo, Now, Reason, Shape};
