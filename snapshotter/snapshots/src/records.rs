//! The snapshots that exist, with the look-ups that the service needs.
//!
//! The database implements it ([`Stored`]); [`Memory`] is its twin, and one conformance test holds
//! both to the same behaviour.

mod memory;
mod stored;
#[cfg(test)]
mod tests;

use std::ops::ControlFlow;

use skimmer_proto::Digest;

use crate::{Snapshot, Usage};

pub use memory::Memory;
pub use stored::Stored;

/// A failed operation on the records.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read the record of snapshot {name:?}")]
    Read { name: String, source: skimmer_store::Error },
    #[error("list the snapshot records")]
    List(#[source] skimmer_store::Error),
    #[error("decode the record of snapshot {name:?}")]
    Decode { name: String, source: serde_json::Error },
    #[error("encode the record of snapshot {name:?}")]
    Encode { name: String, source: serde_json::Error },
    #[error("replace all snapshot records")]
    ReplaceAll(#[source] skimmer_store::Error),
    #[error("write the record of snapshot {name:?}")]
    Write { name: String, source: skimmer_store::Error },
}

/// One atomic change.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "there is one at a time, and not for long")]
pub enum Change {
    Create(Snapshot),
    /// The same snapshot (same id), maybe under another name.
    Replace {
        old: Snapshot,
        new: Snapshot,
    },
    Remove(Snapshot),
}

/// The set of snapshots. Names and ids are unique in it: the caller checks before it changes.
pub trait Records: Send + Sync + 'static {
    fn get(&self, name: &str) -> Result<Option<Snapshot>, Error>;

    /// Whether a snapshot has `parent` as its snapshot parent.
    fn has_children(&self, parent: &str) -> Result<bool, Error>;

    /// Names of the snapshots whose snapshot parent is `parent`.
    fn children(&self, parent: &str) -> Result<Vec<String>, Error>;

    /// Names of the snapshots, of any kind, whose label claims chain ID `reference`, on `parent`.
    fn claiming(&self, reference: &str, parent: &str) -> Result<Vec<String>, Error>;

    /// Whether a snapshot's content is the layer of this blob.
    fn uses_layer(&self, blob: &Digest) -> Result<bool, Error>;

    /// Every snapshot, ordered by name, until `visit` breaks.
    fn visit(&self, visit: &mut dyn FnMut(Snapshot) -> ControlFlow<()>) -> Result<(), Error>;

    /// The first id that was never used.
    fn next_id(&self) -> Result<u64, Error>;

    /// Makes the change; it is durable when the call returns.
    fn apply(&self, change: &Change) -> Result<(), Error>;

    /// Whether every record can be read and every look-up finds exactly what it should.
    fn is_sound(&self) -> Result<bool, Error>;

    /// Makes `snapshots` the set, whatever it was, however damaged; no id up to `last_id` is used again.
    /// Remembered usages are forgotten.
    fn replace_all(&self, snapshots: &[Snapshot], last_id: u64) -> Result<(), Error>;

    /// The usage remembered for a committed snapshot.
    fn usage(&self, id: u64) -> Result<Option<Usage>, Error>;

    /// Remembers the usage of a committed snapshot; forgotten when the snapshot is removed.
    fn remember_usage(&self, id: u64, usage: Usage) -> Result<(), Error>;
}
