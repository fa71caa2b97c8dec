//! Manifests and configurations: from this node, from other nodes, from the registry; and kept.

use async_trait::async_trait;
use bytes::Bytes;
use skimmer_cache::{BlobKind, BlobRef, Cache, Origin};
use skimmer_proto::{Digest, Reference};
use skimmer_registry::{Error, Platform, Registry, Resolved, Shelf};
use skimmer_swarm::Swarm;
use tokio::task::spawn_blocking;

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
        tokio::spawn(async move { documents.keep(kept).await });
        Ok(resolved)
    }

    async fn keep(&self, resolved: Resolved) {
        let Resolved { top, between, manifest, config, origin, .. } = resolved;
        let sample = BlobRef {
            digest: config.descriptor.digest,
            len: config.descriptor.size,
            kind: BlobKind::Blob,
            origins: vec![origin],
        };
        let documents = [top, manifest, config].into_iter().chain(between);
        let documents = documents.map(|document| (document.descriptor.digest, document.bytes));
        if let Some(swarm) = &self.swarm {
            swarm.keep_documents(&sample, documents.collect()).await;
            return;
        }
        let (cache, documents) = (self.cache.clone(), documents.collect::<Vec<_>>());
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
