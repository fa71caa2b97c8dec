//! Chunks of a layer in use that nobody reads: their space can be had, as they can be fetched again.
//!
//! Punching frees them in two steps. First they count as absent, and a checkpoint says so on disk;
//! then each that is still absent becomes a hole. Readers and decoders [hold](LayerData::hold) the
//! file, so that neither step falls between a look at the bitmap and what is done on its word.
//!
//! Invariants:
//! - A chunk that was [touched](LayerData::touch) stays as long as the file is open.
//! - A complete file, and one that is [kept](LayerData::keep) because it is being completed, loses
//!   nothing.
//! - No checkpoint on disk has a chunk of which bytes have gone.

#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, Weak};

use nix::fcntl::{FallocateFlags, fallocate};

use super::{Error, LayerData};
use crate::bits::Bits;

/// Knows where the bytes of chunks are.
pub trait Spans: Send + Sync {
    /// Every range of the data file that is written when `chunk` is decoded, and by it alone.
    fn spans(&self, chunk: usize) -> Vec<Range<u64>>;
}

/// What is remembered of a data file's use as long as it is open.
pub(super) struct Use {
    /// Shared by readers and decoders; alone: a punch.
    held: RwLock<()>,
    touched: Bits,
    kept: AtomicUsize,
    /// Without it nothing is punched.
    spans: Mutex<Option<Weak<dyn Spans>>>,
}

impl std::fmt::Debug for Use {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Use").field("touched", &self.touched).finish_non_exhaustive()
    }
}

impl Use {
    pub fn new(chunks: usize) -> Self {
        Self {
            held: RwLock::default(),
            touched: Bits::new(chunks),
            kept: AtomicUsize::new(0),
            spans: Mutex::new(None),
        }
    }
}

/// No chunk goes while this lives. Not to be taken twice by one thread.
#[derive(Debug)]
pub struct Hold<'a> {
    _guard: RwLockReadGuard<'a, ()>,
}

/// Nothing of the file goes while this lives: all of it is needed soon.
#[derive(Debug)]
pub struct Keep<'a> {
    data: &'a LayerData,
}

impl Drop for Keep<'_> {
    fn drop(&mut self) {
        self.data.usage.kept.fetch_sub(1, Ordering::AcqRel);
    }
}

impl LayerData {
    /// To be held from the look at [`LayerData::has`] to the end of the read that relies on it, and
    /// from the first byte that is written of a chunk until it is marked.
    pub fn hold(&self) -> Hold<'_> {
        Hold { _guard: self.usage.held.read().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Somebody reads of `chunk`. To be said before the look whether it is there.
    pub fn touch(&self, chunk: usize) {
        if !self.usage.touched.get(chunk) {
            self.usage.touched.set(chunk);
        }
    }

    pub fn keep(&self) -> Keep<'_> {
        let _now = self.hold();
        self.usage.kept.fetch_add(1, Ordering::AcqRel);
        Keep { data: self }
    }

    /// Lets chunks be punched, as long as `spans` lives.
    pub fn allow_punching(&self, spans: Weak<dyn Spans>) {
        *self.usage.spans.lock().unwrap_or_else(PoisonError::into_inner) = Some(spans);
    }

    /// Nothing of the file goes as long as it is open: somebody reads it without a look at what is there.
    pub fn forbid_punching(&self) {
        std::mem::forget(self.keep());
    }

