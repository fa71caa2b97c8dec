//! Blobs and layer data on disk, filled piece by piece from [`Sources`].

mod bits;
pub mod blob;
pub mod cache;
mod disk;
pub mod documents;
mod evict;
mod fetch;
pub mod layer;
mod metrics;
pub mod planner;
pub mod scrub;
pub mod source;
mod space;
mod upkeep;

pub use blob::{Blob, PullThrough, Rot, Whole};
pub use cache::{Cache, Config, Entry, Held, Pin, Prune, Usage, WeakCache};
pub use documents::Documents;
pub use layer::{Hold, LayerData, LayerFiles, LayerObjects, Spans};
pub use source::{
    Blame, BlobKind, BlobRef, ByteStream, Class, Delivery, FetchError, Order, Origin, PieceSource,
    PieceStream, Source, Sources, Urgent, Via,
};
