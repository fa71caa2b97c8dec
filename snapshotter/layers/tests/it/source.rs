//! A registry in memory that counts what it serves and fails on demand.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream;
use skimmer_cache::{Blame, BlobRef, ByteStream, Class, FetchError, Source};
use skimmer_proto::Digest;

#[derive(Default)]
pub struct Memory {
    blobs: Mutex<BTreeMap<Digest, Bytes>>,
    /// Every request fails.
    pub down: AtomicBool,
    /// Bytes asked for.
    pub served: AtomicU64,
}

impl Memory {
    /// Serves `bytes` as `digest`, whatever they hash to.
    pub fn put(&self, digest: Digest, bytes: Vec<u8>) {
        let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        blobs.insert(digest, bytes.into());
    }

    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
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
        let known =
            self.blobs.lock().unwrap_or_else(PoisonError::into_inner).get(&blob.digest).cloned();
        let bytes = known.ok_or_else(|| failed("no such blob"))?;
        self.served.fetch_add(range.end - range.start, Ordering::Relaxed);
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        let parts: Vec<_> =
            bytes.slice(range).chunks(16 << 10).map(|c| Ok(Bytes::copy_from_slice(c))).collect();
        Ok(Box::pin(stream::iter(parts)))
    }
}
