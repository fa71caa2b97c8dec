//! A layer mounted by the table of contents (TOC) inside its blob, on the image author's word.
//!
//! Owns: the way from a blob's last bytes to a mount, and from there to the index that counts.
//! Does not own: what TOCs look like (see [`skimmer_index::toc`]).
//!
//! Invariants:
//! - A TOC makes no index: nothing of it outlives the mount but bytes that are checked once more. The
//!   layer's index is the one that its pull-through builds. What a later process is left of the mount it serves by the
//!   TOC again, beside the index.
//! - A reader gets a chunk only if it has the digest that the TOC gives; the layer counts as complete
//!   only if SHA-256, DiffID and the tar have proved the TOC right.
//! - Who was caught once is not believed again.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use skimmer_cache::{Blob, Class, blob, layer as files};
use skimmer_index::index::LayerIndex;
use skimmer_index::tar::Limits;
use skimmer_index::toc::{self, FOOTER_LEN, Found, Place, Toc};
use skimmer_index::tree::Tree;
use skimmer_proto::Digest;
use tokio::task::spawn_blocking;

use super::complete::RUN;
use super::open::{Parts, Word, is_lazy};
use super::{Cause, Failure, Layer, LayerSpec, Open, VerifyError};
use crate::layers::Shared;
use crate::mount::{Left, Mount, Subject, error_chain};
use crate::state::Event;

/// Between attempts to get a TOC that readers wait for.
const PAUSE: Duration = Duration::from_secs(2);

/// Why a layer isn't opened by its TOC.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("look up whether its TOC was wrong before")]
    Record { source: skimmer_store::Error },
    #[error("open the blob")]
    Blob { source: blob::Error },
    #[error("fetch the TOC")]
    Fetch { source: blob::Error },
    #[error("read the TOC")]
    Read { source: io::Error },
    #[error(
        "the image's manifest gives its TOC the digest {expected}, the TOC in the blob has {actual}"
    )]
    Digest { expected: Digest, actual: Digest },
    #[error("its TOC was wrong")]
    Wrong,
    #[error("the TOC in the blob isn't {expected}")]
    Other { expected: Digest },
    #[error("use the TOC")]
    Toc { source: toc::Error },
    #[error("make the layer's files")]
    Files { source: files::Error },
    #[error("open the layer")]
    Open { source: Box<Cause> },
    #[error("it was interrupted")]
    Interrupted,
}

impl Layer {
    /// Opens a layer without an index by its TOC, if that is to be trusted and there is one.
    pub(super) async fn open_by_toc(&self) -> Option<Open> {
        let (config, spec) = (&self.shared.config, self.spec());
        if !config.trust_toc || spec.blob.len < config.min_layer_bytes {
            return None;
        }
        match open(&self.shared, &spec).await {
            Ok(open) => open,
            Err(error) => {
                tracing::warn!(layer = %spec.blob.digest, image = spec.image, error = error_chain(&error),
                    "layer not mounted by the table of contents inside its blob, pulling it through");
                None
            }
        }
    }

    /// Pulls a layer through that is mounted by the TOC `toc`, and checks that. From then on the
    /// layer is mounted by its own index; what is mounted stays as it is.
    pub(super) async fn replace_toc(
        self: &Arc<Self>,
        lazy: &Open,
        toc: Digest,
    ) -> Result<(), Failure> {
        let spec = self.spec();
        let turn = self.shared.pulls.queue().come().await;
        let _turn = turn.ok_or_else(|| self.failure(Cause::Interrupted))?;
        let _writer = self.shared.writer(spec.blob.digest).await;
        let (open, tree) = match Open::pull(&self.shared, &spec, Class::Background).await {
            Ok(pulled) => pulled,
            Err(cause) if is_wrong_layer(&cause) => {
                self.shared.record_wrong_toc(spec.blob.digest);
                return Err(self.purge(lazy, cause).await);
            }
            Err(cause) => return Err(self.failure(cause)),
        };
        let open = Arc::new(open);
        let (proved, limits) = (Arc::clone(&open), self.shared.config.limits.clone());
        let checked = spawn_blocking(move || check(&proved, toc, &tree, limits)).await;
        match checked.unwrap_or(Err(Cause::Interrupted)) {
            Ok(()) => {
                let turn = self.mounting.lock().await;
                self.apply(Event::Completed, Some(open));
                drop(turn);
                self.outlive(lazy).await;
                Ok(())
            }
            // The index that was built is proved: the next to want the layer gets the truth.
            Err(cause) => {
                self.shared.record_wrong_toc(spec.blob.digest);
                lazy.condemn().await;
                Err(self.expose(cause))
            }
        }
    }
}

