//! containerd's images, down to their layers.

use std::time::SystemTime;

use serde::Deserialize;
use skimmer_cache::{BlobKind, BlobRef};
use skimmer_proto::{Digest, Platform, Reference};
use tracing::debug;

use crate::Binding;
use crate::identify::{
    self, Containerd, Content, ContentError, ImageRecord, MAX_DOCUMENT_BYTES, bind, find_origins,
    is_distributable,
};

/// An image record of containerd, with the layers of the platform that containerd has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    pub namespace: String,
    pub name: String,
    /// When the record was last written.
    pub recorded: SystemTime,
    /// Digest of the platform's manifest.
    pub manifest: Digest,
    /// Lowest first; those that aren't tars are left out.
    pub layers: Vec<Binding>,
    /// What the record names, and what leads from there to the manifest, that one included.
    pub manifests: Vec<Digest>,
    pub config: Digest,
    /// Every layer's blob that registries serve, the lowest first.
    pub blobs: Vec<BlobRef>,
}

impl Installed {
    /// Its namespace, and what leads to its layers: the same whatever its name, of which it may have several.
    pub fn key(&self) -> (String, Vec<Digest>) {
        (self.namespace.clone(), self.manifests.clone())
    }
}

#[derive(Deserialize)]
struct IndexText {
    #[serde(default)]
    manifests: Vec<EntryText>,
}

#[derive(Deserialize)]
struct EntryText {
    digest: String,
    platform: Option<Platform>,
}

/// The images of `namespace`, or of every namespace if it is empty. An image whose manifest isn't
/// there, or can't be read, is left out.
pub async fn images(
    containerd: &Containerd,
    namespace: &str,
) -> Result<Vec<Installed>, ContentError> {
    let namespaces = match namespace {
        "" => containerd.namespaces().await?,
        one => vec![one.to_owned()],
    };
    let mut found = Vec::new();
    for namespace in namespaces {
        for record in containerd.images(&namespace).await? {
            found.extend(readable(containerd, &namespace, &record).await);
        }
    }
    Ok(found)
}

/// The image of this name, unless its manifest isn't there or can't be read.
pub async fn image(
    containerd: &Containerd,
    namespace: &str,
    name: &str,
) -> Result<Option<Installed>, ContentError> {
    match containerd.image(namespace, name).await? {
        Some(record) => Ok(readable(containerd, namespace, &record).await),
        None => Ok(None),
    }
}

async fn readable(
    containerd: &Containerd,
    namespace: &str,
    record: &ImageRecord,
) -> Option<Installed> {
    installed(containerd, namespace, record).await.unwrap_or_else(|error| {
        let reason = &error as &dyn std::error::Error;
        debug!(namespace, image = record.name, reason, "image left out");
        None
    })
}

async fn installed(
    containerd: &Containerd,
    namespace: &str,
    record: &ImageRecord,
) -> Result<Option<Installed>, identify::Error> {
    let ImageRecord { name, target, written } = record;
    let read = async |digest: &Digest| {
        let bytes = containerd.read(namespace, digest, MAX_DOCUMENT_BYTES).await;
        bytes.map_err(|source| identify::Error::Content { what: digest.to_string(), source })
    };
    let mut document = read(target).await?;
    let mut manifests = vec![*target];
    let mut manifest = containerd.manifest(namespace, target).await.unwrap_or_default();
    if manifest.is_none() {
        // An index. containerd before 2.1 has the manifest for one platform only, later ones may have them all.
        for child in children(&document, &Platform::host()) {
            manifest = containerd.manifest(namespace, &child).await.unwrap_or_default();
            if manifest.is_some() {
                document = read(&child).await?;
                manifests.push(child);
                break;
            }
        }
    }
    let Some(manifest) = manifest else { return Ok(None) };
    let config = read(&manifest.config).await?;
    let image = identify::Image::new(&document, &config)
        .map_err(|source| identify::Error::Image { image: name.clone(), source })?;
    let reference: Option<Reference> = name.parse().ok();
    let origins = find_origins(reference.as_ref(), &manifest.sources, &[]);
    let served = image.layers.iter().filter(|layer| is_distributable(&layer.media_type));
    let blobs = served.map(|layer| BlobRef {
        digest: layer.blob,
        len: layer.len,
        kind: BlobKind::Blob,
        origins: origins.clone(),
    });
    Ok(Some(Installed {
        namespace: namespace.to_owned(),
        name: name.clone(),
        recorded: *written,
        manifest: manifest.digest,
        manifests,
        config: manifest.config,
        blobs: blobs.collect(),
        layers: image.layers.into_iter().filter_map(|layer| bind(layer, name, &origins)).collect(),
    }))
}

/// The digests in an image index, what runs best on `wanted` first; none in anything else.
fn children(document: &[u8], wanted: &Platform) -> Vec<Digest> {
    let index: IndexText =
        serde_json::from_slice(document).unwrap_or(IndexText { manifests: Vec::new() });
    let rank = |entry: &EntryText| entry.platform.as_ref().and_then(|p| wanted.rank(p));
    let mut entries = index.manifests;
    entries.sort_by_key(|entry| rank(entry).unwrap_or(u32::MAX));
    entries.iter().filter_map(|entry| entry.digest.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_children_of_an_index_only() {
        let digest = Digest::of(b"manifest");
        let index = format!(r#"{{"manifests":[{{"digest":"{digest}"}},{{"digest":"md5:1"}}]}}"#);
        let host = Platform::host();
        assert_eq!(children(index.as_bytes(), &host), [digest]);
        assert!(children(br#"{"layers":[]}"#, &host).is_empty());
        assert!(children(b"not json", &host).is_empty());
    }

    #[test]
    fn prefers_the_platform_of_the_host() {
        let digests = ["none", "s390x", "arm64", "amd64"].map(|name| Digest::of(name.as_bytes()));
        let entry =
            |at: usize, platform: &str| format!(r#"{{"digest":"{}"{platform}}}"#, digests[at]);
        let of = |at: usize, architecture: &str| {
            entry(at, &format!(r#","platform":{{"os":"linux","architecture":"{architecture}"}}"#))
        };
        let entries = [entry(0, ""), of(1, "s390x"), of(2, "arm64"), of(3, "amd64")].join(",");
        let index = format!(r#"{{"manifests":[{entries}]}}"#);
        for (wanted, best) in [("linux/arm64", 2), ("linux/amd64", 3), ("linux/riscv64", 0)] {
            let found = children(index.as_bytes(), &wanted.parse().unwrap());
            assert_eq!((found.len(), found[0]), (4, digests[best]), "{wanted}");
        }
    }
}
