//! Pull-through: one pass over a blob that checks it, decodes it to the data file and builds its
//! index.
//!
//! ```text
//! cache ──┬── sums: SHA-256 and BLAKE3 of the blob
//!         └── decode: inflate, checkpoints ── scan: data file, SHA-256 of the tar, inodes
//! ```
//!
//! Owns: the threads between the blob's first byte and its last.
//! Does not own: the bytes on disk (the cache's), what becomes of a layer that fails (see
//! [`crate::layer`]).
//!
//! Invariants:
//! - Nothing read here is trusted until SHA-256 and DiffID have matched; what is returned exists only then.
//! - Every channel is bounded: a slow stage slows the fetch, memory stays at a few MiB a layer.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc as threads;

use bytes::Bytes;
use skimmer_cache::{Blob, Class};
use skimmer_index::build::{BlobSums, Built, DataScan, Sums, assemble};
use skimmer_index::codec::{Decoded, Decoder};
use skimmer_index::index::Layout;
use skimmer_index::tar::Limits;
use skimmer_proto::Digest;
use tokio::sync::mpsc;

use crate::fill::copy_within;
use crate::sparse;

/// Parts of the blob between the fetch and each of its readers.
const QUEUED_PARTS: usize = 8;

/// Decoded bytes go from thread to thread, and to disk, in buffers of this size.
const BUFFER_BYTES: usize = 1 << 20;

/// Buffers between decoding and scanning.
const QUEUED_BUFFERS: usize = 3;

/// Why a blob could not be made a layer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("fetch the blob")]
    Fetch { source: skimmer_cache::blob::Error },
    #[error("the bytes received have the digest {actual}")]
    Digest { actual: Digest },
    #[error(
        "the blob decodes to a layer with the DiffID {actual}, the image's config says {expected}"
    )]
    DiffId { expected: Digest, actual: Digest },
    #[error("decode the blob")]
    Decode { source: skimmer_index::codec::Error },
    #[error("digest the blob")]
    Sum { source: skimmer_index::build::Error },
    #[error("make a tree of the layer")]
    Tar { source: skimmer_index::build::Error },
    #[error("build the layer's index")]
    Assemble { source: skimmer_index::build::Error },
    #[error("write the layer's data file")]
    Write { source: io::Error },
    #[error("a stage of the pull-through panicked")]
    Stage,
}

impl Error {
    /// Whether the layer itself is at fault, and not the way to it or this node.
    pub const fn is_wrong_layer(&self) -> bool {
        !matches!(self, Self::Fetch { .. } | Self::Write { .. } | Self::Stage)
    }

    /// Whether the bytes received are not the blob, so that keeping them is of no use.
    pub const fn is_wrong_blob(&self) -> bool {
        matches!(self, Self::Digest { .. })
    }

    /// Whether it may go better when something has been evicted.
    pub fn is_disk_full(&self) -> bool {
        let source = match self {
            Self::Write { source } => source,
            Self::Fetch { source: skimmer_cache::blob::Error::Write { source, .. } } => source,
            _ => return false,
        };
        source.kind() == io::ErrorKind::StorageFull
    }
}

/// What is known of a layer before its bytes.
pub struct Expected {
    pub blob: Digest,
    pub diff_id: Digest,
    /// Most bytes that it may decode to.
    pub max_data_bytes: u64,
    /// What its tar may ask for.
    pub limits: Limits,
}

/// Fetches `blob` whole and writes what it decodes to into `data`, at its own offsets.
pub async fn pull(
    blob: &Arc<Blob>,
    data: Arc<File>,
    expected: Expected,
    class: Class,
) -> Result<Built, Error> {
    let (to_sums, from_fetch) = mpsc::channel::<Bytes>(QUEUED_PARTS);
    let len = blob.len();
    let sums = tokio::task::spawn_blocking(move || sum(from_fetch, len));
    let (to_decode, from_fetch) = mpsc::channel::<Bytes>(QUEUED_PARTS);
    let (to_scan, from_decode) = threads::sync_channel(QUEUED_BUFFERS);
    let (to_spare, spare) = threads::channel();
    let decode = {
        let limit = expected.max_data_bytes;
        tokio::task::spawn_blocking(move || decode(from_fetch, limit, to_scan, &spare))
    };
    let scan = {
        let (data, scan_of) = (Arc::clone(&data), DataScan::new(expected.limits.clone()));
        tokio::task::spawn_blocking(move || scan(scan_of, &data, from_decode, &to_spare))
    };
    let fed = feed(blob, class, to_sums, to_decode).await;
    // Whatever the fetch came to: no stage may go on writing behind the caller's back.
    let (sums, decoded, scanned) = (sums.await, decode.await, scan.await);
    fed?;
    let sums = sums.map_err(|_| Error::Stage)??;
    let decoded = decoded.map_err(|_| Error::Stage)?;
    let scanned = scanned.map_err(|_| Error::Stage)?;
    if sums.blob != expected.blob {
        return Err(Error::Digest { actual: sums.blob });
    }
    // Scanning sees an error first if both do: decoding ends when nobody takes its bytes.
    let scanned = scanned?;
    let decoded = decoded?;
    let finish = move || finish(sums, decoded, scanned, &expected, &data);
    tokio::task::spawn_blocking(finish).await.map_err(|_| Error::Stage)?
}

