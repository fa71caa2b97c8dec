//! From a reference to an image: index, manifest and configuration, verified by their digests.

use async_trait::async_trait;
use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue};
use skimmer_cache::source::{Blame, Class, Origin};
use skimmer_proto::{Digest, Platform, Reference};

use crate::hosts;
use crate::http::{self, Ask, Http};
use crate::manifest::{self, Manifest};
use crate::media::MANIFEST_ACCEPT;
use crate::tries::Tries;

pub use crate::manifest::Descriptor;

/// containerd's own limit for manifests; configurations are held to it as well.
pub const DOCUMENT_BYTES: u64 = 8 << 20;
/// An index in an index in an index: nobody has more.
const INDEX_DEPTH: usize = 4;

/// A manifest, index or configuration, as the registry serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    pub descriptor: Descriptor,
    /// They match the descriptor's digest.
    pub bytes: Bytes,
}

/// What a reference stands for on one platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// What the reference names: an index or a manifest.
    pub top: Document,
    /// Indexes between the two, outermost first; mostly none.
    pub between: Vec<Document>,
    /// The image's manifest; the same as `top` if there is no index.
    pub manifest: Document,
    pub config: Document,
    /// Lowest first.
    pub layers: Vec<Descriptor>,
    /// By the configuration, one for each layer.
    pub diff_ids: Vec<Digest>,
    pub origin: Origin,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0:?} is not the name of a repository")]
    Repository(String),
    #[error("find the endpoints of {host}")]
    Hosts { host: String, source: hosts::Error },
    #[error("hosts.toml of {host} names no endpoint with the capability \"{capability}\"")]
    NoEndpoint { host: String, capability: &'static str },
    #[error("fetch {what}")]
    Fetch { what: String, source: http::Error },
    #[error("{what} has more than {limit} bytes")]
    TooLarge { what: String, limit: u64 },
    #[error("{what} does not match its digest: the registry sent {got}")]
    Digest { what: String, got: Digest },
    #[error("{what} has {got} bytes, but its descriptor says {expected}")]
    Length { what: String, expected: u64, got: u64 },
    #[error("read {what}")]
    Content { what: String, source: manifest::Error },
    #[error("{what} leads through more than {INDEX_DEPTH} indexes")]
    Depth { what: String },
    #[error("bytes {start}-{end} are not within the {len} bytes of the blob")]
    Outside { start: u64, end: u64, len: u64 },
}

impl Error {
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Fetch { source, .. } if source.is_retryable())
    }

    pub fn blame(&self) -> Blame {
        match self {
            Self::Fetch { source, .. } => source.blame(),
            Self::Repository(_)
            | Self::Hosts { .. }
            | Self::NoEndpoint { .. }
            | Self::Outside { .. } => Blame::Local,
            _ => Blame::Registry,
        }
    }
}

/// Where documents may be had before the registry is asked: by digest, never by tag.
#[async_trait]
pub trait Shelf: Send + Sync {
    /// The bytes with this digest, which the caller checks; `None`: not here.
    async fn find(&self, origin: &Origin, digest: &Digest) -> Option<Bytes>;
}

/// Fetches documents of one repository.
pub struct Documents<'a> {
    pub http: &'a Http,
    pub origin: &'a Origin,
    pub shelf: Option<&'a dyn Shelf>,
    /// Endpoints to ask, afresh for every document.
    pub tries: &'a (dyn Fn() -> Result<Tries, Error> + Send + Sync),
}

/// What the registry served, whole.
struct Served {
    bytes: Bytes,
    media_type: String,
}

/// Follows `reference` to an image for `platform`.
pub async fn resolve(
    documents: &Documents<'_>,
    reference: &Reference,
    platform: &Platform,
) -> Result<Resolved, Error> {
    let target = reference.target();
    let what = format!("manifest {reference}");
    let served = match &reference.digest {
        Some(digest) => documents.by_digest(&what, digest).await?,
        None => documents.manifest(&what, &target).await?,
    };
    let digest = Digest::of(&served.bytes);
    if let Some(expected) = reference.digest.filter(|expected| *expected != digest) {
        tracing::debug!(%expected, got = %digest, "a manifest is not the one asked for");
        return Err(Error::Digest { what, got: digest });
    }
    let (top, mut content) = read(&what, served, digest)?;
    let mut chain = vec![top];
    loop {
        let entries = match content {
            Manifest::Index(entries) => entries,
            Manifest::Image { config, layers } => {
                return finish(documents, chain, config, layers).await;
            }
        };
        if chain.len() > INDEX_DEPTH {
            return Err(Error::Depth { what });
        }
        let chosen = manifest::choose(entries, platform)
            .map_err(|source| Error::Content { what: what.clone(), source })?;
        let inner = format!("manifest {} of {reference}", chosen.digest);
        let served = documents.by_digest(&inner, &chosen.digest).await?;
        check(&inner, &served.bytes, &chosen)?;
        let (mut document, inside) = read(&inner, served, chosen.digest)?;
        document.descriptor.annotations = chosen.annotations;
        chain.push(document);
        content = inside;
    }
}