impl Layer {
    /// Serves a FUSE mount that an earlier process left and that shows the layer by its TOC: an index has taken over
    /// since. In its own time, as bytes of the blob may have to be fetched; readers wait.
    pub(super) fn take_over_aside(self: &Arc<Self>, left: Left, subject: Subject) {
        self.spawn(|this| async move {
            let spec = this.spec();
            let opened = this.open_aside(&spec, subject).await;
            let _turn = this.mounting.lock().await;
            let (layer, mount) = (spec.blob.digest, left.id);
            let open = match opened {
                Ok(open) if !this.is_absent() => open,
                Ok(_) => return this.shared.mounts.discard(left),
                Err(error) => {
                    tracing::error!(%layer, image = spec.image, mount, error = error_chain(&error),
                        "a mount of an earlier process shows the layer by another index, containers that use it get errors");
                    return this.shared.mounts.discard(left);
                }
            };
            let server = Arc::clone(&this);
            let serve = move || server.enter_left(server.serve(left, &open)?, false);
            let served = spawn_blocking(serve).await.unwrap_or(Err(Cause::Interrupted));
            if let Err(error @ Cause::Mount { .. }) = served {
                tracing::error!(%layer, image = spec.image, mount, error = error_chain(&error),
                    "a mount of an earlier process not taken over");
            }
        });
    }

    /// Opens the layer by the TOC that makes it `subject`, trying again until the deadline: readers wait.
    async fn open_aside(&self, spec: &LayerSpec, subject: Subject) -> Result<Open, Error> {
        let (started, deadline) = (Instant::now(), self.shared.config.deadline);
        loop {
            match open_aside(&self.shared, spec, subject).await {
                Err(Error::Fetch { .. }) if started.elapsed() + PAUSE < deadline => {
                    tokio::time::sleep(PAUSE).await;
                }
                opened => return opened,
            }
        }
    }

    /// What the kernel serves by a TOC that has been proved it serves alone from now on: the next process will know the
    /// layer by its index only. The blob is all here.
    async fn outlive(&self, lazy: &Open) {
        if !self.core().former.iter().any(Mount::is_lazy) {
            return;
        }
        let chunks = lazy.fill.index().chunks.len();
        for first in (0..chunks).step_by(RUN) {
            let run = first..chunks.min(first + RUN);
            if let Err(error) = lazy.fill.run(run, Class::Background).await {
                tracing::warn!(layer = %self.digest(), error = error_chain(&*error),
                    "containers that were started by a table of contents get errors once skimmerd has been started anew");
                return;
            }
        }
        let fill = Arc::clone(&lazy.fill);
        let synced = spawn_blocking(move || fill.data().file().sync_data()).await;
        if matches!(synced, Ok(Ok(()))) {
            let data = lazy.fill.data().file();
            self.core().former.iter_mut().for_each(|mount| mount.complete(data));
        }
    }
}

fn is_wrong_layer(cause: &Cause) -> bool {
    matches!(cause, Cause::Pull { source } if source.is_wrong_layer())
}

/// Opens a layer by its TOC. `None`: it has none, or none that a reader would have patience for.
async fn open(shared: &Arc<Shared>, spec: &LayerSpec) -> Result<Option<Open>, Error> {
    let digest = spec.blob.digest;
    if shared.is_wrong_toc(digest).map_err(|source| Error::Record { source })? {
        return Ok(None);
    }
    let pin = shared.cache.pin_layer(digest);
    let Some((place, bytes)) = fetch_toc(shared, spec).await? else { return Ok(None) };
    let (shared, spec) = (Arc::clone(shared), spec.clone());
    let opened = spawn_blocking(move || {
        let found = read(&place, &bytes)?;
        let actual = found.digest();
        if let Some(expected) = spec.toc_digest.filter(|expected| !found.is(*expected)) {
            return Err(Error::Digest { expected, actual });
        }
        let (index, digests) = into_index(found, spec.blob.len, &shared)?;
        let files = shared.cache.layer(digest).map_err(|source| Error::Files { source })?;
        let stored = files.load().map_err(|source| Error::Files { source })?;
        if stored.is_some() || !is_lazy(&index.chunks) {
            return Ok(None);
        }
        let (len, chunks) = (index.data_len, index.chunks.len());
        let data = files.open_provisional(actual, &index.inodes, len, chunks);
        let data = data.map_err(|source| Error::Files { source })?;
        let word = Word::Toc(actual, digests);
        let parts = Parts { index, word, index_bytes: 0, inodes: None, data, files, pin };
        let open = parts.open(&shared, &spec, false);
        open.map(Some).map_err(|cause| Error::Open { source: Box::new(cause) })
    });
    opened.await.unwrap_or(Err(Error::Interrupted))
}

