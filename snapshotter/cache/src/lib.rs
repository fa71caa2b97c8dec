//! Blobs and layer data on disk, filled piece by piece from [`Source`]s.

pub mod source;

pub use source::{Blame, BlobKind, BlobRef, ByteStream, Class, FetchError, Origin, Source};