async fn finish(
    documents: &Documents<'_>,
    chain: Vec<Document>,
    config: Descriptor,
    layers: Vec<Descriptor>,
) -> Result<Resolved, Error> {
    let what = format!("configuration {} of {}", config.digest, documents.origin);
    let bytes = documents.config(&what, &config).await?;
    let diff_ids = manifest::diff_ids(&bytes, layers.len())
        .map_err(|source| Error::Content { what, source })?;
    let mut between = chain;
    // The chain has at least the document that the reference names.
    let top = between.remove(0);
    let manifest = between.pop().unwrap_or_else(|| top.clone());
    let config = Document { descriptor: config, bytes };
    let origin = documents.origin.clone();
    Ok(Resolved { top, between, manifest, config, layers, diff_ids, origin })
}

fn read(what: &str, served: Served, digest: Digest) -> Result<(Document, Manifest), Error> {
    let Served { bytes, media_type } = served;
    let (media_type, content) = manifest::parse(&bytes, &media_type)
        .map_err(|source| Error::Content { what: what.to_owned(), source })?;
    let size = bytes.len() as u64;
    let descriptor = Descriptor { media_type, digest, size, annotations: Default::default() };
    Ok((Document { descriptor, bytes }, content))
}

fn check(what: &str, bytes: &Bytes, expected: &Descriptor) -> Result<(), Error> {
    let what = || what.to_owned();
    let got = bytes.len() as u64;
    if got != expected.size {
        return Err(Error::Length { what: what(), expected: expected.size, got });
    }
    match Digest::of(bytes) {
        digest if digest == expected.digest => Ok(()),
        got => Err(Error::Digest { what: what(), got }),
    }
}

impl Documents<'_> {
    /// The manifest or index with digest `digest`, verified.
    pub async fn manifest_by_digest(&self, digest: &Digest) -> Result<Bytes, Error> {
        let what = format!("manifest {digest} of {}", self.origin);
        let served = self.manifest(&what, &digest.to_string()).await?;
        match Digest::of(&served.bytes) {
            got if got == *digest => Ok(served.bytes),
            got => Err(Error::Digest { what, got }),
        }
    }

    /// From the shelf, or else from the registry; only what is from the shelf is checked.
    async fn by_digest(&self, what: &str, digest: &Digest) -> Result<Served, Error> {
        match self.shelved(digest).await {
            Some(bytes) => Ok(Served { bytes, media_type: String::new() }),
            None => self.manifest(what, &digest.to_string()).await,
        }
    }

    async fn shelved(&self, digest: &Digest) -> Option<Bytes> {
        let bytes = self.shelf?.find(self.origin, digest).await?;
        (Digest::of(&bytes) == *digest).then_some(bytes)
    }

    async fn manifest(&self, what: &str, target: &str) -> Result<Served, Error> {
        let path = format!("{}/manifests/{target}", self.origin.repository);
        self.fetch(what, &path, MANIFEST_ACCEPT).await
    }

    async fn config(&self, what: &str, descriptor: &Descriptor) -> Result<Bytes, Error> {
        if descriptor.size > DOCUMENT_BYTES {
            return Err(Error::TooLarge { what: what.to_owned(), limit: DOCUMENT_BYTES });
        }
        if let Some(bytes) = self.shelved(&descriptor.digest).await {
            check(what, &bytes, descriptor)?;
            return Ok(bytes);
        }
        let path = format!("{}/blobs/{}", self.origin.repository, descriptor.digest);
        let served = self.fetch(what, &path, "*/*").await?;
        check(what, &served.bytes, descriptor)?;
        Ok(served.bytes)
    }

    async fn fetch(&self, what: &str, path: &str, accept: &'static str) -> Result<Served, Error> {
        let mut tries = (self.tries)()?;
        loop {
            let candidate = tries.candidate();
            let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(accept))]);
            let ask = Ask {
                endpoint: &candidate.endpoint,
                repository: &candidate.origin.repository,
                path,
                headers,
                class: Class::Fault,
                immutable: false,
                until: tries.until(),
            };
            match self.whole(&ask).await {
                Ok(Some(served)) => return Ok(served),
                Ok(None) => {
                    return Err(Error::TooLarge { what: what.to_owned(), limit: DOCUMENT_BYTES });
                }
                Err(error) => tries
                    .failed(error)
                    .await
                    .map_err(|source| Error::Fetch { what: what.to_owned(), source })?,
            }
        }
    }

    /// The whole answer; `None` if it is too large.
    async fn whole(&self, ask: &Ask<'_>) -> Result<Option<Served>, http::Error> {
        let mut answer = self.http.get(ask).await?;
        let media_type = answer.response.headers().get(CONTENT_TYPE);
        let media_type = media_type.and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk(ask.until).await? {
            if (bytes.len() + chunk.len()) as u64 > DOCUMENT_BYTES {
                return Ok(None);
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Some(Served { bytes: bytes.into(), media_type }))
    }
}
