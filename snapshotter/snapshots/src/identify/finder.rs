//! From a request to the images that it can mean.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use skimmer_cache::{BlobKind, BlobRef, Origin};
use skimmer_proto::{Digest, Reference};
use tracing::debug;

use super::image::{self, Link};
use super::{Content, ContentError, Error, Image, Layer, Manifest, Request};
use crate::Binding;

/// containerd's own bound on manifests; configs are held to it as well.
pub const MAX_DOCUMENT_BYTES: u64 = 8 << 20;
/// Configs whose chains are remembered; all are forgotten when there are more.
const MAX_CHAINS: usize = 1024;
/// Images that are tried for one request.
const MAX_IMAGES: usize = 4;
/// Places that are tried for one blob.
const MAX_ORIGINS: usize = 8;

/// An image that has the wanted layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The wanted layer.
    pub layer: Binding,
    /// The layers above it that can be provided as well.
    pub above: Vec<Binding>,
}

/// Looks requests up in containerd's content store.
pub(crate) struct Finder {
    content: Arc<dyn Content>,
    /// Chains by config.
    chains: Mutex<BTreeMap<Digest, Arc<[Link]>>>,
}

impl Finder {
    pub fn new(content: Arc<dyn Content>) -> Self {
        Self { content, chains: Mutex::default() }
    }

    /// The images that the request can mean, the most likely first; at least one. With a manifest
    /// digest among the hints it is that image or none.
    pub async fn find(
        &self,
        request: &Request,
        registry_config: Option<&Path>,
    ) -> Result<Vec<Found>, Error> {
        let namespace = &request.namespace;
        let manifests = match &request.manifest {
            Some(digest) => {
                let found = self.content.manifest(namespace, digest).await;
                found.map_err(|e| content(format!("manifest {digest}"), e))?.into_iter().collect()
            }
            None => {
                let found = self.content.manifests(namespace).await;
                found.map_err(|e| content("the list of manifests".to_owned(), e))?
            }
        };
        let mut images = Vec::new();
        let mut refused = None;
        for manifest in &manifests {
            match self.consider(request, manifest, registry_config).await {
                Ok(Some(found)) => images.push(found),
                Ok(None) => {}
                Err(error) => {
                    let reason = &error as &dyn std::error::Error;
                    debug!(manifest = %manifest.digest, reason, "image left out");
                    refused = Some(error);
                }
            }
            if images.len() == MAX_IMAGES {
                break;
            }
        }
        if !images.is_empty() {
            return Ok(images);
        }
        let (namespace, reference) = (namespace.clone(), request.reference);
        Err(refused.unwrap_or(Error::NoImage { namespace, reference }))
    }

    /// The image of this manifest, if it has the wanted layer.
    async fn consider(
        &self,
        request: &Request,
        manifest: &Manifest,
        registry_config: Option<&Path>,
    ) -> Result<Option<Found>, Error> {
        let namespace = &request.namespace;
        let chain = self.chain(namespace, manifest).await?;
        let Some(at) = chain.iter().position(|link| link.chain_id == request.reference) else {
            return Ok(None);
        };
        let mut hosts = registry_config.map(configured_hosts).unwrap_or_default();
        hosts.extend(self.image_hosts(namespace).await);
        let origins = find_origins(request.image.as_ref(), &manifest.sources, &hosts);
        let name = name(request.image.as_ref(), &origins, manifest);
        let below = at.checked_sub(1).and_then(|below| chain.get(below)).map(|link| link.chain_id);
        if request.below != below {
            return Err(Error::OtherParent { reference: request.reference, image: name });
        }
        let text = self.read(namespace, "manifest", &manifest.digest).await?;
        let config = self.read(namespace, "config", &manifest.config).await?;
        let image = Image::new(&text, &config)
            .map_err(|source| Error::Image { image: name.clone(), source })?;
        if origins.is_empty() {
            return Err(Error::NoOrigin { image: name });
        }
        let mut wanted = image.layers.into_iter().skip(at);
        let bind = |layer: Layer| bind(layer, &name, &origins);
        let Some(layer) = wanted.next() else { return Ok(None) };
        let (blob, media_type) = (layer.blob, layer.media_type.clone());
        let layer = bind(layer).ok_or(Error::Unservable {
            layer: blob,
            image: name.clone(),
            media_type,
        })?;
        Ok(Some(Found { layer, above: wanted.filter_map(bind).collect() }))
    }

