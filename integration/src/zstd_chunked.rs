//! Layers in zstd:chunked, as skopeo makes them: zstd frames that begin at files' contents, and a table of them in a
//! frame that other readers skip.

use std::path::Path;

use anyhow::Context as _;
use serde_json::Value;
use skimmer_proto::Digest;

use crate::command;
use crate::image::Plan;
use crate::layer::{Blob, Format, Layer};

/// A layer of the tar stream `tar`, its blob stored in `folder`.
pub fn layer(tar: &[u8], folder: &Path) -> anyhow::Result<Layer> {
    let plain = Layer::of(tar, Format::Plain, folder)?;
    let [from, to] =
        ["plain", "chunked"].map(|way| folder.join(format!("{way}-{}", plain.blob.digest.hex())));
    Plan::new("plain", vec![plain.clone()]).build(folder)?.write_layout(&from)?;
    let [source, target] = [&from, &to].map(|layout| format!("oci:{}:latest", layout.display()));
    command::run("skopeo", ["copy", "--dest-compress-format", "zstd:chunked", &source, &target])?;
    let index: Value = serde_json::from_slice(&std::fs::read(to.join("index.json"))?)?;
    let manifest = blob(&to, &index["manifests"][0])?;
    let manifest: Value = serde_json::from_slice(&manifest.bytes()?)?;
    let descriptor = &manifest["layers"][0];
    let annotations = serde_json::from_value(descriptor["annotations"].clone())
        .context("skopeo wrote no annotations: this is not zstd:chunked")?;
    Ok(Layer { blob: blob(&to, descriptor)?, format: Format::Zstd, annotations, ..plain })
}

/// What a descriptor in an OCI layout names.
fn blob(layout: &Path, descriptor: &Value) -> anyhow::Result<Blob> {
    let digest: Digest = descriptor["digest"].as_str().context("a digest")?.parse()?;
    Blob::of_file(&layout.join("blobs/sha256").join(digest.hex()))
}
