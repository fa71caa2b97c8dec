//! Which of containerd's images a request means.

use skimmer_layers::LayerSpec;
use skimmer_snapshots::Binding;
use skimmer_snapshots::identify::Containerd;
use skimmer_snapshots::inventory::{self, Installed};
use tonic::Status;

use super::convert::words;

/// An image and its layers, lowest first.
pub struct Image {
    pub namespace: String,
    pub name: String,
    /// Digest of the platform's manifest.
    pub digest: String,
    pub layers: Vec<LayerSpec>,
}

impl From<Installed> for Image {
    fn from(image: Installed) -> Self {
        Self {
            namespace: image.namespace,
            name: image.name,
            digest: image.manifest.to_string(),
            layers: image.layers.into_iter().map(Binding::into).collect(),
        }
    }
}

/// The images in `namespace` (empty: all) that are called `wanted` (empty: all).
pub async fn find(
    containerd: &Containerd,
    namespace: &str,
    wanted: &str,
) -> Result<Vec<Image>, Status> {
    let found = installed(containerd, namespace, wanted).await?;
    Ok(found.into_iter().map(Image::from).collect())
}

async fn installed(
    containerd: &Containerd,
    namespace: &str,
    wanted: &str,
) -> Result<Vec<Installed>, Status> {
    let images = inventory::images(containerd, namespace).await;
    let images = images.map_err(|error| Status::unavailable(words(&error)))?;
    let is_wanted = |image: &Installed| wanted.is_empty() || is_called(image, wanted);
    Ok(images.into_iter().filter(is_wanted).collect())
}

/// The one image that `wanted` means. Several records of the same manifest are one image.
pub async fn find_one(
    containerd: &Containerd,
    namespace: &str,
    wanted: &str,
) -> Result<Image, Status> {
    let found = find(containerd, namespace, wanted).await?;
    only(found, wanted, |image| image.digest.clone())
}

/// Likewise, and in one namespace.
pub async fn find_installed(
    containerd: &Containerd,
    namespace: &str,
    wanted: &str,
) -> Result<Installed, Status> {
    let found = installed(containerd, namespace, wanted).await?;
    only(found, wanted, |image| (image.namespace.clone(), image.manifest))
}

fn only<T, K: PartialEq>(
    mut found: Vec<T>,
    wanted: &str,
    key: impl Fn(&T) -> K,
) -> Result<T, Status> {
    found.dedup_by(|a, b| key(a) == key(b));
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(Status::not_found(format!(
            "no image {wanted:?} in containerd (see `skimmer images`)"
        ))),
        n => Err(Status::invalid_argument(format!(
            "{wanted:?} means {n} images: give a full name, a digest or a namespace"
        ))),
    }
}

/// By name as containerd has it, by a short form of it (`python:3.13`), or by the manifest's digest
/// or its first characters (at least 12 hex digits).
fn is_called(image: &Installed, wanted: &str) -> bool {
    const SHORTEST: usize = 12;
    let hex = wanted.strip_prefix("sha256:").unwrap_or(wanted);
    image.name == wanted
        || wanted.parse().is_ok_and(|r: skimmer_proto::Reference| image.name == r.to_string())
        || (hex.len() >= SHORTEST && image.manifest.hex().starts_with(hex))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use skimmer_proto::Digest;

    use super::*;

    #[test]
    fn images_have_names_short_names_and_digests() {
        let manifest = Digest::of(b"manifest");
        let image = Installed {
            namespace: "default".into(),
            name: "docker.io/library/python:3.13".into(),
            recorded: SystemTime::UNIX_EPOCH,
            manifest,
            layers: Vec::new(),
            manifests: vec![manifest],
            config: Digest::of(b"config"),
            blobs: Vec::new(),
        };
        let hex = manifest.hex();
        for (wanted, expected) in [
            ("docker.io/library/python:3.13", true),
            ("python:3.13", true),
            ("python", false),
            ("python:3.12", false),
            (&manifest.to_string(), true),
            (&hex[..12], true),
            (&hex[..11], false),
            ("", false),
        ] {
            assert_eq!(is_called(&image, wanted), expected, "{wanted}");
        }
    }
}
