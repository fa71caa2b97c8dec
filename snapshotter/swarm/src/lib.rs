//! Pieces from and to other nodes, as the scheduler directs.

pub mod member;
pub mod plan;
pub mod swarm;
pub mod transport;

pub use member::Member;
pub use swarm::{Rights, Swarm};
