//! From a blob's last bytes to its layer, open by what they say.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use skimmer_cache::{Blob, Class, LayerData, LayerFiles, Pin, blob, layer as files};
use skimmer_index::index::LayerIndex;
use skimmer_index::toc::{self, FOOTER_LEN, Place, Toc};
use skimmer_proto::Digest;
use tokio::task::spawn_blocking;

use crate::layer::open::{Parts, Word, is_lazy};
use crate::layer::{Cause, LayerSpec, Open};
use crate::layers::Shared;
use crate::mount::Subject;

/// Why a layer isn't opened by its TOC.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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
    #[error("its TOC was wrong before")]
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

/// The TOC of a layer's blob, and what it makes of the layer.
struct Contents {
    digest: Digest,
    index: LayerIndex,
    /// What it says that the chunks decode to.
    chunks: Vec<Digest>,
    pin: Pin,
}

/// The inodes, unless they have their name, and the data file.
type Files = (Option<File>, Arc<LayerData>);

/// Opens a layer that has no index by its TOC. `None`: it has an index, no TOC, or none that a reader would have patience
/// for.
pub async fn open_alone(shared: &Arc<Shared>, spec: &LayerSpec) -> Result<Option<Open>, Error> {
    let Some(contents) = read(shared, spec).await? else { return Ok(None) };
    let files = |files: &LayerFiles, toc: Digest, index: &LayerIndex| {
        if files.load()?.is_some() || !is_lazy(&index.chunks) {
            return Ok(None);
        }
        let (len, chunks) = (index.data_len, index.chunks.len());
        let data = files.open_provisional(toc, &index.inodes, len, chunks)?;
        Ok(Some((None, data)))
    };
    contents.open(shared, spec, files).await
}

/// Opens a layer by its TOC, which is to make it `subject`, beside whatever else it is opened by.
pub async fn open_aside(
    shared: &Arc<Shared>,
    spec: &LayerSpec,
    subject: Subject,
) -> Result<Open, Error> {
    let expected = subject.index;
    let contents = read(shared, spec).await?.filter(|contents| contents.digest == expected);
    let contents = contents.ok_or(Error::Other { expected })?;
    let files = |files: &LayerFiles, toc: Digest, index: &LayerIndex| {
        let (len, chunks) = (index.data_len, index.chunks.len());
        let (inodes, data) = files.open_aside(toc, &index.inodes, len, chunks)?;
        Ok(Some((Some(inodes), data)))
    };
    let opened = contents.open(shared, spec, files).await?;
    opened.filter(|open| open.subject == subject).ok_or(Error::Other { expected })
}

impl Contents {
    /// Opens the layer over the files that `files` makes, if it makes any.
    async fn open(
        self,
        shared: &Arc<Shared>,
        spec: &LayerSpec,
        files_for: impl FnOnce(&LayerFiles, Digest, &LayerIndex) -> Result<Option<Files>, files::Error>
        + Send
        + 'static,
    ) -> Result<Option<Open>, Error> {
        let (shared, spec) = (Arc::clone(shared), spec.clone());
        let opened = spawn_blocking(move || {
            let Self { digest, index, chunks, pin } = self;
            let failed = |source| Error::Files { source };
            let files = shared.cache.layer(spec.blob.digest).map_err(failed)?;
            let made = files_for(&files, digest, &index).map_err(failed)?;
            let Some((inodes, data)) = made else { return Ok(None) };
            let word = Word::Toc(digest, chunks);
            let parts = Parts { index, word, index_bytes: 0, inodes, data, files, pin };
            let open = parts.open(&shared, &spec, false);
            open.map(Some).map_err(|cause| Error::Open { source: Box::new(cause) })
        });
        opened.await.unwrap_or(Err(Error::Interrupted))
    }
}

/// Fetches the TOC of a blob and reads it. `None`: it has none.
async fn read(shared: &Arc<Shared>, spec: &LayerSpec) -> Result<Option<Contents>, Error> {
    if shared.is_wrong_toc(spec.blob.digest).map_err(|source| Error::Record { source })? {
        return Err(Error::Wrong);
    }
    let pin = shared.cache.pin_layer(spec.blob.digest);
    let Some((place, bytes)) = fetch_toc(shared, spec).await? else { return Ok(None) };
    let (blob_len, promised) = (spec.blob.len, spec.toc_digest);
    let limits = shared.config.limits.clone();
    let contents = spawn_blocking(move || {
        let failed = |source| Error::Toc { source };
        let found = toc::read(&place, &bytes).map_err(failed)?;
        let digest = found.digest();
        if let Some(expected) = promised.filter(|promised| !found.is(*promised)) {
            return Err(Error::Digest { expected, actual: digest });
        }
        let toc = Toc::new(found, blob_len, limits);
        let (index, chunks) = toc.and_then(Toc::into_index).map_err(failed)?;
        Ok(Some(Contents { digest, index, chunks, pin }))
    });
    contents.await.unwrap_or(Err(Error::Interrupted))
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

/// Bytes of a blob that nothing vouches for.
async fn fetch(blob: &Arc<Blob>, range: Range<u64>) -> Result<Vec<u8>, Error> {
    let fetched = blob.ensure_unverified(range.clone(), Class::Fault).await;
    fetched.map_err(|source| Error::Fetch { source })?;
    let blob = Arc::clone(blob);
    let bytes = spawn_blocking(move || bytes_of(&blob, range)).await;
    bytes.map_err(|_| Error::Interrupted)?.map_err(|source| Error::Read { source })
}

pub fn bytes_of(blob: &Blob, range: Range<u64>) -> io::Result<Vec<u8>> {
    let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let mut bytes = vec![0; len];
    blob.read_at(&mut bytes, range.start)?;
    Ok(bytes)
}
