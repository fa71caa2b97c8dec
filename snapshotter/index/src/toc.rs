//! Tables of contents that some blobs carry: eStargz and zstd:chunked.
//!
//! To any other reader such a blob is ordinary multi-member gzip or multi-frame zstd, and the index
//! that [`crate::build`] makes of it has the tar's layout. A TOC makes an index of a blob that nobody
//! has read yet: find it by the blob's last bytes ([`find`]), fetch it, [`read`] it, and [`Toc::new`]
//! lays the files out as it says ([`Layout::Toc`]). It is the image author's word only, until
//! [`Toc::compare`] has matched it with the tar.
//!
//! Sources: `docs/estargz.md` of containerd's stargz-snapshotter; `docs/containers-storage-zstd-chunked.md`
//! and `pkg/chunked/internal` of containers/storage.

mod compare;
mod entries;
mod estargz;
mod lay_out;
#[cfg(test)]
mod tests;
mod time;
mod zstd_chunked;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use skimmer_proto::Digest;

use crate::chunk::Chunk;
use crate::codec::{self, Compression};
use crate::erofs::{self, WriteError};
use crate::index::{LayerIndex, Layout};
use crate::tar::{self, Entry, Limits};
use crate::tree::{self, Tree};

/// How many of a blob's last bytes [`find`] wants.
pub const FOOTER_LEN: u64 = 72;

/// A layer's annotations in a manifest that give its TOC's digest: eStargz's, zstd:chunked's, and
/// what that was called before.
const ANNOTATIONS: [&str; 3] = [
    "containerd.io/snapshot/stargz/toc.digest",
    "io.github.containers.zstd-chunked.manifest-checksum",
    "io.containers.zstd-chunked.manifest-checksum",
];

/// Most bytes of a TOC, compressed or not.
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
    #[error("the TOC is wrong about {path:?}: in the tar it has another {what}")]
    Lie { path: String, what: &'static str },
    #[error("read the contents of {path:?}")]
    Contents { path: String, source: io::Error },
}

/// The digest that a layer's annotations in a manifest give its TOC; see [`Found::is`].
pub fn annotated(annotations: &BTreeMap<String, String>) -> Option<Digest> {
    ANNOTATIONS.iter().find_map(|name| annotations.get(*name)?.parse().ok())
}

/// Where the TOC of a blob of `blob_len` bytes is, by the blob's last [`FOOTER_LEN`] bytes (or all of
/// a shorter blob). `None` if it has none, or its footer points outside the blob or to too much of it.
pub fn find(tail: &[u8], blob_len: u64) -> Option<Place> {
    let found = estargz::find(tail, blob_len).or_else(|| zstd_chunked::find(tail, blob_len));
    found.filter(|place| place.blob.end - place.blob.start <= MAX_TOC)
}

/// A TOC's bytes, as [`read`] found them.
#[derive(Debug)]
pub struct Found {
    place: Place,
    json: Vec<u8>,
    /// SHA-256 of the compressed bytes.
    packed: Digest,
    /// eStargz: the TOC is a file of the layer, too.
    file: Option<OwnFile>,
}

/// The tar entry that an eStargz blob's TOC is in, alone in a member.
#[derive(Debug)]
struct OwnFile {
    entry: Entry,
    /// What the member decodes to.
    len: u64,
    digest: Digest,
}

/// The TOC from the bytes of [`Place::blob`].
pub fn read(place: &Place, compressed: &[u8]) -> Result<Found, Error> {
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
    let (json, file) = match place.format {
        Format::Estargz => {
            let (json, entry) = estargz::json(&plain)?;
            let (len, digest) = (plain.len() as u64, Digest::of(&plain));
            (json, Some(OwnFile { entry, len, digest }))
        }
        Format::ZstdChunked => (plain, None),
    };
    Ok(Found { place: place.clone(), json, packed: Digest::of(compressed), file })
}

impl Found {
    /// SHA-256 of the TOC's JSON.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.json)
    }

    /// Whether a manifest that gives `digest` for the layer's TOC means this one: that of an eStargz
    /// layer's annotation is of the JSON, that of a zstd:chunked layer's of the compressed bytes.
    pub fn is(&self, digest: Digest) -> bool {
        self.packed == digest || self.digest() == digest
    }
}

/// What a TOC says, its files laid out: each at a multiple of 512, in the TOC's order.
#[derive(Debug)]
pub struct Toc {
    tree: Tree,
    compression: Compression,
    blob_len: u64,
    data_len: u64,
    chunks: Vec<Chunk>,
    /// SHA-256 of what each chunk decodes to.
    digests: Vec<Digest>,
    /// Where the TOC's own file is, and its digest, if it is one.
    own: Option<(u64, Digest)>,
}

impl Toc {
    /// What `found` says of a blob of `blob_len` bytes.
    pub fn new(found: Found, blob_len: u64, limits: Limits) -> Result<Self, Error> {
        lay_out::lay_out(found, blob_len, limits)
    }

    /// The blob's index, and the SHA-256 of what each of its chunks decodes to.
    pub fn into_index(self) -> Result<(LayerIndex, Vec<Digest>), Error> {
        let image = erofs::write(&self.tree, self.data_len);
        let image = image.map_err(|source| Error::Inodes { source })?;
        let index = LayerIndex {
            compression: self.compression,
            layout: Layout::Toc,
            blob_len: self.blob_len,
            tar_len: self.data_len,
            data_len: image.data_len,
            inodes: image.bytes,
            copies: image.copies,
            chunks: self.chunks,
            windows: Vec::new(),
        };
        Ok((index, self.digests))
    }

    /// Whether `tar`, the tree in the blob's tar, is the one that the TOC shows: all names, types,
    /// modes, owners, times (to the second where the TOC has no more), extended attributes, links and
    /// contents. `read` fills a buffer with the tar's bytes at an offset.
    pub fn compare(
        &self,
        tar: &Tree,
        read: &mut dyn FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<(), Error> {
        compare::compare(self, tar, read)
    }
}
