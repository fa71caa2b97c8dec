//! An index and a piece table from a blob's bytes, in one pass.
//!
//! The pass has three parts that know nothing of each other, so that each may have a thread:
//! [`BlobSums`] takes the compressed bytes, [`Decoder`] too, [`DataScan`] takes what the decoder puts
//! out. [`assemble`] joins what they found. The result depends on the blob alone.

use sha2::{Digest as _, Sha256};
use skimmer_proto::piece_table::{self, piece_value};
use skimmer_proto::{Digest, Geometry, PieceTable};

use crate::codec::Decoded;
pub use crate::codec::Decoder;
use crate::index::{self, LayerIndex, Layout};
use crate::tar::{self, Limits, TarWalk};
use crate::tree::{self, Tree, TreeBuilder};
use crate::{erofs, erofs::WriteError};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("a blob of {len} bytes is longer than the maximum, {}", Geometry::MAX_BLOB_LEN)]
    BlobTooLong { len: u64 },
    #[error("the blob has {actual} bytes, expected {expected}")]
    BlobLength { actual: u64, expected: u64 },
    #[error("read the layer's tar")]
    Tar { source: tar::Error },
    #[error("lay out the layer's files")]
    Tree { source: tree::Error },
    #[error("the blob decodes to {decoded} bytes, of which {scanned} were scanned")]
    DataLength { decoded: u64, scanned: u64 },
    #[error("write the layer's inodes")]
    Inodes { source: WriteError },
    #[error("encode the layer index")]
    Encode { source: index::Error },
    #[error("make the piece table")]
    Table { source: piece_table::Error },
}

/// Digests of the compressed bytes: the blob's SHA-256, and the BLAKE3 value of each piece.
pub struct BlobSums {
    geometry: Geometry,
    sha256: Sha256,
    seen: u64,
    /// The beginning of the current piece.
    piece: Vec<u8>,
    values: Vec<[u8; 32]>,
}

/// What [`BlobSums::finish`] returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sums {
    pub geometry: Geometry,
    pub blob: Digest,
    pub values: Vec<[u8; 32]>,
}

impl BlobSums {
    /// For a blob of `blob_len` bytes.
    pub fn new(blob_len: u64) -> Result<Self, Error> {
        let geometry = Geometry::of(blob_len).ok_or(Error::BlobTooLong { len: blob_len })?;
        let (sha256, piece, values) = (Sha256::new(), Vec::new(), Vec::new());
        Ok(Self { geometry, sha256, seen: 0, piece, values })
    }

    /// The next bytes of the blob. Fails when there are more than announced.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        self.seen += bytes.len() as u64;
        let expected = self.geometry.blob_len();
        if self.seen > expected {
            return Err(Error::BlobLength { actual: self.seen, expected });
        }
        self.sha256.update(bytes);
        while !bytes.is_empty() {
            let number = u32::try_from(self.values.len()).unwrap_or(u32::MAX);
            let span = self.geometry.span(number);
            let missing = span.end - span.start - self.piece.len() as u64;
            let len = usize::try_from(missing).map_or(bytes.len(), |n| n.min(bytes.len()));
            let (part, rest) = bytes.split_at(len);
            bytes = rest;
            // A piece in one part needs no copy.
            if (len as u64) < missing {
                self.piece.extend_from_slice(part);
            } else if self.piece.is_empty() {
                self.values.push(piece_value(self.geometry, number, part));
            } else {
                self.piece.extend_from_slice(part);
                self.values.push(piece_value(self.geometry, number, &self.piece));
                self.piece.clear();
            }
        }
        Ok(())
    }

    /// Fails if bytes are missing.
    pub fn finish(self) -> Result<Sums, Error> {
        let Self { geometry, sha256, seen, values, .. } = self;
        if seen != geometry.blob_len() {
            return Err(Error::BlobLength { actual: seen, expected: geometry.blob_len() });
        }
        Ok(Sums { geometry, blob: Digest::from_bytes(sha256.finalize().into()), values })
    }
}

/// What the decoded bytes say: the DiffID and the tree.
pub struct DataScan {
    sha256: Sha256,
    walk: TarWalk,
    tree: TreeBuilder,
}

/// What [`DataScan::finish`] returns.
pub struct Scanned {
    /// SHA-256 of the tar.
    pub diff_id: Digest,
    pub tree: Tree,
    pub tar_len: u64,
}

impl DataScan {
    pub fn new(limits: Limits) -> Self {
        let (walk, tree) = (TarWalk::new(limits.clone()), TreeBuilder::new(limits));
        Self { sha256: Sha256::new(), walk, tree }
    }

    /// The next bytes of the tar.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.sha256.update(bytes);
        let tree = &mut self.tree;
        self.walk
            .push(bytes, &mut |entry| Ok(tree.insert(entry)?))
            .map_err(|source| Error::Tar { source })
    }

    pub fn finish(self) -> Result<Scanned, Error> {
        let tar_len = self.walk.finish().map_err(|source| Error::Tar { source })?;
        let tree = self.tree.finish().map_err(|source| Error::Tree { source })?;
        Ok(Scanned { diff_id: Digest::from_bytes(self.sha256.finalize().into()), tree, tar_len })
    }
}

/// What [`assemble`] returns.
#[derive(Debug)]
pub struct Built {
    pub index: LayerIndex,
    /// `index`, encoded; its SHA-256 is in `table`.
    pub encoded: Vec<u8>,
    pub table: PieceTable,
    /// What the inodes were made from.
    pub tree: Tree,
}

/// The index and the piece table of a blob whose parts have all seen its end.
pub fn assemble(sums: Sums, decoded: Decoded, scanned: Scanned) -> Result<Built, Error> {
    let Decoded { compression, blob_len, data_len, chunks, windows } = decoded;
    let (actual, expected) = (sums.geometry.blob_len(), blob_len);
    if actual != expected {
        return Err(Error::BlobLength { actual, expected });
    }
    let Scanned { diff_id, tree, tar_len } = scanned;
    if data_len != tar_len {
        return Err(Error::DataLength { decoded: data_len, scanned: tar_len });
    }
    let image = erofs::write(&tree, tar_len).map_err(|source| Error::Inodes { source })?;
    let index = LayerIndex {
        compression,
        layout: Layout::Tar,
        blob_len,
        tar_len,
        data_len: image.data_len,
        inodes: image.bytes,
        copies: image.copies,
        chunks,
        windows,
    };
    let encoded = index.encode().map_err(|source| Error::Encode { source })?;
    let name = Digest::of(&encoded);
    let table = PieceTable::new(sums.geometry, sums.blob, diff_id, name, sums.values)
        .map_err(|source| Error::Table { source })?;
    Ok(Built { index, encoded, table, tree })
}

#[cfg(test)]
pub(crate) mod tests;
