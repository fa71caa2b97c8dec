//! Manifests and configurations: from this node, from other nodes, from the registry; and kept.

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use skimmer_cache::{BlobKind, BlobRef, Cache, Origin};
use skimmer_proto::{Digest, Platform, Reference};
use skimmer_registry::{Document, Error, Registry, Resolved, Shelf};
use skimmer_snapshots::identify::{Containerd, Content as _, ContentError, MAX_DOCUMENT_BYTES};
use skimmer_snapshots::inventory::Installed;
use skimmer_swarm::Swarm;
use tokio::task::spawn_blocking;

/// Images of other platforms that are looked for.
const MOST_OTHERS: usize = 32;

#[derive(Clone)]
pub struct Documents {
    pub cache: Cache,
    /// `None` where the node stands alone.
    pub swarm: Option<Swarm>,
}

impl Documents {
    /// What `reference` stands for. By digest it takes no registry, if the swarm knows the image.
    pub async fn resolve(
        &self,
        registry: &Registry,
        reference: &Reference,
        platform: Option<&Platform>,
    ) -> Result<Resolved, Error> {
        let resolved = registry.resolve_with(reference, platform, self).await?;
        if let Some(swarm) = &self.swarm {
            swarm.note_manifest(&resolved.origin, resolved.manifest.descriptor.digest);
        }
        let (documents, kept) = (self.clone(), resolved.clone());
        tokio::spawn(async move { documents.keep_resolved(kept).await });
        Ok(resolved)
    }

    /// The manifests and configurations of an index's other images, as far as they can be had. containerd from 2.1 on
    /// pulls them with the platform's own.
    pub async fn others(
        &self,
        registry: &Registry,
        reference: &Reference,
        resolved: &Resolved,
    ) -> Vec<Document> {
        let own = resolved.manifest.descriptor.digest;
        let others = members(&resolved.top.bytes).into_iter().filter(|digest| *digest != own);
        let mut found = Vec::new();
        for digest in others.take(MOST_OTHERS) {
            let other = Reference { tag: None, digest: Some(digest), ..reference.clone() };
            match registry.resolve_with(&other, None, self).await {
                Ok(resolved) => found.extend([resolved.config, resolved.top]),
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::debug!(%reference, %digest, error, "another platform's image is left out");
                }
            }
        }
        found
    }

    async fn keep_resolved(&self, resolved: Resolved) {
        let Resolved { top, between, manifest, config, origin, .. } = resolved;
        let sample = BlobRef {
            digest: config.descriptor.digest,
            len: config.descriptor.size,
            kind: BlobKind::Blob,
            origins: vec![origin],
        };
        let documents = [top, manifest, config].into_iter().chain(between);
        let documents = documents.map(|document| (document.descriptor.digest, document.bytes));
        self.keep(&sample, documents.collect()).await;
    }

    /// Keeps the documents of an image that containerd has pulled. Fails when they can't be read.
    pub async fn keep_installed(
        &self,
        containerd: &Containerd,
        image: &Installed,
    ) -> Result<(), ContentError> {
        let Some(sample) = image.blobs.first() else { return Ok(()) };
        if let (Some(swarm), Some(origin)) = (&self.swarm, sample.origins.first()) {
            swarm.note_manifest(origin, image.manifest);
        }
        let mut documents = Vec::new();
        for digest in image.manifests.iter().chain([&image.config]) {
            let bytes = containerd.read(&image.namespace, digest, MAX_DOCUMENT_BYTES).await?;
            documents.push((*digest, bytes.into()));
        }
        self.keep(sample, documents).await;
        Ok(())
    }

    /// `sample`: a blob of the same repository.
    async fn keep(&self, sample: &BlobRef, documents: Vec<(Digest, Bytes)>) {
        if let Some(swarm) = &self.swarm {
            swarm.keep_documents(sample, documents).await;
            return;
        }
        let cache = self.cache.clone();
        let put = move || {
            documents.iter().try_for_each(|(digest, bytes)| {
                cache.documents().put(*digest, bytes, None).map(|_| ())
            })
        };
        if let Ok(Err(error)) = spawn_blocking(put).await {
            let error = &error as &dyn std::error::Error;
            tracing::info!(error, "an image's documents are not kept");
        }
    }
}

/// The digests that an index lists; none if it is no index.
fn members(index: &[u8]) -> Vec<Digest> {
    #[derive(Default, Deserialize)]
    struct Index {
        #[serde(default)]
        manifests: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        digest: String,
    }
    let index: Index = serde_json::from_slice(index).unwrap_or_default();
    index.manifests.iter().filter_map(|entry| entry.digest.parse().ok()).collect()
}

#[async_trait]
impl Shelf for Documents {
    async fn find(&self, origin: &Origin, digest: &Digest) -> Option<Bytes> {
        let (cache, wanted) = (self.cache.clone(), *digest);
        let here = spawn_blocking(move || cache.documents().get(wanted)).await;
        if let Ok(Ok(Some((bytes, _)))) = here {
            return Some(bytes);
        }
        self.swarm.as_ref()?.find_document(origin, *digest).await
    }
}
