//! Images of layers made here: configuration and manifest, as an OCI layout or for the [registry](crate::registry).
//!
//! Nothing is checked: an image may name blobs that don't exist or DiffIDs that aren't its own.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Value, json};
use skimmer_proto::Digest;

use crate::command;
use crate::layer::{Blob, Format, Layer};

/// What an image is made from. `name` is a repository name; the tag is always `latest`.
#[derive(Clone, Debug)]
pub struct Plan {
    pub name: String,
    pub layers: Vec<Layer>,
    pub command: Vec<String>,
    /// OCI media types, else Docker's.
    pub oci: bool,
    /// The tag leads to an index of this image and of the same for another platform, which comes first.
    pub index: bool,
    /// Changes the configuration, so that two images of equal layers differ.
    pub author: String,
    /// DiffIDs that the configuration claims, if not the layers' own.
    pub claimed: Option<Vec<Digest>>,
}

impl Plan {
    pub fn new(name: &str, layers: Vec<Layer>) -> Self {
        Self {
            name: name.to_owned(),
            layers,
            command: vec!["/bin/sh".into()],
            oci: true,
            index: false,
            author: String::new(),
            claimed: None,
        }
    }

    /// Makes the image; what is new of it is stored in `folder`.
    pub fn build(self, folder: &Path) -> anyhow::Result<Image> {
        let diff_ids: Vec<Digest> = match &self.claimed {
            Some(claimed) => claimed.clone(),
            None => self.layers.iter().map(|layer| layer.diff_id).collect(),
        };
        let config = Blob::of(&serde_json::to_vec(&self.config(&diff_ids))?, folder)?;
        let manifest = Blob::of(&serde_json::to_vec(&self.manifest(&config))?, folder)?;
        let (mut foreign, mut top) = (Vec::new(), None);
        if self.index {
            let mut text = self.config(&diff_ids);
            text["architecture"] = "s390x".into();
            let other = Blob::of(&serde_json::to_vec(&text)?, folder)?;
            let other_manifest = Blob::of(&serde_json::to_vec(&self.manifest(&other))?, folder)?;
            let index = self.index_of(&manifest, &other_manifest);
            top = Some(Blob::of(&serde_json::to_vec(&index)?, folder)?);
            foreign = vec![other, other_manifest];
        }
        Ok(Image {
            name: self.name,
            oci: self.oci,
            layers: self.layers,
            diff_ids,
            config,
            manifest,
            index: top,
            foreign,
        })
    }

    fn config(&self, diff_ids: &[Digest]) -> Value {
        json!({
            "created": "2024-01-01T00:00:00Z", "author": self.author, "architecture": "amd64", "os": "linux",
            "config": { "Cmd": self.command, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids.iter().map(Digest::to_string).collect::<Vec<_>>() },
        })
    }

    fn manifest(&self, config: &Blob) -> Value {
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|layer| {
                let mut entry = descriptor(layer.media_type(self.oci), &layer.blob);
                if !layer.annotations.is_empty() {
                    entry["annotations"] = json!(layer.annotations);
                }
                if layer.format == Format::Foreign {
                    // Where nobody listens.
                    entry["urls"] = json!(["http://127.0.0.1:1/layer.tar.gz"]);
                }
                entry
            })
            .collect();
        let (own, of_config) = if self.oci {
            (
                "application/vnd.oci.image.manifest.v1+json",
                "application/vnd.oci.image.config.v1+json",
            )
        } else {
            (
                "application/vnd.docker.distribution.manifest.v2+json",
                "application/vnd.docker.container.image.v1+json",
            )
        };
        json!({ "schemaVersion": 2, "mediaType": own, "config": descriptor(of_config, config), "layers": layers })
    }

    fn index_of(&self, manifest: &Blob, other: &Blob) -> Value {
        let mut ours = descriptor(manifest_type(self.oci), manifest);
        ours["platform"] = json!({ "architecture": "amd64", "os": "linux" });
        let mut foreign = descriptor(manifest_type(self.oci), other);
        foreign["platform"] = json!({ "architecture": "s390x", "os": "linux" });
        json!({ "schemaVersion": 2, "mediaType": index_type(self.oci), "manifests": [foreign, ours] })
    }
}

