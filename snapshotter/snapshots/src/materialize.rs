//! Puts an image's blobs whole into containerd's content store, from the cache: for other snapshotters, and for push,
//! export and convert.
//!
//! A blob is given a second name in containerd's own folder (see [`place`]) and then committed through its API, which
//! finds the bytes there: none goes through a socket, and there is one copy on disk. Where that can't be done, it is
//! written through the API.
//!
//! Owns: the order of these steps, and the lease that protects what nothing refers to yet.
//! Does not own: fetching and checking the blobs (the cache's).
//!
//! Invariants:
//! - containerd is given only blobs that have matched their SHA-256.
//! - A document is stored after the blobs that it refers to.

mod commit;
mod place;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_client::types::Descriptor;
use futures::{StreamExt, TryStreamExt, stream};
use skimmer_cache::{BlobKind, BlobRef, Cache, Class, Origin, Whole, blob};
use skimmer_proto::{Digest, Reference};
use tokio::task::spawn_blocking;
use tracing::{debug, info};

use crate::identify::{Containerd, Content, ContentError, MAX_DOCUMENT_BYTES, is_distributable};
use crate::install::{Document, ImageContent, linked};
use crate::inventory::Installed;
use crate::metrics::Adoptions;
use crate::session::{self, Labels, Session, source_label};

use commit::Seen;

/// Blobs that are fetched at once.
const BLOBS_AT_ONCE: usize = 4;

/// How often a blob is put where containerd should see it: its garbage collector may take it away before it is
/// committed.
const ATTEMPTS: usize = 3;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Containerd(#[from] session::Error),
    #[error("look at containerd's content")]
    Content(#[from] ContentError),
    #[error("get blob {digest} of {image}")]
    Blob { image: String, digest: Digest, source: blob::Error },
    #[error("read blob {digest} from the cache")]
    Read { digest: Digest, source: std::io::Error },
}

/// What is put into the content store.
#[derive(Clone, Debug)]
pub struct Contents {
    /// For messages.
    image: String,
    /// In the order in which they are stored.
    documents: Vec<(Document, Labels)>,
    blobs: Vec<BlobRef>,
    /// Where the blobs are from, as containerd labels it.
    source: Option<(String, String)>,
    /// Image records: names, and what they stand for.
    records: Vec<(String, Descriptor)>,
}

impl Contents {
    /// Of an image that the registry has described.
    pub fn of(image: &ImageContent) -> Self {
        let Reference { host, repository, .. } = &image.reference;
        let origin = Origin { host: host.clone(), repository: repository.clone() };
        let served = image.layers.iter().filter(|layer| is_distributable(&layer.media_type));
        let blobs = served.map(|layer| BlobRef {
            digest: layer.digest,
            len: layer.size,
            kind: BlobKind::Blob,
            origins: vec![origin.clone()],
        });
        Self::new(
            image.reference.to_string(),
            &image.manifests,
            &image.config,
            blobs.collect(),
            Some(&origin),
        )
    }

    /// Of an image that containerd has without its blobs.
    pub async fn of_installed(
        containerd: &Containerd,
        image: &Installed,
    ) -> Result<Self, ContentError> {
        let read = async |digest: &Digest| {
            let bytes = containerd.read(&image.namespace, digest, MAX_DOCUMENT_BYTES).await?;
            Ok::<_, ContentError>(Document { media_type: String::new(), digest: *digest, bytes })
        };
        let mut manifests = Vec::new();
        for digest in &image.manifests {
            manifests.push(read(digest).await?);
        }
        let config = read(&image.config).await?;
        let origin = image.blobs.first().and_then(|blob| blob.origins.first());
        let (name, blobs) = (image.name.clone(), image.blobs.clone());
        Ok(Self::new(name, &manifests, &config, blobs, origin))
    }

    fn new(
        image: String,
        manifests: &[Document],
        config: &Document,
        blobs: Vec<BlobRef>,
        origin: Option<&Origin>,
    ) -> Self {
        let source = origin.map(|origin| source_label(&origin.host, &origin.repository));
        let digests: Vec<Digest> = blobs.iter().map(|blob| blob.digest).collect();
        let documents = linked(manifests, config, &digests);
        let documents = documents.into_iter().map(|(document, mut labels)| {
            labels.extend(source.clone());
            (document.clone(), labels)
        });
        Self { image, documents: documents.collect(), blobs, source, records: Vec::new() }
    }

    /// With documents that the image doesn't need, but pulls of it ask for.
    #[must_use]
    pub fn with_documents(mut self, more: Vec<Document>) -> Self {
        let labels: Labels = self.source.iter().cloned().collect();
        self.documents.extend(more.into_iter().map(|document| (document, labels.clone())));
        self
    }

    /// Has the image recorded as well, under `reference` and under the digest of what that stands for.
    #[must_use]
    pub fn recorded_as(mut self, reference: &Reference, top: &Document) -> Self {
        let by_digest = Reference { tag: None, digest: Some(top.digest), ..reference.clone() };
        let names: BTreeSet<String> = [reference.to_string(), by_digest.to_string()].into();
        self.records = names.into_iter().map(|name| (name, top.descriptor())).collect();
        self
    }
}

/// How a blob came into the content store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// It was there.
    Present,
    Linked,
    Copied,
    /// Through containerd's API.
    Streamed,
}

