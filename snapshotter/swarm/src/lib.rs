//! Pieces from and to other nodes.

pub mod transport;
