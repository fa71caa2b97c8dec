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

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, join_all};
use sha2::{Digest as _, Sha256};
use skimmer_cache::{Blob, Class, LayerData};
use skimmer_index::chunk::ChunkDecoder;
use skimmer_index::erofs::Copy;
use skimmer_index::index::LayerIndex;
use skimmer_proto::Digest;
use tokio::sync::Semaphore;

use crate::metrics::Metrics;
use crate::sparse;

/// How much of the blob is read, and decoded, at a time.
const STEP_BYTES: usize = 256 << 10;

/// Chunks decoded ahead of a reader that reads on and on, at most.
const AHEAD: usize = 4;

/// Chunks that a reader has to wait for one after the other before one more is decoded ahead. Most
/// files end sooner: the chunks behind them are somebody else's.
const STREAK: usize = 3;

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
    #[error("write chunk {chunk} to the data file")]
    Write { chunk: usize, source: io::Error },
    #[error("decoding chunk {chunk} was interrupted")]
    Interrupted { chunk: usize },
}

impl Error {
    fn is_disk_full(&self) -> bool {
        matches!(self, Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    }
}

/// What one chunk's job came to; many may wait for it.
type Job = Shared<BoxFuture<'static, Result<(), Arc<Error>>>>;

/// How jobs of all layers share the processors.
#[derive(Debug)]
pub struct Decoders {
    /// Readers wait.
    urgent: Arc<Semaphore>,
    /// Nobody waits: leaves room for those who do.
    background: Arc<Semaphore>,
}

impl Decoders {
    pub fn new(processors: usize) -> Self {
        Self {
            urgent: Arc::new(Semaphore::new(processors.max(1))),
            background: Arc::new(Semaphore::new((processors / 2).max(1))),
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
    decoders: Arc<Decoders>,
    metrics: Arc<Metrics>,
    jobs: Mutex<BTreeMap<usize, Job>>,
    streak: Mutex<Streak>,
}

impl Fill {
    pub fn new(
        blob: Arc<Blob>,
        data: Arc<LayerData>,
        index: LayerIndex,
        proof: Proof,
        deadline: Duration,
        decoders: Arc<Decoders>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            blob,
            data,
            index,
            proof,
            deadline,
            decoders,
            metrics,
            jobs: Mutex::default(),
            streak: Mutex::default(),
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

    /// Whether `range` of the data file can be read.
    pub fn has(&self, range: &Range<u64>) -> bool {
        self.data.complete()
            || self.index.chunks_covering(range.clone()).into_iter().all(|run| self.has_run(run))
    }

    fn has_run(&self, run: Range<usize>) -> bool {
        run.into_iter().all(|chunk| self.data.has(chunk))
    }

    /// A reader waits for `ranges` of the data file. Completes when they are there, or fails when
    /// the deadline has passed.
    pub async fn fault(self: &Arc<Self>, ranges: &[Range<u64>]) -> Result<(), Arc<Error>> {
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
        let jobs: Vec<Job> = chunks.into_iter().map(|chunk| self.job(chunk, class)).collect();
        join_all(jobs).await.into_iter().collect()
    }

    /// Starts on the chunks after `wanted` if a reader got to `wanted` by reading on.
    fn read_ahead(self: &Arc<Self>, wanted: &[usize]) {
        let (Some(first), Some(last)) = (wanted.first(), wanted.last()) else { return };
        let ahead = {
            let mut streak = self.streak.lock().unwrap_or_else(PoisonError::into_inner);
            streak.extend(*first..last + 1)
        };
        let end = self.index.chunks.len().min(last + 1 + ahead);
        for chunk in (last + 1..end).filter(|chunk| !self.data.has(*chunk)) {
            // It runs by itself; whoever comes to need the chunk learns what became of it.
            drop(self.job(chunk, Class::Background));
        }
    }

    /// The job that gets `chunk`, started if there is none.
    fn job(self: &Arc<Self>, chunk: usize, class: Class) -> Job {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = jobs.get(&chunk) {
            if class == Class::Fault {
                self.hurry(chunk);
            }
            return job.clone();
        }
        let this = Arc::clone(self);
        let running = tokio::spawn(async move {
            let result = this.fetch_and_decode(chunk, class).await;
            this.jobs.lock().unwrap_or_else(PoisonError::into_inner).remove(&chunk);
            result.map_err(Arc::new)
        });
        let ended = move |joined: Result<_, _>| {
            joined.unwrap_or_else(|_| Err(Arc::new(Error::Interrupted { chunk })))
        };
        let job = running.map(ended).boxed().shared();
        jobs.insert(chunk, job.clone());
        job
    }

    /// Tells the cache that a reader now waits for what an earlier job asked for at its leisure.
    fn hurry(self: &Arc<Self>, chunk: usize) {
        let this = Arc::clone(self);
        tokio::spawn(async move {
            // The job that waits for the same bytes reports the error.
            let _ = this.ensure(chunk, Class::Fault).await;
        });
    }

    async fn fetch_and_decode(self: &Arc<Self>, chunk: usize, class: Class) -> Result<(), Error> {
        let done = self.attempt(chunk, class).await;
        let wrong = matches!(done, Err(Error::Decode { .. } | Error::Content { .. }));
        if !wrong || matches!(self.proof, Proof::Pieces) {
            return done;
        }
        // Nothing had vouched for the bytes: the next ones may be better.
        self.blob.forget(self.index.chunks[chunk].blob.clone());
        self.attempt(chunk, class).await
    }

    async fn attempt(self: &Arc<Self>, chunk: usize, class: Class) -> Result<(), Error> {
        self.fetch(chunk, class).await?;
        match self.decode_in_turn(chunk, class).await {
            Err(error) if error.is_disk_full() => {
                self.blob.make_room().await;
                self.decode_in_turn(chunk, class).await
            }
            decoded => decoded,
        }
    }

    async fn decode_in_turn(self: &Arc<Self>, chunk: usize, class: Class) -> Result<(), Error> {
        let decoders = match class {
            Class::Background => &self.decoders.background,
            Class::Fault | Class::PullThrough => &self.decoders.urgent,
        };
        let interrupted = || Error::Interrupted { chunk };
        let permit = Arc::clone(decoders).acquire_owned().await.map_err(|_| interrupted())?;
        let this = Arc::clone(self);
        let decoded = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            this.decode(chunk)
        });
        decoded.await.map_err(|_| interrupted())?
    }

    /// Has the blob's bytes of `chunk` on disk, trying again until the deadline if a reader waits.
    async fn fetch(&self, chunk: usize, class: Class) -> Result<(), Error> {
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
        if self.data.has(chunk) {
            return Ok(());
        }
        let failed = |source| Error::Decode { chunk, source };
        let write_failed = |source| Error::Write { chunk, source };
        let span = &self.index.chunks[chunk];
        let mut decoder = ChunkDecoder::new(&self.index, chunk).map_err(failed)?;
        let expected = match &self.proof {
            Proof::Pieces => None,
            Proof::Chunks(digests) => digests.get(chunk).copied(),
        };
        let mut hash = Sha256::new();
        let mut out = Writer::new(self.data.file(), span.data.start);
        let mut take = |bytes: &[u8]| {
            if expected.is_some() {
                hash.update(bytes);
            }
            out.push(bytes);
        };
        let mut compressed = vec![0; STEP_BYTES];
        let mut at = span.blob.start;
        while at < span.blob.end {
            let left = usize::try_from(span.blob.end - at).unwrap_or(usize::MAX);
            let step = &mut compressed[..left.min(STEP_BYTES)];
            self.blob.read_at(step, at).map_err(|source| Error::Read { chunk, source })?;
            decoder.push(step, &mut take).map_err(failed)?;
            at += step.len() as u64;
        }
        decoder.finish().map_err(failed)?;
        let actual = Digest::from_bytes(hash.finalize().into());
        if let Some(expected) = expected
            && expected != actual
        {
            return Err(Error::Content { chunk, expected, actual });
        }
        out.finish().map_err(write_failed)?;
        for copy in self.index.copies_from(chunk) {
            copy_within(self.data.file(), copy).map_err(write_failed)?;
        }
        self.data.mark(chunk);
        self.metrics.chunks.inc();
        Ok(())
    }
}

/// The chunks, one behind the other, that readers waited for last.
#[derive(Debug, Default)]
struct Streak {
    chunks: Range<usize>,
}

impl Streak {
    /// Readers now wait for `run`: how many chunks behind it are worth decoding ahead.
    fn extend(&mut self, run: Range<usize>) -> usize {
        // Several reads wait for one chunk, and nobody waits for what was decoded ahead.
        let reach = self.chunks.start..=self.chunks.end + self.ahead();
        if !self.chunks.is_empty() && reach.contains(&run.start) {
            self.chunks.end = run.end.max(self.chunks.end);
        } else {
            self.chunks = run;
        }
        self.ahead()
    }