/// Opens a layer by its TOC, which is to make it `subject`, beside whatever else it is opened by.
async fn open_aside(
    shared: &Arc<Shared>,
    spec: &LayerSpec,
    subject: Subject,
) -> Result<Open, Error> {
    let toc = subject.index;
    if shared.is_wrong_toc(spec.blob.digest).map_err(|source| Error::Record { source })? {
        return Err(Error::Wrong);
    }
    let pin = shared.cache.pin_layer(spec.blob.digest);
    let fetched = fetch_toc(shared, spec).await?;
    let (place, bytes) = fetched.ok_or(Error::Other { expected: toc })?;
    let (shared, spec) = (Arc::clone(shared), spec.clone());
    let opened = spawn_blocking(move || {
        let found = read(&place, &bytes)?;
        if found.digest() != toc {
            return Err(Error::Other { expected: toc });
        }
        let (index, digests) = into_index(found, spec.blob.len, &shared)?;
        let files = shared.cache.layer(spec.blob.digest);
        let files = files.map_err(|source| Error::Files { source })?;
        let (len, chunks) = (index.data_len, index.chunks.len());
        let aside = files.open_aside(toc, &index.inodes, len, chunks);
        let (inodes, data) = aside.map_err(|source| Error::Files { source })?;
        let (word, inodes) = (Word::Toc(toc, digests), Some(inodes));
        let parts = Parts { index, word, index_bytes: 0, inodes, data, files, pin };
        let open = parts.open(&shared, &spec, false);
        let open = open.map_err(|cause| Error::Open { source: Box::new(cause) })?;
        if open.subject == subject { Ok(open) } else { Err(Error::Other { expected: toc }) }
    });
    opened.await.unwrap_or(Err(Error::Interrupted))
}

/// The bytes of a blob's TOC, and where they are. `None`: it has none.
async fn fetch_toc(
    shared: &Arc<Shared>,
    spec: &LayerSpec,
) -> Result<Option<(Place, Vec<u8>)>, Error> {
    let blob = shared.cache.blob(spec.blob.clone()).map_err(|source| Error::Blob { source })?;
    let footer = blob.len().saturating_sub(FOOTER_LEN)..blob.len();
    let tail = fetch(&blob, footer).await?;
    let Some(place) = toc::find(&tail, blob.len()) else { return Ok(None) };
    let bytes = fetch(&blob, place.blob.clone()).await?;
    Ok(Some((place, bytes)))
}

fn read(place: &Place, bytes: &[u8]) -> Result<Found, Error> {
    toc::read(place, bytes).map_err(|source| Error::Toc { source })
}

/// The index that a TOC makes, and what it says that the chunks decode to.
fn into_index(
    found: Found,
    blob_len: u64,
    shared: &Shared,
) -> Result<(LayerIndex, Vec<Digest>), Error> {
    let toc = Toc::new(found, blob_len, shared.config.limits.clone());
    toc.and_then(Toc::into_index).map_err(|source| Error::Toc { source })
}

/// Bytes of a blob that nothing vouches for.
async fn fetch(blob: &Arc<Blob>, range: Range<u64>) -> Result<Vec<u8>, Error> {
    let fetched = blob.ensure_unverified(range.clone(), Class::Fault).await;
    fetched.map_err(|source| Error::Fetch { source })?;
    let blob = Arc::clone(blob);
    let bytes = spawn_blocking(move || bytes_of(&blob, range)).await;
    bytes.map_err(|_| Error::Interrupted)?.map_err(|source| Error::Read { source })
}

fn bytes_of(blob: &Blob, range: Range<u64>) -> io::Result<Vec<u8>> {
    let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let mut bytes = vec![0; len];
    blob.read_at(&mut bytes, range.start)?;
    Ok(bytes)
}

/// Checks that the TOC inside a proved blob is the one with the digest `toc`, and says what is in the
/// tar, whose tree is `tree`.
fn check(open: &Open, toc: Digest, tree: &Tree, limits: Limits) -> Result<(), Cause> {
    let failed = |source| Cause::Verify { source };
    let (blob, data) = (open.fill.blob(), open.fill.data().file());
    let read_failed = |source| failed(VerifyError::ReadBlob { source });
    let tail = bytes_of(blob, blob.len().saturating_sub(FOOTER_LEN)..blob.len());
    let place = toc::find(&tail.map_err(read_failed)?, blob.len());
    let place = place.ok_or_else(|| failed(VerifyError::OtherToc))?;
    let bytes = bytes_of(blob, place.blob.clone()).map_err(read_failed)?;
    let wrong = |source| failed(VerifyError::Toc { source: Box::new(source) });
    let found = toc::read(&place, &bytes).map_err(wrong)?;
    if found.digest() != toc {
        return Err(failed(VerifyError::OtherToc));
    }
    let toc = Toc::new(found, blob.len(), limits).map_err(wrong)?;
    toc.compare(tree, &mut |buffer, at| data.read_exact_at(buffer, at)).map_err(wrong)
}
