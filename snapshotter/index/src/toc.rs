//! Tables of contents that some blobs carry: eStargz and zstd:chunked.
//!
//! To any other reader such a blob is ordinary multi-member gzip or multi-frame zstd, and the index
//! that [`crate::build`] makes of it has the tar's layout. A TOC makes an index of a blob that nobody
//! has read yet: find it by the blob's last bytes ([`find`]), fetch it, [`read`] it, and [`index`] lays
//! the files out as it says ([`Layout::Toc`]). It is the image author's word only.
//!
//! Sources: `docs/estargz.md` of containerd's stargz-snapshotter; `docs/containers-storage-zstd-chunked.md`
//! and `pkg/chunked/internal` of containers/storage.

mod entries;
mod estargz;
mod lay_out;
#[cfg(test)]
mod tests;
mod time;
mod zstd_chunked;

use std::ops::Range;

use crate::codec;
use crate::index::LayerIndex;
use crate::tar::{self, Limits};
use crate::{erofs::WriteError, tree};

#[cfg(doc)]
use crate::index::Layout;

/// How many of a blob's last bytes [`find`] wants.
pub const FOOTER_LEN: u64 = 72;

/// Most bytes of a TOC, decompressed.
const MAX_TOC: u64 = 128 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Estargz,
    ZstdChunked,
}

/// Where a blob's TOC is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub format: Format,
    /// In the blob; compressed.
    pub blob: Range<u64>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the TOC has {actual} compressed bytes, expected {expected}")]
    CompressedLength { actual: u64, expected: u64 },
    #[error("decompress the TOC")]
    Decode { source: codec::Error },
    #[error("read the tar entry that holds the TOC")]
    Tar { source: tar::Error },
    #[error("the blob's footer points to something that is not a TOC")]
    NoToc,
    #[error("parse the TOC")]
    Json { source: serde_json::Error },
    #[error("TOC version {0} is not known")]
    Version(u64),
    #[error("the TOC's entry {entry} ({name:?}) is invalid: {reason}")]
    Entry { entry: u64, name: String, reason: &'static str },
    #[error("the TOC has more than {limit} entries")]
    TooManyEntries { limit: u64 },
    #[error("place the TOC's entry {entry} ({name:?})")]
    Place { entry: u64, name: String, source: tree::Error },
    #[error("the TOC's chunks are not in the blob's order, or behind its end, at byte {at}")]
    Order { at: u64 },
    #[error("lay out the TOC's files")]
    Tree { source: tree::Error },
    #[error("write the layer's inodes")]
    Inodes { source: WriteError },
}

/// Where the TOC of a blob of `blob_len` bytes is, by the blob's last [`FOOTER_LEN`] bytes (or all of
/// a shorter blob). `None` if it has none, or its footer points outside the blob.
pub fn find(tail: &[u8], blob_len: u64) -> Option<Place> {
    estargz::find(tail, blob_len).or_else(|| zstd_chunked::find(tail, blob_len))
}

/// The TOC's JSON from the bytes of [`Place::blob`]. Its SHA-256 is what an eStargz layer's annotation
/// `containerd.io/snapshot/stargz/toc.digest` gives; zstd:chunked's
/// `io.github.containers.zstd-chunked.manifest-checksum` is of the compressed bytes.
pub fn read(place: &Place, compressed: &[u8]) -> Result<Vec<u8>, Error> {
    let (actual, expected) = (compressed.len() as u64, place.blob.end - place.blob.start);
    if actual != expected {
        return Err(Error::CompressedLength { actual, expected });
    }
    let mut plain = Vec::new();
    let mut decoder = codec::Decoder::new(MAX_TOC);
    decoder
        .push(compressed, &mut |bytes| plain.extend_from_slice(bytes))
        .and_then(|()| decoder.finish(&mut |bytes| plain.extend_from_slice(bytes)))
        .map_err(|source| Error::Decode { source })?;
    match place.format {
        Format::Estargz => estargz::json(&plain),
        Format::ZstdChunked => Ok(plain),
    }
}

/// The index of a blob of `blob_len` bytes whose TOC is this JSON.
pub fn index(
    place: &Place,
    json: &[u8],
    blob_len: u64,
    limits: Limits,
) -> Result<LayerIndex, Error> {
    lay_out::index(place, json, blob_len, limits)
}
