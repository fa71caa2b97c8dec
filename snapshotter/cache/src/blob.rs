//! Blobs on disk, filled piece by piece.
//!
//! Owns: a blob's files and presence bits (see [`pieces`]), its piece table while it is open.
//! Does not own: which piece is fetched when (the planner's), the transfers (the fetcher's).
//!
//! Invariants:
//! - A piece marked verified has matched the table with the root it is marked for.
//! - [`Blob::ensure`] returns only after every piece of its range is on disk and verified.

mod pieces;
mod pull;
mod rot;
mod serve;
mod whole;

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use skimmer_proto::{Digest, Geometry, PieceTable, Scope};
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

pub(crate) use self::pieces::{Checked, DATA, Pieces};
pub use self::pull::PullThrough;
pub use self::rot::Rot;
pub use self::whole::Whole;
use crate::fetch::{Cause, Failure, Fetcher};
use crate::metrics::Metrics;
use crate::planner::{BlobId, Why};
use crate::source::{BlobKind, BlobRef, Class, FetchError, Origin, Via};
use crate::space::Space;

/// `ensure` of a long range asks for this much at a time, so that the planner's memory is bounded.
const ENSURE_STEP: u64 = 64 << 20;

/// Origins remembered for a blob; the latest named come first.
const MAX_ORIGINS: usize = 8;

/// See the module's documentation.
#[derive(Debug)]
pub struct Blob {
    pub(crate) id: BlobId,
    digest: Digest,
    kind: BlobKind,
    geometry: Geometry,
    dir: PathBuf,
    /// Held while another data file takes the place of the present one.
    replacing: tokio::sync::Mutex<()>,
    origins: Mutex<Vec<Origin>>,
    content: RwLock<Content>,
    fetched: [AtomicU64; 3],
    /// In the order of [`Via::ALL`].
    fetched_via: [AtomicU64; 2],
    /// Under which rights its bytes came here; read from disk when first asked for.
    scopes: Mutex<Option<BTreeSet<Scope>>>,
    /// A piece has arrived.
    pub(crate) arrived: Notify,
    shared: Shared,
}

/// What all blobs of a cache use.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub fetcher: Arc<Fetcher>,
    pub space: Arc<Space>,
    pub metrics: Metrics,
    pub deadline: Duration,
    pub read_ahead_bytes: u64,
}

/// Replaced as a whole when the bytes are distrusted.
#[derive(Clone, Debug)]
struct Content {
    pieces: Arc<Pieces>,
    table: Option<Arc<PieceTable>>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("open blob {digest} in {}", dir.display())]
    Open { digest: Digest, dir: PathBuf, source: io::Error },
    #[error("blob {digest} is said to be {claimed} bytes long, but is known as {known} bytes")]
    Length { digest: Digest, claimed: u64, known: u64 },
    #[error(
        "blob {digest} is said to be {claimed} bytes long; the most supported is {}",
        Geometry::MAX_BLOB_LEN
    )]
    TooLong { digest: Digest, claimed: u64 },
    #[error("blob {digest} has no piece table, so its pieces can't be verified one by one")]
    NoTable { digest: Digest },
    #[error("piece table of {table}, {table_len} bytes, doesn't fit blob {digest}, {len} bytes")]
    ForeignTable { digest: Digest, len: u64, table: Digest, table_len: u64 },
    #[error("blob {digest} lacks {missing} of its pieces")]
    Incomplete { digest: Digest, missing: usize },
    #[error("blob {digest} could not be fetched")]
    Fetch { digest: Digest, source: Arc<FetchError> },
    #[error(
        "piece {piece} of blob {digest} from {from} doesn't match its digest, every time it was fetched"
    )]
    Wrong { digest: Digest, piece: u32, from: &'static str },
    #[error("blob {digest} could not be fetched within {} s", waited.as_secs())]
    Deadline { digest: Digest, waited: Duration, source: Option<Arc<FetchError>> },
    #[error("write piece {piece} of blob {digest}{}", advice(source))]
    Write { digest: Digest, piece: u32, source: Arc<io::Error> },
    #[error("read piece {piece} of blob {digest}")]
    Read { digest: Digest, piece: u32, source: io::Error },
    #[error("the bytes of blob {digest} have the digest {actual}, every time they were fetched")]
    Digest { digest: Digest, actual: Digest },
    #[error("forget the bytes of blob {digest}")]
    Distrust { digest: Digest, source: io::Error },
    #[error("write the checkpoint of blob {digest}")]
    Checkpoint { digest: Digest, source: io::Error },
}