    fn ahead(&self) -> usize {
        self.chunks.len().saturating_sub(STREAK).min(AHEAD)
    }
}

/// Collects decoded bytes into large writes at consecutive offsets.
pub struct Writer<'a> {
    file: &'a File,
    at: u64,
    buffer: Vec<u8>,
    /// The first failure; what comes after it is dropped.
    failed: Option<io::Error>,
}

impl<'a> Writer<'a> {
    const BUFFER_BYTES: usize = 1 << 20;

    pub fn new(file: &'a File, at: u64) -> Self {
        Self { file, at, buffer: Vec::new(), failed: None }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= Self::BUFFER_BYTES {
            self.write();
        }
    }

    pub fn finish(mut self) -> io::Result<()> {
        self.write();
        self.failed.map_or(Ok(()), Err)
    }

    fn write(&mut self) {
        if self.failed.is_none() {
            self.failed = sparse::write_all_at(self.file, &self.buffer, self.at).err();
        }
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
    }
}

/// Puts bytes of the tar a second time into the overflow area.
pub fn copy_within(file: &File, copy: Copy) -> io::Result<()> {
    let mut buffer = Vec::new();
    let (mut from, mut to, mut left) = (copy.from, copy.to, copy.len);
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(usize::MAX).min(Writer::BUFFER_BYTES);
        buffer.resize(step, 0);
        file.read_exact_at(&mut buffer, from)?;
        file.write_all_at(&buffer, to)?;
        let step = step as u64;
        (from, to, left) = (from + step, to + step, left - step);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streaks() {
        let check = |runs: &[Range<usize>], expected: &[usize]| {
            let mut streak = Streak::default();
            let ahead: Vec<usize> = runs.iter().map(|run| streak.extend(run.clone())).collect();
            assert_eq!(ahead, expected, "{runs:?}");
        };
        check(&[0..1, 1..2, 2..3, 3..4, 4..5, 5..6, 6..7, 7..8], &[0, 0, 0, 1, 2, 3, 4, 4]);
        // Several reads wait for the same chunk.
        check(&[5..6, 5..6, 6..7, 6..7, 7..8, 8..9, 8..9], &[0, 0, 0, 0, 0, 1, 1]);
        // What was decoded ahead is not waited for.
        check(&[0..2, 2..4, 5..6, 8..9], &[0, 1, 3, 4]);
        // Leaps, back or far ahead, end it.
        check(&[0..4, 9..10, 10..11], &[1, 0, 0]);
        check(&[5..9, 2..3, 3..4], &[1, 0, 0]);
        check(&[0..1, 2..3, 4..5, 6..7], &[0, 0, 0, 0]);
    }
}
