//! The node's metadata: one small RocksDB, shared by the stages as named tables.
//!
//! Owns: the database's files, its memory bounds, its write-ahead log.
//! Does not own: what the tables hold, and the bytes of blobs and layers, which are files.
//!
//! Invariants:
//! - A [`Batch`] reaches the database whole or not at all, also across a crash.
//! - A write with [`Sync::Now`] is on disk when it returns.
//! - A table sees its own keys only.
//! - Losing the database loses nothing that isn't known from elsewhere: whoever owns a table rebuilds
//!   it, or does again what it records.

mod batch;
mod error;
mod open;
mod table;

pub use batch::{Batch, Sync};
pub use error::Error;
pub use open::Store;
pub use table::{Rows, Table};
