//! A source in memory: the twin of a registry, for tests of what is above it. Counts what it serves,
//! and fails as it is told.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use skimmer_proto::Digest;

use super::{Blame, BlobRef, ByteStream, Class, FetchError, Source};

/// The length of the parts that it serves, in bytes: no piece ends where a part does.
const PART: usize = 100_001;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Memory {
    blobs: Mutex<BTreeMap<Digest, Bytes>>,
    /// Every request fails.
    pub down: AtomicBool,
    /// Every byte is wrong.
    pub lies: AtomicBool,
    /// Requests are taken, and nothing comes.
    pub hangs: AtomicBool,
    /// Bytes asked for and not refused.
    pub served: AtomicU64,
}

impl Memory {
    /// Serves `bytes` as `digest`, whatever they hash to.
    pub fn put(&self, digest: Digest, bytes: impl Into<Bytes>) {
        self.blobs().insert(digest, bytes.into());
    }

    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    fn blobs(&self) -> MutexGuard<'_, BTreeMap<Digest, Bytes>> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Source for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    async fn fetch(
        &self,
        blob: &BlobRef,
        range: Range<u64>,
        _: Class,
    ) -> Result<ByteStream, FetchError> {
        let failed = |text: &str| FetchError {
            digest: blob.digest,
            from: "memory".to_owned(),
            blame: Blame::Registry,
            retryable: true,
            source: text.into(),
        };
        if self.down.load(Ordering::Relaxed) {
            return Err(failed("it is down"));
        }
        let known = self.blobs().get(&blob.digest).cloned();
        let known = known.ok_or_else(|| failed("no such blob"))?;
        let bounds = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        let bounds = bounds.filter(|(start, end)| start <= end && *end <= known.len());
        let (start, end) = bounds.ok_or_else(|| failed("it is shorter"))?;
        self.served.fetch_add(range.end - range.start, Ordering::Relaxed);
        if self.hangs.load(Ordering::Relaxed) {
            return Ok(stream::pending().boxed());
        }
        let mask = u8::from(self.lies.load(Ordering::Relaxed));
        let bytes: Vec<u8> = known[start..end].iter().map(|byte| byte ^ mask).collect();
        let parts: Vec<_> =
            bytes.chunks(PART).map(|part| Ok(Bytes::copy_from_slice(part))).collect();
        Ok(stream::iter(parts).boxed())
    }
}