fn advice(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::StorageFull {
        ": the file system is full and nothing more can be evicted"
    } else {
        ""
    }
}

impl Error {
    /// The source's own account, where one failed.
    pub fn fetch_error(&self) -> Option<&FetchError> {
        match self {
            Self::Fetch { source, .. } | Self::Deadline { source: Some(source), .. } => {
                Some(source)
            }
            _ => None,
        }
    }

    /// Whether the same call may succeed later without anybody's doing.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Deadline { .. } => true,
            Self::Fetch { source, .. } => source.retryable,
            _ => false,
        }
    }
}

impl Blob {
    pub(crate) fn open(dir: &Path, blob: BlobRef, shared: Shared) -> Result<Self, Error> {
        let digest = blob.digest;
        let too_long = Error::TooLong { digest, claimed: blob.len };
        let geometry = Geometry::of(blob.len).ok_or(too_long)?;
        let failed = |source| Error::Open { digest, dir: dir.to_owned(), source };
        match Pieces::stored_len(dir).map_err(failed)? {
            Some((known, true)) if known != blob.len => {
                return Err(Error::Length { digest, claimed: blob.len, known });
            }
            _ => {}
        }
        let pieces = Arc::new(Pieces::open(dir, geometry).map_err(failed)?);
        Ok(Self {
            id: shared.fetcher.blob_id(),
            digest,
            kind: blob.kind,
            geometry,
            dir: dir.to_owned(),
            replacing: tokio::sync::Mutex::default(),
            origins: Mutex::new(blob.origins),
            content: RwLock::new(Content { pieces, table: None }),
            fetched: Default::default(),
            fetched_via: Default::default(),
            scopes: Mutex::default(),
            arrived: Notify::new(),
            shared,
        })
    }

    pub const fn digest(&self) -> Digest {
        self.digest
    }

    pub const fn len(&self) -> u64 {
        self.geometry.blob_len()
    }

    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub fn table(&self) -> Option<Arc<PieceTable>> {
        self.content().table
    }

    /// Gives the blob a table that the caller trusts. Pieces verified against another one count as
    /// unverified from now on.
    pub fn set_table(&self, table: Arc<PieceTable>) -> Result<(), Error> {
        self.fits(&table)?;
        let mut content = self.content.write().unwrap_or_else(PoisonError::into_inner);
        content.pieces.verify_against(*table.root());
        content.table = Some(table);
        Ok(())
    }

    /// Whether every byte is on disk, verified or not.
    pub fn is_complete(&self) -> bool {
        self.pieces().present.all()
    }

    /// Whether every byte is on disk and matches a piece table that was trusted.
    pub fn is_verified(&self) -> bool {
        let pieces = self.pieces();
        pieces.present.all() && pieces.verified().bits.all()
    }

    /// Bytes on disk, verified or not.
    pub fn bytes_present(&self) -> u64 {
        let present = &self.pieces().present;
        let last = self.geometry.pieces().saturating_sub(1);
        let short = self.geometry.piece_len() * u64::from(self.geometry.pieces()) - self.len();
        let full = present.ones() as u64 * self.geometry.piece_len();
        if present.get(last as usize) { full - short } else { full }
    }

    /// Bytes received since the blob was opened, in the order of [`Class::ALL`].
    pub fn fetched(&self) -> [u64; 3] {
        self.fetched.each_ref().map(|bytes| bytes.load(Ordering::Relaxed))
    }

    /// The same bytes, in the order of [`Via::ALL`].
    pub fn fetched_via(&self) -> [u64; 2] {
        self.fetched_via.each_ref().map(|bytes| bytes.load(Ordering::Relaxed))
    }

