//! The open files of a layer: index, inodes, data file, blob.

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memmap2::Mmap;
use skimmer_cache::{Class, Hold, LayerData, LayerFiles, LayerObjects, Pin};
use skimmer_index::build::Built;
use skimmer_index::chunk::Chunk;
use skimmer_index::erofs::{Inodes, Nid};
use skimmer_index::index::{LayerIndex, Layout};
use skimmer_index::tree::Tree;
use skimmer_proto::{Digest, PieceTable};
use tokio::time::timeout_at;

use super::{Cause, Layer, LayerSpec};
use crate::fill::{self, Fill, Proof};
use crate::fuse::{Content, Reader};
use crate::layers::Shared;
use crate::metrics::Metrics;
use crate::mount::{Subject, error_chain};
use crate::pull::{self, Expected};

/// A chunk that decodes to more than this is not worth a reader's wait: its blob is pulled through.
const MAX_LAZY_CHUNK_BYTES: u64 = 64 << 20;

/// Why bytes didn't come is known a moment after the deadline: readers wait for that, too.
const GRACE: Duration = Duration::from_secs(1);

/// Failed reads of one layer are logged at most this often.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// A layer's open files. The layer is pinned in the cache as long as this exists.
pub struct Open {
    pub fill: Arc<Fill>,
    /// Length of the encoded index.
    pub index_bytes: u64,
    pub inodes: Arc<Inodes<Mmap>>,
    /// SHA-256 of the TOC inside the blob, if that is all the index there is.
    pub toc: Option<Digest>,
    /// What a mount of it shows.
    pub subject: Subject,
    files: Arc<LayerFiles>,
    /// Whether SHA-256 and DiffID of the whole have been matched on this node.
    proved: bool,
    _pin: Pin,
}

impl Open {
    /// Opens what is on disk; `None` if there is no index, or none to be used lazily. Blocks.
    pub fn load(shared: &Shared, spec: &LayerSpec) -> Result<Option<Self>, Cause> {
        let digest = spec.blob.digest;
        let pin = shared.cache.pin_layer(digest);
        let files = shared.cache.layer(digest).map_err(|source| Cause::Files { source })?;
        let loaded = files.load().map_err(|source| Cause::Files { source })?;
        let Some(LayerObjects { index: encoded, table }) = loaded else { return Ok(None) };
        if table.diff_id != spec.diff_id {
            let (expected, actual) = (spec.diff_id, table.diff_id);
            return Err(Cause::DiffId { expected, actual });
        }
        let index = match LayerIndex::decode(&encoded) {
            Ok(index) => index,
            Err(error) => {
                tracing::warn!(layer = %digest, error = error_chain(&error), "stored index is damaged, building it again");
                return Ok(None);
            }
        };
        let data = files.open_data(index.data_len, index.chunks.len());
        let data = data.map_err(|source| Cause::Files { source })?;
        if !data.complete() && !is_lazy(&index.chunks) {
            return Ok(None);
        }
        let proved = shared.is_proved(digest)?;
        let (word, index_bytes) = (Word::Table(table), encoded.len() as u64);
        let parts = Parts { index, word, index_bytes, inodes: None, data, files, pin };
        match parts.open(shared, spec, proved) {
            Ok(open) => Ok(Some(open)),
            Err(Cause::Inodes { source }) => {
                tracing::warn!(layer = %digest, error = error_chain(&source), "stored inodes are damaged, building them again");
                Ok(None)
            }
            Err(cause) => Err(cause),
        }
    }

    /// Fetches the layer whole, proves it and stores what it is. Also returns the tree in its tar.
    pub async fn pull(
        shared: &Arc<Shared>,
        spec: &LayerSpec,
        class: Class,
    ) -> Result<(Self, Tree), Cause> {
        let started = Instant::now();
        let digest = spec.blob.digest;
        let pin = shared.cache.pin_layer(digest);
        let blob = shared.cache.blob(spec.blob.clone()).map_err(|source| Cause::Blob { source })?;
        let files = shared.cache.layer(digest).map_err(|source| Cause::Files { source })?;
        let attempt = async || {
            let new = files.new_data().map_err(|source| Cause::Files { source })?;
            let expected = Expected {
                blob: digest,
                diff_id: spec.diff_id,
                max_data_bytes: shared.config.max_data_bytes,
                limits: shared.config.limits.clone(),
            };
            Ok(pull::pull(&blob, Arc::new(new), expected, class).await)
        };
        let mut pulled = attempt().await?;
        if pulled.as_ref().is_err_and(pull::Error::is_disk_full) {
            blob.make_room().await;
            pulled = attempt().await?;
        }
        let built = match pulled {
            Ok(built) => built,
            Err(error) => {
                // What has come is of use to the next attempt, unless it fills a disk that others need.
                let forget = error.is_wrong_blob() || error.is_disk_full();
                if let Err(left) = files.discard_new_data() {
                    tracing::warn!(layer = %digest, error = error_chain(&left), "half a layer left on disk");
                }
                if forget {
                    blob.distrust().await.map_err(|source| Cause::Blob { source })?;
                }
                return Err(Cause::Pull { source: Box::new(error) });
            }
        };
        blob.prove(built.table.clone()).map_err(|source| Cause::Blob { source })?;
        let (shared, spec) = (Arc::clone(shared), spec.clone());
        let kept = tokio::task::spawn_blocking(move || {
            let kept = Self::keep(&shared, &spec, built, files, pin)?;
            shared.metrics.pulled(spec.blob.len, started.elapsed());
            Ok(kept)
        });
        kept.await.unwrap_or(Err(Cause::Interrupted))
    }