/// Hands the blob's bytes to both readers. A reader that has given up is passed over: the digest
/// decides what its error means.
async fn feed(
    blob: &Arc<Blob>,
    class: Class,
    to_sums: mpsc::Sender<Bytes>,
    to_decode: mpsc::Sender<Bytes>,
) -> Result<(), Error> {
    let mut stream = blob.pull_through(class);
    while let Some(part) = stream.next().await.map_err(|source| Error::Fetch { source })? {
        let _ = to_decode.send(part.clone()).await;
        let _ = to_sums.send(part).await;
    }
    Ok(())
}

fn sum(mut parts: mpsc::Receiver<Bytes>, len: u64) -> Result<Sums, Error> {
    let failed = |source| Error::Sum { source };
    let mut sums = BlobSums::new(len).map_err(failed)?;
    while let Some(part) = parts.blocking_recv() {
        sums.push(&part).map_err(failed)?;
    }
    sums.finish().map_err(failed)
}

/// Collects decoded bytes into buffers and passes them on.
struct Outlet<'a> {
    buffer: Vec<u8>,
    to_scan: threads::SyncSender<Vec<u8>>,
    spare: &'a threads::Receiver<Vec<u8>>,
    /// Nobody takes the bytes any more.
    closed: bool,
}

impl Outlet<'_> {
    fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER_BYTES {
            self.pass_on();
        }
    }

    fn pass_on(&mut self) {
        let empty = self.spare.try_recv().unwrap_or_default();
        let full = std::mem::replace(&mut self.buffer, empty);
        self.closed |= self.to_scan.send(full).is_err();
    }
}

fn decode(
    mut parts: mpsc::Receiver<Bytes>,
    limit: u64,
    to_scan: threads::SyncSender<Vec<u8>>,
    spare: &threads::Receiver<Vec<u8>>,
) -> Result<Decoded, Error> {
    let failed = |source| Error::Decode { source };
    let mut decoder = Decoder::new(limit);
    let mut outlet = Outlet { buffer: Vec::new(), to_scan, spare, closed: false };
    while let Some(part) = parts.blocking_recv() {
        decoder.push(&part, &mut |bytes| outlet.push(bytes)).map_err(failed)?;
        if outlet.closed {
            break;
        }
    }
    let decoded = decoder.finish(&mut |bytes| outlet.push(bytes)).map_err(failed);
    outlet.pass_on();
    decoded
}

fn scan(
    mut scan: DataScan,
    data: &File,
    buffers: threads::Receiver<Vec<u8>>,
    to_spare: &threads::Sender<Vec<u8>>,
) -> Result<DataScan, Error> {
    let mut at = 0;
    for mut buffer in buffers {
        sparse::write_all_at(data, &buffer, at).map_err(|source| Error::Write { source })?;
        scan.push(&buffer).map_err(|source| Error::Tar { source })?;
        at += buffer.len() as u64;
        buffer.clear();
        // The decoder may be done.
        let _ = to_spare.send(buffer);
    }
    Ok(scan)
}

fn finish(
    sums: Sums,
    decoded: Decoded,
    scanned: DataScan,
    expected: &Expected,
    data: &File,
) -> Result<Built, Error> {
    let scan = scanned.finish().map_err(|source| Error::Tar { source })?;
    if scan.diff_id != expected.diff_id {
        return Err(Error::DiffId { expected: expected.diff_id, actual: scan.diff_id });
    }
    let built = assemble(sums, decoded, scan).map_err(|source| Error::Assemble { source })?;
    if built.index.layout == Layout::Tar {
        let failed = |source| Error::Write { source };
        data.set_len(built.index.data_len).map_err(failed)?;
        for copy in &built.index.copies {
            copy_within(data, *copy).map_err(failed)?;
        }
    }
    Ok(built)
}