    /// Returns when the pieces that `range` touches are on disk and verified. Fetches what is
    /// absent; retries within the cache's deadline. Cancelling it is safe: what has been asked for
    /// goes on, and is kept.
    pub async fn ensure(self: &Arc<Self>, range: Range<u64>, class: Class) -> Result<(), Error> {
        let table = self.table().ok_or(Error::NoTable { digest: self.digest })?;
        self.ensure_by(Some(&table), range, class).await
    }

    /// Like [`Self::ensure`], for a caller that checks the bytes by other means: unverified ones will
    /// do, and go on counting as such. What turns out wrong is to be [forgotten](Self::forget).
    pub async fn ensure_unverified(
        self: &Arc<Self>,
        range: Range<u64>,
        class: Class,
    ) -> Result<(), Error> {
        self.ensure_by(None, range, class).await
    }

    async fn ensure_by(
        self: &Arc<Self>,
        table: Option<&Arc<PieceTable>>,
        range: Range<u64>,
        class: Class,
    ) -> Result<(), Error> {
        let all = self.geometry.covering(range);
        if self.pieces().have(all.clone(), table) {
            return Ok(());
        }
        let began = Instant::now();
        let step = u32::try_from(ENSURE_STEP / self.geometry.piece_len()).unwrap_or(1).max(1);
        for first in all.clone().step_by(step as usize) {
            self.ensure_pieces(table, first..all.end.min(first + step), class).await?;
        }
        if class == Class::Fault {
            self.shared.metrics.fault_wait.observe(began.elapsed().as_secs_f64());
        }
        Ok(())
    }

    async fn ensure_pieces(
        self: &Arc<Self>,
        table: Option<&Arc<PieceTable>>,
        range: Range<u32>,
        class: Class,
    ) -> Result<(), Error> {
        loop {
            let pieces = self.pieces();
            if pieces.have(range.clone(), table) {
                return Ok(());
            }
            if let Some(table) = table {
                self.recheck(&pieces, table, range.clone()).await?;
            }
            // A piece may come in unverified, fetched before there was a table: hence the loop.
            self.want(range.clone(), class).wait().await.map_err(|f| self.failed(f))?;
        }
    }

    /// The unverified pieces that `range` touches are wrong: they count as absent from now on.
    pub fn forget(&self, range: Range<u64>) {
        let pieces = self.pieces();
        self.geometry.covering(range).for_each(|piece| pieces.forget(piece));
    }

