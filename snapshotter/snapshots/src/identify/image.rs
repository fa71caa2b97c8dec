//! An image's manifest and config, as far as its layers need them. Pure; both are hostile input.

use std::collections::BTreeMap;

use serde::Deserialize;
use skimmer_layers::toc_digest;
use skimmer_proto::Digest;

/// More layers than overlayfs could stack.
const MAX_LAYERS: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("decode the manifest")]
    Manifest(#[source] serde_json::Error),
    #[error("decode the config")]
    Config(#[source] serde_json::Error),
    #[error("the manifest has {layers} layers, the config {diff_ids} DiffIDs")]
    Counts { layers: usize, diff_ids: usize },
    #[error("{0} layers are too many")]
    TooMany(usize),
    #[error("the config's root file system is of type {0:?}, not layers")]
    RootFs(String),
    #[error("layer digest or DiffID {text:?}")]
    Digest { text: String, source: skimmer_proto::digest::Error },
}

/// An image's layers, the lowest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub layers: Vec<Layer>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    pub blob: Digest,
    pub len: u64,
    pub media_type: String,
    pub diff_id: Digest,
    /// Names this layer on top of those below (OCI image spec, config.md).
    pub chain_id: Digest,
    /// That of the table of contents inside the blob, if the manifest gives one.
    pub toc_digest: Option<Digest>,
}

#[derive(Deserialize)]
struct ManifestText {
    #[serde(default)]
    layers: Vec<DescriptorText>,
}

#[derive(Deserialize)]
struct DescriptorText {
    #[serde(default, rename = "mediaType")]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct ConfigText {
    rootfs: RootFsText,
}

#[derive(Deserialize)]
struct RootFsText {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    diff_ids: Vec<String>,
}

impl Image {
    pub fn new(manifest: &[u8], config: &[u8]) -> Result<Self, Error> {
        let manifest: ManifestText = serde_json::from_slice(manifest).map_err(Error::Manifest)?;
        let chain = chain(config)?;
        let (layers, diff_ids) = (manifest.layers.len(), chain.len());
        if layers != diff_ids {
            return Err(Error::Counts { layers, diff_ids });
        }
        let layers = manifest.layers.into_iter().zip(chain).map(|(layer, link)| {
            Ok(Layer {
                blob: digest(&layer.digest)?,
                len: layer.size,
                media_type: layer.media_type,
                diff_id: link.diff_id,
                chain_id: link.chain_id,
                toc_digest: layer.annotations.as_ref().and_then(toc_digest),
            })
        });
        Ok(Self { layers: layers.collect::<Result<_, _>>()? })
    }
}

/// One of a config's layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    pub diff_id: Digest,
    pub chain_id: Digest,
}

/// The DiffIDs of a config, with the chain IDs that follow from them.
pub fn chain(config: &[u8]) -> Result<Vec<Link>, Error> {
    let config: ConfigText = serde_json::from_slice(config).map_err(Error::Config)?;
    if !matches!(config.rootfs.kind.as_str(), "" | "layers") {
        return Err(Error::RootFs(config.rootfs.kind.chars().take(100).collect()));
    }
    let diff_ids = config.rootfs.diff_ids;
    if diff_ids.len() > MAX_LAYERS {
        return Err(Error::TooMany(diff_ids.len()));
    }
    let diff_ids = diff_ids.iter().map(|text| digest(text)).collect::<Result<Vec<_>, _>>()?;
    Ok(links(&diff_ids))
}

/// The chain IDs that follow from DiffIDs, lowest first (OCI image spec, config.md).
pub fn links(diff_ids: &[Digest]) -> Vec<Link> {
    let mut chain: Vec<Link> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let chain_id = match chain.last() {
            None => *diff_id,
            Some(below) => Digest::of(format!("{} {diff_id}", below.chain_id).as_bytes()),
        };
        chain.push(Link { diff_id: *diff_id, chain_id });
    }
    chain
}

impl Layer {
    /// Whether the layer is a tar that anybody may fetch, plain or in a compression that we read.
    pub fn is_servable(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            "application/vnd.oci.image.layer.v1.tar"
                | "application/vnd.oci.image.layer.v1.tar+gzip"
                | "application/vnd.oci.image.layer.v1.tar+zstd"
                | "application/vnd.docker.image.rootfs.diff.tar"
                | "application/vnd.docker.image.rootfs.diff.tar.gzip"
                | "application/vnd.docker.image.rootfs.diff.tar.zstd"
        )
    }
}

/// Whether registries serve blobs of this type: some licences forbid it, and then they are elsewhere.
pub fn is_distributable(media_type: &str) -> bool {
    !media_type.contains("foreign") && !media_type.contains("nondistributable")
}

fn digest(text: &str) -> Result<Digest, Error> {
    text.parse().map_err(|source| Error::Digest { text: text.chars().take(100).collect(), source })
}