    /// Waits until nobody holds the file. What is held later sees what happened before.
    pub fn settle(&self) {
        drop(self.usage.held.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Bytes that [`LayerData::punch_cold`] can free, about.
    pub(crate) fn cold_bytes(&self) -> u64 {
        if !self.is_punchable() {
            return 0;
        }
        let mean = self.len() / self.chunks().max(1) as u64;
        mean.saturating_mul((0..self.chunks()).filter(|chunk| self.is_cold(*chunk)).count() as u64)
    }

    /// Frees chunks that nobody touched, until they had `wanted` bytes. The bytes freed. Blocks.
    pub(crate) fn punch_cold(&self, wanted: u64) -> Result<u64, Error> {
        let spans = self.usage.spans.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(spans) = spans.and_then(|spans| spans.upgrade()) else { return Ok(0) };
        let mut victims = Vec::new();
        {
            let _alone = self.usage.held.write().unwrap_or_else(PoisonError::into_inner);
            let chunks = if self.is_punchable() { self.chunks() } else { 0 };
            let mut chosen = 0;
            for chunk in (0..chunks).filter(|chunk| self.is_cold(*chunk)) {
                if chosen >= wanted {
                    break;
                }
                let ranges = spans.spans(chunk);
                chosen += ranges.iter().map(|range| range.end - range.start).sum::<u64>();
                self.forget(chunk);
                victims.push((chunk, ranges));
            }
        }
        if victims.is_empty() {
            return Ok(0);
        }
        self.say_absent()?;
        let mut freed = 0;
        for (chunk, ranges) in victims {
            let _alone = self.usage.held.write().unwrap_or_else(PoisonError::into_inner);
            // A reader may have had it decoded again meanwhile.
            if self.has(chunk) {
                continue;
            }
            for range in ranges {
                self.punch(range.clone())
                    .map_err(|source| Error::Punch { blob: self.blob(), source })?;
                freed += range.end - range.start;
            }
        }
        Ok(freed)
    }

    /// What is there of these chunks, each given with its [spans](Spans::spans), is wrong: they count as absent from
    /// now on, and become holes, so that what they are to be can be written by whoever leaves zeros out. One
    /// checkpoint says so of all. False: they stay, because the file is [kept](Self::keep). Readers wait meanwhile.
    /// Blocks.
    pub fn distrust(&self, chunks: &[(usize, Vec<Range<u64>>)]) -> Result<bool, Error> {
        let _alone = self.usage.held.write().unwrap_or_else(PoisonError::into_inner);
        if self.usage.kept.load(Ordering::Acquire) > 0 {
            return Ok(false);
        }
        let there: Vec<_> = chunks.iter().filter(|(chunk, _)| self.has(*chunk)).collect();
        if there.is_empty() {
            return Ok(true);
        }
        there.iter().for_each(|(chunk, _)| self.forget(*chunk));
        self.say_absent()?;
        let ranges = there.iter().flat_map(|(_, ranges)| ranges);
        // One that fails is no reason to leave the others as they are.
        let empty = |range: &Range<u64>| self.punch(range.clone()).or_else(|_| self.zero(range));
        let emptied = ranges.map(empty).fold(Ok(()), Result::and);
        emptied.map_err(|source| Error::Punch { blob: self.blob(), source })?;
        Ok(true)
    }

    /// Has the disk know what is absent. A full one has no room for another checkpoint; without any, all
    /// chunks are decoded again after a crash.
    fn say_absent(&self) -> Result<(), Error> {
        self.checkpoint().or_else(|_| self.drop_checkpoint())
    }

    fn is_punchable(&self) -> bool {
        let spans = self.usage.spans.lock().unwrap_or_else(PoisonError::into_inner);
        let alive = spans.as_ref().is_some_and(|spans| spans.strong_count() > 0);
        alive && !self.complete() && self.usage.kept.load(Ordering::Acquire) == 0
    }

    fn is_cold(&self, chunk: usize) -> bool {
        self.has(chunk) && !self.usage.touched.get(chunk)
    }

    /// Where there can't be a hole.
    fn zero(&self, range: &Range<u64>) -> io::Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).map_or(ZEROS.len(), |n| n.min(ZEROS.len()));
            self.file().write_all_at(&ZEROS[..len], at)?;
            at += len as u64;
        }
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let signed = |n: u64| libc::off_t::try_from(n).map_err(io::Error::other);
        let (start, len) = (signed(range.start)?, signed(range.end - range.start)?);
        if len == 0 {
            return Ok(());
        }
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(self.file(), hole, start, len).map_err(io::Error::from)
    }
}