    /// Stores what was just built and opens it.
    fn keep(
        shared: &Shared,
        spec: &LayerSpec,
        built: Built,
        files: Arc<LayerFiles>,
        pin: Pin,
    ) -> Result<(Self, Tree), Cause> {
        let Built { index, encoded, table, tree } = built;
        let failed = |source| Cause::Files { source };
        let store = || files.store(&encoded, &table, &index.inodes);
        let stored = match store() {
            Err(error) if error.is_disk_full() => {
                shared.runtime.block_on(shared.cache.make_room());
                store()
            }
            stored => stored,
        };
        stored.map_err(failed)?;
        let (len, chunks) = (index.data_len, index.chunks.len());
        let data = match index.layout {
            Layout::Tar => files.adopt_data(len, chunks).map_err(failed)?,
            // The tar's own layout is not this index's: the chunks are decoded again on demand,
            // from the blob, which is all there.
            Layout::Toc => files.open_data(len, chunks).map_err(failed)?,
        };
        shared.record_proved(spec.blob.digest)?;
        let (word, index_bytes) = (Word::Table(table), encoded.len() as u64);
        let parts = Parts { index, word, index_bytes, inodes: None, data, files, pin };
        Ok((parts.open(shared, spec, true)?, tree))
    }

    /// Whether nothing is missing and everything was verified.
    pub fn is_local(&self) -> bool {
        self.proved && self.fill.data().complete()
    }

    pub const fn is_proved(&self) -> bool {
        self.proved
    }

    /// The files that the kernel can serve the layer from once it is complete: inodes and data.
    pub fn paths(&self) -> (PathBuf, PathBuf) {
        (self.files.inodes_path(), self.files.data_path())
    }

    /// What answers the reads of `layer`'s mount.
    pub fn reader(&self, layer: &Layer, shared: &Shared) -> Arc<Reader<LayerContent>> {
        Reader::new(
            self.content(layer, shared),
            shared.config.deadline,
            Arc::clone(&shared.buffers),
            shared.runtime.clone(),
            shared.places.share(),
            shared.leaving.clone(),
        )
    }

    pub(super) fn content(&self, layer: &Layer, shared: &Shared) -> LayerContent {
        LayerContent {
            fill: Arc::clone(&self.fill),
            inodes: Arc::clone(&self.inodes),
            layer: layer.digest(),
            image: layer.spec().image,
            metrics: Arc::clone(&shared.metrics),
            started: Instant::now(),
            logged_ms: AtomicU64::new(0),
        }
    }

    /// Records on disk which chunks are there. What isn't recorded is decoded again after a crash.
    pub fn checkpoint(&self) {
        if let Err(error) = self.fill.data().checkpoint() {
            tracing::warn!(error = error_chain(&error), "layer checkpoint not written");
        }
    }

    /// Ends all reading of the layer: mounts that containers still use answer EIO.
    pub async fn condemn(&self) {
        let fill = Arc::clone(&self.fill);
        // It waits for reads under way, which don't panic.
        let _ = tokio::task::spawn_blocking(move || fill.condemn()).await;
    }

    /// Removes everything that is known of the layer and its blob.
    pub async fn purge(&self, shared: &Shared) {
        self.condemn().await;
        let layer = self.files.blob();
        shared.forget_proved(layer);
        if let Err(error) = self.fill.blob().distrust().await {
            tracing::error!(%layer, error = error_chain(&error), "wrong blob not purged");
        }
        let files = Arc::clone(&self.files);
        let removed = tokio::task::spawn_blocking(move || files.remove()).await;
        if let Ok(Err(error)) = removed {
            tracing::error!(%layer, error = error_chain(&error), "wrong layer not purged");
        }
    }
}

/// Whether no chunk is too long for a reader's patience.
pub(super) fn is_lazy(chunks: &[Chunk]) -> bool {
    chunks.iter().all(|chunk| chunk.data.end - chunk.data.start <= MAX_LAZY_CHUNK_BYTES)
}