impl Way {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Linked => "linked",
            Self::Copied => "copied",
            Self::Streamed => "streamed",
        }
    }
}

/// Puts content into one containerd, from one cache.
#[derive(Clone)]
pub struct Materializer {
    pub containerd: Arc<Containerd>,
    pub cache: Cache,
    pub metrics: Adoptions,
}

/// Keeps what was put there from containerd's garbage collector, until it is released or its time is over.
pub struct Kept {
    session: Session,
}

impl Kept {
    /// What an image record doesn't lead to may go.
    pub async fn release(self) -> Result<(), Error> {
        Ok(self.session.close().await?)
    }
}

impl Materializer {
    /// Puts `contents` into `namespace`, and keeps them there for `time` at most.
    pub async fn put(
        &self,
        namespace: &str,
        contents: &Contents,
        time: Duration,
    ) -> Result<Kept, Error> {
        let session = Session::open(self.containerd.channel(), namespace, time).await?;
        match self.put_in(&session, contents).await {
            Ok(()) => Ok(Kept { session }),
            Err(error) => {
                // The first error counts; the lease ends by itself.
                let _ = session.close().await;
                Err(error)
            }
        }
    }

    async fn put_in(&self, session: &Session, contents: &Contents) -> Result<(), Error> {
        let store = self.containerd.content_root().await?.map(|root| root.join("blobs/sha256"));
        let mut digests = BTreeSet::new();
        let blobs = contents.blobs.iter().filter(|blob| digests.insert(blob.digest));
        let put: Vec<_> =
            blobs.map(|blob| self.put_blob(session, contents, blob, store.as_deref())).collect();
        let ways: Vec<Way> =
            stream::iter(put).buffer_unordered(BLOBS_AT_ONCE).try_collect().await?;
        for (document, labels) in &contents.documents {
            session.write(document, labels.clone()).await?;
        }
        for (name, target) in &contents.records {
            session.record(name, target.clone()).await?;
        }
        let count = |way| ways.iter().filter(|other| **other == way).count();
        info!(
            image = contents.image,
            linked = count(Way::Linked),
            copied = count(Way::Copied),
            streamed = count(Way::Streamed),
            present = count(Way::Present),
            "blobs are in containerd's content store"
        );
        Ok(())
    }

    async fn put_blob(
        &self,
        session: &Session,
        contents: &Contents,
        blob: &BlobRef,
        store: Option<&Path>,
    ) -> Result<Way, Error> {
        let digest = blob.digest;
        if session.has(&digest).await?
            && commit::commit(session, &digest, blob.len, Labels::new()).await? == Seen::Before
        {
            return Ok(Way::Present);
        }
        let failed = |source| Error::Blob { image: contents.image.clone(), digest, source };
        let (cache, wanted) = (self.cache.clone(), blob.clone());
        let opened = spawn_blocking(move || cache.blob(wanted)).await;
        let opened = opened.map_err(|error| interrupted(digest, error))?.map_err(failed)?;
        let whole = opened.whole(Class::PullThrough).await.map_err(failed)?;
        let labels: Labels = contents.source.iter().cloned().collect();
        let way = self.adopt(session, &whole, store, labels).await?;
        self.metrics.count(way);
        Ok(way)
    }

    async fn adopt(
        &self,
        session: &Session,
        whole: &Whole,
        store: Option<&Path>,
        labels: Labels,
    ) -> Result<Way, Error> {
        let digest = whole.digest();
        for _ in 0..ATTEMPTS {
            let Some(way) = placed(whole, store).await? else { break };
            match commit::commit(session, &digest, whole.size(), labels.clone()).await? {
                Seen::Before => return Ok(Way::Present),
                Seen::Now => {
                    // From here on containerd keeps it; until now it might not have.
                    placed(whole, store).await?;
                    return Ok(way);
                }
                Seen::Not => debug!(%digest, "containerd doesn't see a blob in its store"),
            }
        }
        match commit::stream(session, whole, labels).await? {
            Seen::Before => Ok(Way::Present),
            _ => Ok(Way::Streamed),
        }
    }
}

/// Puts the blob into containerd's folder; `None` if that can't be done.
async fn placed(whole: &Whole, store: Option<&Path>) -> Result<Option<Way>, Error> {
    let Some(store) = store.map(PathBuf::from) else { return Ok(None) };
    let (digest, placing) = (whole.digest(), whole.clone());
    let put = move || place::place(placing.file(), placing.size(), &store, &digest);
    match spawn_blocking(put).await.map_err(|error| interrupted(digest, error))? {
        Ok(way) => Ok(Some(way)),
        Err(error) => {
            debug!(%digest, %error, "a blob can't be put into containerd's folder");
            Ok(None)
        }
    }
}

fn interrupted(digest: Digest, error: tokio::task::JoinError) -> Error {
    Error::Read { digest, source: std::io::Error::other(error) }
}