    async fn chain(&self, namespace: &str, manifest: &Manifest) -> Result<Arc<[Link]>, Error> {
        if let Some(chain) = self.known().get(&manifest.config).cloned() {
            return Ok(chain);
        }
        let config = self.read(namespace, "config", &manifest.config).await?;
        let chain: Arc<[Link]> = image::chain(&config)
            .map_err(|source| Error::Image { image: manifest.digest.to_string(), source })?
            .into();
        let mut known = self.known();
        if known.len() >= MAX_CHAINS {
            known.clear();
        }
        known.insert(manifest.config, Arc::clone(&chain));
        Ok(chain)
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<Digest, Arc<[Link]>>> {
        self.chains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(&self, namespace: &str, what: &str, digest: &Digest) -> Result<Vec<u8>, Error> {
        let read = self.content.read(namespace, digest, MAX_DOCUMENT_BYTES).await;
        read.map_err(|error| content(format!("{what} {digest}"), error))
    }

    /// Hosts, with ports, of the images that containerd has: a hint only, so that an error is none.
    async fn image_hosts(&self, namespace: &str) -> Vec<String> {
        let names = self.content.image_names(namespace).await.unwrap_or_default();
        let host = |name: &String| Some(name.parse::<Reference>().ok()?.host);
        names.iter().filter_map(host).collect()
    }
}

/// Where an image's blobs may be, the likeliest first. containerd's labels name hosts without their
/// ports, so a known host of the same name goes first.
pub fn find_origins(
    image: Option<&Reference>,
    sources: &[(String, String)],
    hosts: &[String],
) -> Vec<Origin> {
    let mut origins: Vec<Origin> = Vec::new();
    let mut add = |host: &str, repository: &str| {
        let origin = Origin { host: host.to_owned(), repository: repository.to_owned() };
        if origins.len() < MAX_ORIGINS && !origins.contains(&origin) {
            origins.push(origin);
        }
    };
    if let Some(image) = image {
        add(&image.host, &image.repository);
    }
    for (source, repository) in sources {
        let with_port = |host: &&String| {
            host.strip_prefix(source.as_str()).is_some_and(|port| port.starts_with(':'))
        };
        for host in image.map(|image| &image.host).into_iter().chain(hosts).filter(with_port) {
            add(host, repository);
        }
    }
    // What the image's own name has with a port is not to be found without.
    let own = image.and_then(|image| image.host.split_once(':')).map(|(host, _)| host);
    for (source, repository) in sources.iter().filter(|(source, _)| own != Some(source)) {
        add(source, repository);
    }
    origins
}

/// The registries that containerd's `certs.d` has a folder for: `host`, `host:port`, `host_port_`.
fn configured_hosts(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Vec::new();
    };
    let name =
        |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
    entries.filter_map(name).map(|name| host_of_folder(&name)).collect()
}

fn host_of_folder(name: &str) -> String {
    match name.strip_suffix('_').and_then(|name| name.rsplit_once('_')) {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => format!("{host}:{port}"),
        _ => name.to_owned(),
    }
}

pub(crate) fn bind(layer: Layer, image: &str, origins: &[Origin]) -> Option<Binding> {
    if !layer.is_servable() {
        debug!(blob = %layer.blob, media_type = layer.media_type, image, "layer left to containerd");
        return None;
    }
    let (digest, len, origins) = (layer.blob, layer.len, origins.to_vec());
    Some(Binding {
        blob: BlobRef { digest, len, kind: BlobKind::Blob, origins },
        media_type: layer.media_type,
        diff_id: layer.diff_id,
        image: image.to_owned(),
        toc_digest: layer.toc_digest,
    })
}

/// What to call the image in messages.
fn name(image: Option<&Reference>, origins: &[Origin], manifest: &Manifest) -> String {
    match (image, origins.first()) {
        (Some(image), _) => image.to_string(),
        (None, Some(origin)) => format!("{origin}@{}", manifest.digest),
        (None, None) => manifest.digest.to_string(),
    }
}

fn content(what: String, source: ContentError) -> Error {
    Error::Content { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn puts_back_the_ports_that_labels_leave_out() {
        let source = |host: &str| (host.to_owned(), "a/b".to_owned());
        let hosts = ["r.io:5000".to_owned(), "r.io".to_owned(), "r.io.evil:1".to_owned()];
        let check = |image: Option<&str>, sources: &[(String, String)], expected: &[&str]| {
            let image = image.map(|image| image.parse().unwrap());
            let found: Vec<_> = find_origins(image.as_ref(), sources, &hosts)
                .iter()
                .map(Origin::to_string)
                .collect();
            assert_eq!(found, expected);
        };
        check(None, &[], &[]);
        check(None, &[source("r.io")], &["r.io:5000/a/b", "r.io/a/b"]);
        check(None, &[source("q.io")], &["q.io/a/b"]);
        check(Some("q.io:1/c:t"), &[source("q.io")], &["q.io:1/c", "q.io:1/a/b"]);
        check(Some("r.io:5000/a/b:t"), &[source("r.io")], &["r.io:5000/a/b"]);
    }

    #[test]
    fn reads_the_folders_of_certs_d() {
        for (folder, host) in
            [("r.io", "r.io"), ("r.io:5000", "r.io:5000"), ("r.io_5000_", "r.io:5000"), ("_", "_")]
        {
            assert_eq!(host_of_folder(folder), host);
        }
    }
}