/// Whose word an index is.
pub(super) enum Word {
    Table(PieceTable),
    /// The TOC with this digest, and what it says that the chunks decode to.
    Toc(Digest, Vec<Digest>),
}

/// What an [`Open`] is made of.
pub(super) struct Parts {
    pub index: LayerIndex,
    pub word: Word,
    pub index_bytes: u64,
    /// `None`: those that are stored.
    pub inodes: Option<File>,
    pub data: Arc<LayerData>,
    pub files: Arc<LayerFiles>,
    pub pin: Pin,
}

impl Parts {
    pub fn open(self, shared: &Shared, spec: &LayerSpec, proved: bool) -> Result<Open, Cause> {
        let Self { mut index, word, index_bytes, inodes, data, files, pin } = self;
        let inodes = inodes.map_or_else(|| File::open(files.inodes_path()), Ok);
        let inodes = inodes.and_then(|file| map(&file)).map_err(|source| Cause::Map { source })?;
        let inodes = Inodes::open(inodes, index.data_len)
            .map_err(|source| Cause::Inodes { source: Box::new(source) })?;
        // They are read through the map; a second copy would only take memory.
        index.inodes = Vec::new();
        let failed = |source| Cause::Blob { source };
        let blob = shared.cache.blob(spec.blob.clone()).map_err(failed)?;
        let (proof, toc, shown) = match word {
            Word::Table(table) => {
                let shown = table.index;
                blob.set_table(Arc::new(table)).map_err(failed)?;
                (Proof::Pieces, None, shown)
            }
            Word::Toc(digest, chunks) => (Proof::Chunks(chunks), Some(digest), digest),
        };
        let subject = Subject { blob: spec.blob.digest, diff_id: spec.diff_id, index: shown };
        let fill = Fill::new(
            blob,
            data,
            index,
            proof,
            shared.config.deadline,
            &shared.decoders,
            Arc::clone(&shared.metrics),
        );
        let fill = Arc::new(fill);
        // What the kernel reads by itself must not become a hole.
        if !shared.mounts.kernel_left(spec.blob.digest) {
            fill.data().allow_punching(Arc::downgrade(&fill) as _);
        }
        let inodes = Arc::new(inodes);
        Ok(Open { fill, index_bytes, inodes, toc, subject, files, proved, _pin: pin })
    }
}

#[expect(unsafe_code, reason = "a mapped file is memory that somebody else could change")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the cache never writes to this file in place: it is replaced by rename and removed by
    // unlink, both of which leave the mapped one as it is.
    unsafe { Mmap::map(file) }
}

/// A layer's bytes, as its mount reads them.
pub struct LayerContent {
    fill: Arc<Fill>,
    inodes: Arc<Inodes<Mmap>>,
    layer: Digest,
    image: String,
    metrics: Arc<Metrics>,
    started: Instant,
    /// When a failed read was last logged, in ms since `started`, plus one.
    logged_ms: AtomicU64,
}

impl LayerContent {
    /// A reader of `what` got EIO.
    pub(super) fn tell(
        &self,
        what: std::fmt::Arguments<'_>,
        error: &(dyn std::error::Error + 'static),
    ) {
        self.metrics.failed_reads.inc();
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1;
        let last = self.logged_ms.load(Ordering::Relaxed);
        let due = last == 0 || Duration::from_millis(now - last.min(now)) >= LOG_INTERVAL;
        if due && self.logged_ms.swap(now, Ordering::Relaxed) == last {
            tracing::error!(layer = %self.layer, image = self.image, %what, error = error_chain(error),
                "a reader got an I/O error");
        }
    }
}

impl Content for LayerContent {
    type Bytes = Mmap;
    type Error = Arc<fill::Error>;

    fn inodes(&self) -> &Inodes<Mmap> {
        &self.inodes
    }

    fn file(&self) -> &File {
        self.fill.data().file()
    }

    fn data_len(&self) -> u64 {
        self.fill.data().len()
    }

    fn hold(&self) -> Hold<'_> {
        self.fill.data().hold()
    }

    fn touch(&self, range: &Range<u64>) {
        self.fill.touch(range);
    }

    fn has(&self, range: &Range<u64>) -> bool {
        self.fill.has(range)
    }

    async fn ensure(&self, ranges: &[Range<u64>], until: Instant) -> Result<(), Self::Error> {
        let fault = timeout_at((until + GRACE).into(), self.fill.fault(ranges));
        fault.await.unwrap_or_else(|_| Err(Arc::new(fill::Error::Late)))
    }

    fn failed(&self, inode: Nid, error: &(dyn std::error::Error + 'static)) {
        self.tell(format_args!("inode {}", inode.0), error);
    }

    fn asked(&self) {
        self.metrics.reads.inc();
    }

    fn waited(&self, time: Duration) {
        self.metrics.waited(time);
    }
}
