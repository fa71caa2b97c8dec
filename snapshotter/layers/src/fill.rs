//! Fills the gaps of a layer's data file: the blob's bytes, decoded chunk by chunk to their place.
//!
//! Owns: which chunks are being decoded, and by how many at once.
//! Does not own: the blob's bytes and the chunk bitmap (the cache's); the index (read-only).
//!
//! Invariants:
//! - A chunk is decoded by one job at a time, whoever asks; a job goes on when the asker is gone.
//! - A chunk is marked present after its bytes, and what the overflow area has of them, are written.
//! - Nothing is marked that hasn't been verified: the pieces before they are decoded or, where the
//!   blob has no piece table, what the chunk decoded to (see [`Proof`]).
//! - Once a fill is [condemned](Fill::condemn), nobody reads by it any more.

mod decoders;
mod lies;
mod mend;
mod streak;
mod write;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, join_all};
use sha2::{Digest as _, Sha256};
use skimmer_cache::{Blob, Class, LayerData, Spans};
use skimmer_index::index::LayerIndex;
use skimmer_proto::Digest;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use crate::metrics::Metrics;
pub use decoders::Decoders;
use decoders::Turn;
use lies::Lies;
pub use mend::{Mended, readable, same_within};
use streak::Streak;
use write::Writer;
pub use write::copy_within;

/// How much of the blob is read at a time, and how much is decoded. The decoder copies its last 32 KiB each time.
const STEP_BYTES: usize = 256 << 10;
const ROOM_BYTES: usize = 768 << 10;

/// No chunk.
const NOTHING: usize = usize::MAX;

/// Pauses between attempts to get bytes that a reader waits for: doubled up to the last.
const PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why a chunk could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("fetch the bytes of chunk {chunk}")]
    Fetch { chunk: usize, source: skimmer_cache::blob::Error },
    #[error("read the blob for chunk {chunk}")]
    Read { chunk: usize, source: io::Error },
    #[error("decode chunk {chunk}: the index does not fit the blob")]
    Decode { chunk: usize, source: skimmer_index::codec::Error },
    #[error(
        "chunk {chunk} decodes to bytes with the digest {actual}, the table of contents inside the \
         blob says {expected}"
    )]
    Content { chunk: usize, expected: Digest, actual: Digest },
    #[error("read chunk {chunk} from the data file")]
    ReadData { chunk: usize, source: io::Error },
    #[error("write chunk {chunk} to the data file")]
    Write { chunk: usize, source: io::Error },
    #[error("decoding chunk {chunk} was interrupted")]
    Interrupted { chunk: usize },
    #[error("the bytes did not come before the deadline")]
    Late,
    #[error("the layer turned out not to be what it was mounted for; start its containers anew")]
    Condemned,
}

impl Error {
    /// Whether the bytes that came aren't those that should.
    const fn is_wrong(&self) -> bool {
        matches!(self, Self::Decode { .. } | Self::Content { .. })
    }

    fn is_disk_full(&self) -> bool {
        matches!(self, Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    }
}

/// What one chunk's job came to; many may wait for it.
type Done = Shared<BoxFuture<'static, Result<(), Arc<Error>>>>;

/// Why a chunk is gotten.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Somebody waits for it, or for the whole layer.
    Wanted(Class),
    /// A reader is about to come to it.
    Ahead,
}

/// A chunk that is being gotten.
#[derive(Clone)]
struct Job {
    /// What it was begun for.
    class: Class,
    /// Told when a reader waits for it.
    urged: Arc<Notify>,
    done: Done,
}

impl Purpose {
    /// In what order its bytes are fetched.
    const fn class(self) -> Class {
        match self {
            Self::Wanted(class) => class,
            Self::Ahead => Class::Background,
        }
    }
}

/// What the bytes of a chunk are verified by.
#[derive(Debug)]
pub enum Proof {
    /// The blob's piece table.
    Pieces,
    /// SHA-256 of what each chunk decodes to: the blob has no piece table yet.
    Chunks(Vec<Digest>),
}