/// A finished image.
#[derive(Clone, Debug)]
pub struct Image {
    pub name: String,
    pub oci: bool,
    pub layers: Vec<Layer>,
    pub diff_ids: Vec<Digest>,
    pub config: Blob,
    pub manifest: Blob,
    pub index: Option<Blob>,
    /// Configuration and manifest of the index's other platform, which has the same layers.
    pub foreign: Vec<Blob>,
}

impl Image {
    /// What the tag leads to, and its media type.
    pub fn top(&self) -> (&Blob, &'static str) {
        match &self.index {
            Some(index) => (index, index_type(self.oci)),
            None => (&self.manifest, manifest_type(self.oci)),
        }
    }

    /// The names of its snapshots, the bottom layer's first (OCI image spec, config.md, "Layer ChainID").
    pub fn chain_ids(&self) -> Vec<String> {
        let mut chains: Vec<String> = Vec::new();
        for diff_id in &self.diff_ids {
            chains.push(match chains.last() {
                None => diff_id.to_string(),
                Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()).to_string(),
            });
        }
        chains
    }

    /// The bytes of its layers' blobs.
    pub fn compressed_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.blob.size).sum()
    }

    /// Every blob it refers to, itself included.
    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        self.layers
            .iter()
            .map(|layer| &layer.blob)
            .chain([&self.config, &self.manifest])
            .chain(&self.index)
            .chain(&self.foreign)
    }

    /// Writes it as an OCI layout with the tag `latest` (OCI image spec, image-layout.md).
    pub fn write_layout(&self, folder: &Path) -> anyhow::Result<()> {
        let blobs = folder.join("blobs/sha256");
        std::fs::create_dir_all(&blobs)?;
        for blob in self.blobs() {
            link(&blob.path, &blobs.join(blob.digest.hex()))?;
        }
        let (top, media_type) = self.top();
        let mut entry = descriptor(media_type, top);
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
        std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        std::fs::write(
            folder.join("index.json"),
            serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": [entry] }))?,
        )?;
        Ok(())
    }

    /// The root file system that `umoci unpack` makes of it, in `folder`.
    pub fn unpack(&self, folder: &Path) -> anyhow::Result<PathBuf> {
        let layout = folder.join("layout");
        self.write_layout(&layout)?;
        let bundle = folder.join("bundle");
        let image = format!("{}:latest", layout.display());
        command::run(
            "umoci",
            ["unpack".as_ref(), "--image".as_ref(), image.as_ref(), bundle.as_os_str()],
        )
        .with_context(|| format!("unpack {}", self.name))?;
        Ok(bundle.join("rootfs"))
    }
}

/// Links `from` to `to`, or copies it where a link can't be; an existing `to` has the same digest, hence bytes.
pub fn link(from: &Path, to: &Path) -> anyhow::Result<()> {
    if !to.exists() && std::fs::hard_link(from, to).is_err() {
        std::fs::copy(from, to)
            .with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    }
    Ok(())
}

fn descriptor(media_type: &str, blob: &Blob) -> Value {
    json!({ "mediaType": media_type, "digest": blob.digest.to_string(), "size": blob.size })
}

fn manifest_type(oci: bool) -> &'static str {
    if oci {
        "application/vnd.oci.image.manifest.v1+json"
    } else {
        "application/vnd.docker.distribution.manifest.v2+json"
    }
}

fn index_type(oci: bool) -> &'static str {
    if oci {
        "application/vnd.oci.image.index.v1+json"
    } else {
        "application/vnd.docker.distribution.manifest.list.v2+json"
    }
}
