//! Pieces from and to other nodes, as the scheduler directs.

pub mod plan;
pub mod transport;
