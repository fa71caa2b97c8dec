//! The tie between a committed snapshot and the layer that is its content.

use serde::{Deserialize, Serialize};
use skimmer_cache::{BlobKind, BlobRef, Origin};
use skimmer_proto::Digest;

/// A layer as a snapshot's record names it: enough to fetch, prove and mount it after a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    pub blob: BlobRef,
    pub media_type: String,
    /// SHA-256 of the uncompressed tar.
    pub diff_id: Digest,
    /// The image through which the layer was first asked for; for messages.
    pub image: String,
    /// That of the table of contents inside the blob, if the manifest gives one.
    pub toc_digest: Option<Digest>,
}

/// [`Binding`] in JSON; digests are `sha256:<hex>`, an origin is `[host, repository]`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    blob: String,
    len: u64,
    media_type: String,
    diff_id: String,
    image: String,
    origins: Vec<(String, String)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    toc_digest: Option<String>,
}

impl Serialize for Binding {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Text {
            blob: self.blob.digest.to_string(),
            len: self.blob.len,
            media_type: self.media_type.clone(),
            diff_id: self.diff_id.to_string(),
            image: self.image.clone(),
            origins: self
                .blob
                .origins
                .iter()
                .map(|origin| (origin.host.clone(), origin.repository.clone()))
                .collect(),
            toc_digest: self.toc_digest.map(|digest| digest.to_string()),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Binding {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Text::deserialize(deserializer)?;
        let digest = |text: &str| text.parse::<Digest>().map_err(serde::de::Error::custom);
        Ok(Self {
            blob: BlobRef {
                digest: digest(&text.blob)?,
                len: text.len,
                kind: BlobKind::Blob,
                origins: text
                    .origins
                    .into_iter()
                    .map(|(host, repository)| Origin { host, repository })
                    .collect(),
            },
            media_type: text.media_type,
            diff_id: digest(&text.diff_id)?,
            image: text.image,
            toc_digest: text.toc_digest.as_deref().map(digest).transpose()?,
        })
    }
}