    /// Verifies what came before there was a table.
    async fn recheck(
        &self,
        pieces: &Arc<Pieces>,
        table: &Arc<PieceTable>,
        range: Range<u32>,
    ) -> Result<(), Error> {
        for piece in range {
            if !pieces.present.get(piece as usize) || pieces.is_verified(piece, table) {
                continue;
            }
            let (checking, table) = (Arc::clone(pieces), Arc::clone(table));
            let checked = spawn_blocking(move || checking.recheck(piece, &table)).await;
            let checked = checked
                .unwrap_or_else(|error| Err(io::Error::other(error)))
                .map_err(|source| Error::Read { digest: self.digest, piece, source })?;
            let replaced = !Arc::ptr_eq(pieces, &self.pieces());
            if checked == Checked::Sealed && !replaced {
                return self.start_over(self.table()).await;
            }
            if replaced {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Reads bytes that [`Self::ensure`] has made sure of. Blocks on the disk.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.pieces().file.read_exact_at(buffer, offset)
    }

    /// Streams the whole blob in order, fetching what is absent with several connections. What is
    /// on disk from earlier attempts isn't fetched again. The bytes are verified only where a table
    /// is set: the caller checks the whole, then calls [`Self::prove`] or [`Self::distrust`].
    pub fn pull_through(self: &Arc<Self>, class: Class) -> PullThrough {
        PullThrough::new(Arc::clone(self), class, self.shared.read_ahead_bytes)
    }

    /// Everything present is as `table` says: the caller has read the whole blob and matched its
    /// SHA-256 and DiffID. Reaches disk with the next checkpoint, which starts at once.
    pub fn prove(self: &Arc<Self>, table: PieceTable) -> Result<(), Error> {
        self.fits(&table)?;
        let mut content = self.content.write().unwrap_or_else(PoisonError::into_inner);
        let pieces = &content.pieces;
        if !pieces.present.all() {
            let missing = pieces.present.len() - pieces.present.ones();
            return Err(Error::Incomplete { digest: self.digest, missing });
        }
        pieces.all_verified(*table.root());
        let table = Arc::new(table);
        content.table = Some(Arc::clone(&table));
        drop(content);
        self.shared.space.upkeep.notify_one();
        if let Some(source) = self.shared.fetcher.piece_source() {
            source.proved(self, &table);
        }
        Ok(())
    }

    /// The whole didn't match: forgets every byte, and the table.
    pub async fn distrust(&self) -> Result<(), Error> {
        if let Some(source) = self.shared.fetcher.piece_source() {
            source.disproved(&self.reference());
        }
        self.start_over(None).await
    }

    /// Another data file, empty, under the same name.
    async fn start_over(&self, table: Option<Arc<PieceTable>>) -> Result<(), Error> {
        let _turn = self.replacing.lock().await;
        let old = self.pieces();
        let fresh = spawn_blocking(move || old.replace()).await;
        let pieces = fresh
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| Error::Distrust { digest: self.digest, source })?;
        let mut content = self.content.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = &table {
            pieces.verify_against(*table.root());
        }
        *content = Content { pieces: Arc::new(pieces), table };
        drop(content);
        if let Some(source) = self.shared.fetcher.piece_source() {
            source.forgotten(self.digest);
        }
        Ok(())
    }

    /// Evicts something, after a write of what the blob decodes to failed with "no space left on
    /// device". The caller then tries once more.
    pub async fn make_room(&self) {
        self.shared.space.make_room().await;
    }

    /// Records on disk what is present. Blocks.
    pub(crate) fn checkpoint(&self) -> Result<(), Error> {
        let digest = self.digest;
        self.pieces().checkpoint().map_err(|source| Error::Checkpoint { digest, source })
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.pieces().is_dirty()
    }

    /// Somebody else wants the same blob, perhaps from elsewhere.
    pub(crate) fn add_origins(&self, origins: Vec<Origin>) {
        let mut known = self.origins();
        for origin in origins.into_iter().rev() {
            known.retain(|other| *other != origin);
            known.insert(0, origin);
        }
        known.truncate(MAX_ORIGINS);
    }

    /// What it is and where it may be had, as far as is known here.
    pub fn reference(&self) -> BlobRef {
        let origins = self.origins().clone();
        BlobRef { digest: self.digest, len: self.len(), kind: self.kind, origins }
    }

    pub(crate) fn pieces(&self) -> Arc<Pieces> {
        self.content().pieces
    }

    pub(crate) fn count(&self, class: Class, via: Via, bytes: usize) {
        self.fetched[class as usize].fetch_add(bytes as u64, Ordering::Relaxed);
        self.fetched_via[via as usize].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn want(self: &Arc<Self>, range: Range<u32>, class: Class) -> crate::fetch::Ticket {
        self.shared.fetcher.want(self, class, || {
            let pieces = self.pieces();
            range.filter(|piece| !pieces.present.get(*piece as usize)).collect()
        })
    }

    fn content(&self) -> Content {
        self.content.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn origins(&self) -> MutexGuard<'_, Vec<Origin>> {
        self.origins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fits(&self, table: &PieceTable) -> Result<(), Error> {
        if table.blob == self.digest && table.geometry == self.geometry {
            return Ok(());
        }
        let (len, table_len) = (self.len(), table.geometry.blob_len());
        Err(Error::ForeignTable { digest: self.digest, len, table: table.blob, table_len })
    }

    fn failed(&self, failure: Failure) -> Error {
        let digest = self.digest;
        let fetch_error = match failure.cause {
            Some(Cause::Write { piece, source }) => return Error::Write { digest, piece, source },
            Some(Cause::Wrong { from }) if let Why::Wrong { piece } = failure.why => {
                return Error::Wrong { digest, piece, from };
            }
            Some(Cause::Fetch(error)) => Some(error),
            _ => None,
        };
        match (failure.why, fetch_error) {
            (Why::Refused, Some(source)) => Error::Fetch { digest, source },
            (_, source) => Error::Deadline { digest, waited: self.shared.deadline, source },
        }
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        self.shared.fetcher.forget(self.id);
    }
}
