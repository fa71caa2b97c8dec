//! What a snapshot is: the record that the database and each snapshot's folder hold.

use std::collections::BTreeMap;
use std::fmt;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use skimmer_proto::Digest;

use crate::Binding;

pub type Labels = BTreeMap<String, String>;

/// containerd's label for "the chain ID this layer will have": it asks for the remote protocol.
pub const REFERENCE_LABEL: &str = "containerd.io/snapshot.ref";

/// Our own label, beside [`REFERENCE_LABEL`]: whoever asks has no other way to get the layer, so a layer
/// that we can't provide is an error. containerd hands on labels with this prefix.
pub const REQUIRED_LABEL: &str = "containerd.io/snapshot/skimmer.required";

/// One snapshot. In JSON, the value in the database and the content of `<id>/record`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Names the folder; never used again for another snapshot.
    pub id: u64,
    /// containerd's key (of a view or active snapshot) or name (of a committed one).
    pub name: String,
    /// Name of the snapshot parent; empty if there is none.
    pub parent: String,
    pub kind: Kind,
    pub created: SystemTime,
    pub updated: SystemTime,
    #[serde(default)]
    pub labels: Labels,
    /// The layer that this snapshot's content is; `None` for content in the snapshot's own folder.
    #[serde(default)]
    pub layer: Option<Binding>,
    /// Blobs of layers that it was mounted on when nobody kept their mounts: whoever uses it since gets errors.
    #[serde(default, with = "digests", skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<Digest>,
}

impl Snapshot {
    /// The chain ID that the snapshot's label claims.
    pub fn reference(&self) -> Option<&str> {
        self.labels.get(REFERENCE_LABEL).map(String::as_str)
    }
}

/// Digests in JSON: each is `sha256:<hex>`.
mod digests {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
    use skimmer_proto::Digest;

    pub fn serialize<S: Serializer>(digests: &[Digest], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(digests.iter().map(Digest::to_string))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Digest>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only, not a parent.
    View,
    /// Writable, not a parent.
    Active,
    /// Immutable; may be a parent.
    Committed,
}

impl Kind {
    /// containerd's word, as in filters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Disk space that a snapshot takes by itself, without its parents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub bytes: u64,
    pub inodes: u64,
}
