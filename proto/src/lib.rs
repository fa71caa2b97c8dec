//! What two processes must agree on: digests, references, piece geometry, the piece table, and the
//! gRPC messages of our own services. Pure: no I/O, no clock.

pub mod digest;
pub mod geometry;
pub mod node;
pub mod piece_table;
pub mod reference;

pub use digest::Digest;
pub use geometry::Geometry;
pub use piece_table::PieceTable;
pub use reference::Reference;