/// The gaps of one layer.
pub struct Fill {
    blob: Arc<Blob>,
    data: Arc<LayerData>,
    index: LayerIndex,
    proof: Proof,
    deadline: Duration,
    turn: Turn,
    metrics: Arc<Metrics>,
    runtime: Handle,
    jobs: Mutex<BTreeMap<usize, Job>>,
    streak: Mutex<Streak>,
    /// The first chunk that was decoded ahead and that nobody has come to; [`NOTHING`] if there is none.
    foreseen: AtomicUsize,
    lies: Mutex<Lies>,
    condemned: AtomicBool,
}

impl Fill {
    /// Must be called within a tokio runtime, which will run the jobs.
    pub fn new(
        blob: Arc<Blob>,
        data: Arc<LayerData>,
        index: LayerIndex,
        proof: Proof,
        deadline: Duration,
        decoders: &Decoders,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            blob,
            data,
            index,
            proof,
            deadline,
            turn: decoders.turn(),
            metrics,
            runtime: Handle::current(),
            jobs: Mutex::default(),
            streak: Mutex::default(),
            foreseen: AtomicUsize::new(NOTHING),
            lies: Mutex::default(),
            condemned: AtomicBool::new(false),
        }
    }

    pub const fn index(&self) -> &LayerIndex {
        &self.index
    }

    pub const fn data(&self) -> &Arc<LayerData> {
        &self.data
    }

    pub const fn blob(&self) -> &Arc<Blob> {
        &self.blob
    }

    /// The layer is wrong: from now on reads by this fill fail, also of bytes that are there. Waits for
    /// those under way.
    pub fn condemn(&self) {
        self.condemned.store(true, Ordering::Release);
        self.data.settle();
    }

    fn is_condemned(&self) -> bool {
        self.condemned.load(Ordering::Acquire)
    }

    /// Somebody reads `range` of the data file: what is there of it stays.
    pub fn touch(self: &Arc<Self>, range: &Range<u64>) {
        if self.data.complete() {
            return;
        }
        for chunk in self.index.chunks_covering(range.clone()).into_iter().flatten() {
            self.data.touch(chunk);
            if self.foreseen().contains(&chunk) {
                // What was decoded ahead is being read: nobody waits for it, and the next is worth it too.
                self.read_ahead(&[chunk]);
            }
        }
    }

    /// Whether `range` of the data file can be read. True for as long as the data file is held.
    pub fn has(&self, range: &Range<u64>) -> bool {
        if self.is_condemned() {
            return false;
        }
        self.data.complete()
            || self.index.chunks_covering(range.clone()).into_iter().all(|run| self.has_run(run))
    }

    fn has_run(&self, run: Range<usize>) -> bool {
        run.into_iter().all(|chunk| self.data.has(chunk))
    }

    /// A reader waits for `ranges` of the data file. Completes when they are there, or fails when
    /// the deadline has passed.
    pub async fn fault(self: &Arc<Self>, ranges: &[Range<u64>]) -> Result<(), Arc<Error>> {
        if self.is_condemned() {
            return Err(Arc::new(Error::Condemned));
        }
        let covering = ranges.iter().flat_map(|range| self.index.chunks_covering(range.clone()));
        let mut missing: Vec<usize> =
            covering.flatten().filter(|chunk| !self.data.has(*chunk)).collect();
        missing.sort_unstable();
        missing.dedup();
        self.read_ahead(&missing);
        self.get(missing, Class::Fault).await
    }

    /// Gets the chunks of `run` that are missing.
    pub async fn run(self: &Arc<Self>, run: Range<usize>, class: Class) -> Result<(), Arc<Error>> {
        self.get(run.filter(|chunk| !self.data.has(*chunk)).collect(), class).await
    }

    async fn get(self: &Arc<Self>, chunks: Vec<usize>, class: Class) -> Result<(), Arc<Error>> {
        join_all(chunks.into_iter().map(|chunk| self.get_one(chunk, class)))
            .await
            .into_iter()
            .collect()
    }

    /// Waits for the job that gets `chunk`. One that was begun for less gives up sooner: then it is begun anew.
    async fn get_one(self: &Arc<Self>, chunk: usize, class: Class) -> Result<(), Arc<Error>> {
        loop {
            let job = self.job(chunk, Purpose::Wanted(class));
            match job.done.await {
                Err(error) if class < job.class && !error.is_wrong() && !self.is_condemned() => {}
                done => return done,
            }
        }
    }

    /// The chunks that have been decoded ahead and nobody has come to. Cheap: it is asked at each read.
    fn foreseen(&self) -> Range<usize> {
        let first = self.foreseen.load(Ordering::Relaxed);
        first..first.saturating_add(streak::AHEAD)
    }

    /// Starts on the chunks after `wanted` if a reader got to `wanted` by reading on.
    fn read_ahead(self: &Arc<Self>, wanted: &[usize]) {
        let (Some(first), Some(last)) = (wanted.first(), wanted.last()) else { return };
        let ahead = {
            let mut streak = self.streak.lock().unwrap_or_else(PoisonError::into_inner);
            let ahead = streak.extend(*first..last + 1);
            self.foreseen.store(streak.foreseen().unwrap_or(NOTHING), Ordering::Relaxed);
            ahead
        };
        let end = self.index.chunks.len().min(last + 1 + ahead);
        for chunk in (last + 1..end).filter(|chunk| !self.data.has(*chunk)) {
            // It runs by itself; whoever comes to need the chunk learns what became of it.
            drop(self.job(chunk, Purpose::Ahead));
        }
    }

    /// The job that gets `chunk`, started if there is none.
    fn job(self: &Arc<Self>, chunk: usize, purpose: Purpose) -> Job {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = jobs.get(&chunk) {
            if purpose == Purpose::Wanted(Class::Fault) {
                job.urged.notify_one();
                self.hurry(chunk);
            }
            return job.clone();
        }
        let (class, urged) = (purpose.class(), Arc::new(Notify::new()));
        if let Some(error) = self.lies().of(chunk, Instant::now()) {
            let done = std::future::ready(Err(error)).boxed().shared();
            return Job { class, urged, done };
        }
        if purpose == Purpose::Ahead {
            urged.notify_one();
        }
        let (this, told) = (Arc::clone(self), Arc::clone(&urged));
        let running = self.runtime.spawn(async move {
            let result = this.fetch_and_decode(chunk, class, &told).await.map_err(Arc::new);
            if let Err(error) = &result
                && error.is_wrong()
                && this.is_unvouched()
            {
                this.lies().note(chunk, Instant::now(), Arc::clone(error));
            }
            this.jobs.lock().unwrap_or_else(PoisonError::into_inner).remove(&chunk);
            result
        });
        let ended = move |joined: Result<_, _>| {
            joined.unwrap_or_else(|_| Err(Arc::new(Error::Interrupted { chunk })))
        };
        let job = Job { class, urged, done: running.map(ended).boxed().shared() };
        jobs.insert(chunk, job.clone());
        job
    }

    /// Tells the cache that a reader now waits for what an earlier job asked for at its leisure.
    fn hurry(self: &Arc<Self>, chunk: usize) {
        let this = Arc::clone(self);
        self.runtime.spawn(async move {
            // The job that waits for the same bytes reports the error.
            let _ = this.ensure(chunk, Class::Fault).await;
        });
    }

    async fn fetch_and_decode(
        self: &Arc<Self>,
        chunk: usize,
        class: Class,
        urged: &Notify,
    ) -> Result<(), Error> {
        let done = self.attempt(chunk, class, urged).await;
        if !done.as_ref().is_err_and(Error::is_wrong) || !self.is_unvouched() {
            return done;
        }
        // Nothing had vouched for the bytes: the next ones may be better.
        self.blob.forget(self.index.chunks[chunk].blob.clone());
        self.attempt(chunk, class, urged).await
    }

    /// Whether nothing vouches for the blob's bytes before they are decoded.
    const fn is_unvouched(&self) -> bool {
        matches!(self.proof, Proof::Chunks(_))
    }

    fn lies(&self) -> std::sync::MutexGuard<'_, Lies> {
        self.lies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn attempt(
        self: &Arc<Self>,
        chunk: usize,
        class: Class,
        urged: &Notify,
    ) -> Result<(), Error> {
        let started = Instant::now();
        let mut pause = PAUSE;
        self.fetch(chunk, class).await?;
        loop {
            let error = match self.decode_in_turn(chunk, class, urged).await {
                Err(error) if error.is_disk_full() => error,
                decoded => return decoded,
            };
            self.blob.make_room().await;
            if let decoded @ Ok(()) = self.decode_in_turn(chunk, class, urged).await {
                return decoded;
            }
            if class != Class::Fault || started.elapsed() + pause > self.deadline {
                return Err(error);
            }
            // Others may remove what fills the disk, and a reader has time.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn decode_in_turn(
        self: &Arc<Self>,
        chunk: usize,
        class: Class,
        urged: &Notify,
    ) -> Result<(), Error> {
        let interrupted = || Error::Interrupted { chunk };
        let turn = self.turn.take(class, urged).await.ok_or_else(interrupted)?;
        let this = Arc::clone(self);
        let decoded = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            this.decode(chunk)
        });
        decoded.await.map_err(|_| interrupted())?
    }

    /// Has the blob's bytes of `chunk` on disk, trying again until the deadline if a reader waits.
    pub async fn fetch(&self, chunk: usize, class: Class) -> Result<(), Error> {
        let started = Instant::now();
        let mut pause = PAUSE;
        loop {
            let source = match self.ensure(chunk, class).await {
                Ok(()) => return Ok(()),
                Err(source) => source,
            };
            if class != Class::Fault || started.elapsed() + pause > self.deadline {
                return Err(Error::Fetch { chunk, source });
            }
            tracing::debug!(blob = %self.blob.digest(), chunk, "bytes for a reader failed to come, trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn ensure(&self, chunk: usize, class: Class) -> Result<(), skimmer_cache::blob::Error> {
        let range = self.index.chunks[chunk].blob.clone();
        match self.proof {
            Proof::Pieces => self.blob.ensure(range, class).await,
            Proof::Chunks(_) => self.blob.ensure_unverified(range, class).await,
        }
    }

    /// Decodes `chunk` from the blob on disk to its place in the data file.
    fn decode(&self, chunk: usize) -> Result<(), Error> {
        let _hold = self.data.hold();
        if self.data.has(chunk) {
            return Ok(());
        }
        let write_failed = |source| Error::Write { chunk, source };
        let mut out = Writer::new(self.data.file(), self.index.chunks[chunk].data.start);
        self.decode_into(chunk, &mut |bytes| out.push(bytes))?;
        out.finish().map_err(write_failed)?;
        for copy in self.index.copies_from(chunk) {
            copy_within(self.data.file(), copy).map_err(write_failed)?;
        }
        self.data.mark(chunk);
        self.metrics.chunks.inc();
        Ok(())
    }

    /// Decodes `chunk` from the blob on disk.
    fn decode_into(&self, chunk: usize, out: &mut dyn FnMut(&[u8])) -> Result<(), Error> {
        let failed = |source| Error::Decode { chunk, source };
        let span = &self.index.chunks[chunk];
        let mut decoder = self.turn.idle.take().unwrap_or_default();
        decoder.enter(&self.index, chunk).map_err(failed)?;
        let expected = match &self.proof {
            Proof::Pieces => None,
            Proof::Chunks(digests) => digests.get(chunk).copied(),
        };
        let mut hash = Sha256::new();
        let mut take = |bytes: &[u8]| {
            if expected.is_some() {
                hash.update(bytes);
            }
            out(bytes);
        };
        self.turn.buffers.with(STEP_BYTES + ROOM_BYTES, |buffer| {
            let (compressed, room) = buffer.split_at_mut(STEP_BYTES);
            let mut at = span.blob.start;
            while at < span.blob.end {
                let left = usize::try_from(span.blob.end - at).unwrap_or(usize::MAX);
                let step = &mut compressed[..left.min(STEP_BYTES)];
                self.blob.read_at(step, at).map_err(|source| Error::Read { chunk, source })?;
                decoder.push(step, room, &mut take).map_err(failed)?;
                at += step.len() as u64;
            }
            Ok(())
        })?;
        decoder.finish().map_err(failed)?;
        self.turn.idle.keep(decoder);
        let actual = Digest::from_bytes(hash.finalize().into());
        match expected {
            Some(expected) if expected != actual => Err(Error::Content { chunk, expected, actual }),
            _ => Ok(()),
        }
    }
}

impl Spans for Fill {
    fn spans(&self, chunk: usize) -> Vec<Range<u64>> {
        let own = self.index.chunks.get(chunk).map(|chunk| chunk.data.clone());
        let copies = self.index.copies_from(chunk).into_iter();
        own.into_iter().chain(copies.map(|copy| copy.to..copy.to + copy.len)).collect()
    }
}
