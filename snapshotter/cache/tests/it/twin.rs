//! A source in memory that does as it is told, and what the tests share.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use prometheus_client::registry::Registry;
use skimmer_cache::{
    Blame, Blob, BlobKind, BlobRef, ByteStream, Cache, Class, Config, FetchError, Origin, Source,
    Sources, blob,
};
use skimmer_proto::piece_table::piece_value;
use skimmer_proto::{Digest, Geometry, PieceTable};

/// What a source does with one request.
#[derive(Clone, Copy, Debug)]
pub enum Deed {
    Serve,
    /// Waits before the first byte.
    Slow(Duration),
    Refuse,
    Fail,
    /// Ends after so many bytes, without an error.
    Truncate(usize),
    /// Flips the byte at this offset of the blob.
    Corrupt(u64),
    /// Never answers.
    Hang,
}

type Script = Box<dyn Fn(usize, &Request) -> Deed + Send + Sync>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub digest: Digest,
    pub range: Range<u64>,
    pub class: Class,
}

pub struct Twin {
    blobs: Mutex<BTreeMap<Digest, Bytes>>,
    script: Script,
    requests: Mutex<Vec<Request>>,
}

impl Twin {
    pub fn honest() -> Arc<Self> {
        Self::scripted(|_, _| Deed::Serve)
    }

    /// `script` is given the number of the request, from 0, and the request.
    pub fn scripted(script: impl Fn(usize, &Request) -> Deed + Send + Sync + 'static) -> Arc<Self> {
        let (blobs, requests) = (Mutex::default(), Mutex::default());
        Arc::new(Self { blobs, script: Box::new(script), requests })
    }

    pub fn add(&self, bytes: &[u8]) -> BlobRef {
        let digest = Digest::of(bytes);
        self.blobs.lock().unwrap().insert(digest, Bytes::copy_from_slice(bytes));
        reference(digest, bytes.len() as u64)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    pub fn bytes_asked(&self) -> u64 {
        self.requests().iter().map(|request| request.range.end - request.range.start).sum()
    }
}

#[async_trait]
impl Source for Twin {
    fn name(&self) -> &'static str {
        "twin"
    }

    async fn fetch(
        &self,
        blob: &BlobRef,
        range: Range<u64>,
        class: Class,
    ) -> Result<ByteStream, FetchError> {
        let request = Request { digest: blob.digest, range: range.clone(), class };
        let number = {
            let mut requests = self.requests.lock().unwrap();
            requests.push(request.clone());
            requests.len() - 1
        };
        let error = |retryable, text: &str| FetchError {
            digest: blob.digest,
            from: "twin".to_owned(),
            blame: Blame::Registry,
            retryable,
            source: text.into(),
        };
        let all = self.blobs.lock().unwrap().get(&blob.digest).cloned();
        let all = all.ok_or_else(|| error(false, "no such blob"))?;
        let at = |n: u64| usize::try_from(n).unwrap();
        let mut bytes = all.slice(at(range.start)..at(range.end));
        match (self.script)(number, &request) {
            Deed::Serve => {}
            Deed::Slow(wait) => tokio::time::sleep(wait).await,
            Deed::Refuse => return Err(error(false, "401 Unauthorized")),
            Deed::Fail => return Err(error(true, "connection reset")),
            Deed::Truncate(len) => bytes.truncate(len),
            Deed::Corrupt(offset) if range.contains(&offset) => {
                let mut copy = bytes.to_vec();
                copy[at(offset - range.start)] ^= 1;
                bytes = copy.into();
            }
            Deed::Corrupt(_) => {}
            Deed::Hang => std::future::pending().await,
        }
        // Parts that don't fall on piece boundaries.
        let parts: Vec<_> = bytes.chunks(100_001).map(Bytes::copy_from_slice).map(Ok).collect();
        Ok(futures::stream::iter(parts).boxed())
    }
}

pub fn reference(digest: Digest, len: u64) -> BlobRef {
    let origin = Origin { host: "registry.test".to_owned(), repository: "a".to_owned() };
    BlobRef { digest, len, kind: BlobKind::Blob, origins: vec![origin] }
}

/// Bytes that differ from piece to piece.
pub fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let step = |_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56).to_le_bytes()[0]
    };
    (0..len).map(step).collect()
}

pub fn table(bytes: &[u8]) -> PieceTable {
    let geometry = Geometry::of(bytes.len() as u64).unwrap();
    let part = |piece| {
        let span = geometry.span(piece);
        &bytes[usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap()]
    };
    let values = (0..geometry.pieces()).map(|p| piece_value(geometry, p, part(p))).collect();
    let [diff_id, index] = [Digest::of(b"tar"), Digest::of(b"index")];
    PieceTable::new(geometry, Digest::of(bytes), diff_id, index, values).unwrap()
}

pub fn config(root: &Path) -> Config {
    Config { quota_bytes: Some(1 << 40), ..Config::new(root.to_owned()) }
}

pub fn open(root: &Path, source: &Arc<Twin>) -> Cache {
    Cache::open(config(root), Sources::only(Arc::clone(source) as _), &mut Registry::default())
        .unwrap()
}

/// The whole blob, by pull-through.
pub async fn pulled(blob: &Arc<Blob>) -> Result<Vec<u8>, blob::Error> {
    let mut pull = blob.pull_through(Class::PullThrough);
    let mut all = Vec::new();
    while let Some(part) = pull.next().await? {
        all.extend_from_slice(&part);
    }
    Ok(all)
}
