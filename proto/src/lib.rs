//! What two processes must agree on: digests, references, platforms, piece geometry, the piece table, tasks,
//! and the gRPC messages of our own services; and errors as text. Pure: no I/O, no clock.

pub mod control;
pub mod digest;
pub mod error;
pub mod geometry;
pub mod node;
pub mod piece_table;
pub mod pieces;
pub mod platform;
pub mod reference;
pub mod task;

pub use digest::Digest;
pub use error::error_chain;
pub use geometry::Geometry;
pub use piece_table::PieceTable;
pub use pieces::PieceSet;
pub use platform::Platform;
pub use reference::Reference;
pub use task::{Scope, TaskId};
