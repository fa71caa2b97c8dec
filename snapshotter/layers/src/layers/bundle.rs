//! A layer's index as one file, to be carried from node to node by hand.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | magic `SKBUNDL1` |
//! | 8 | length of the piece table, little-endian |
//! | … | the encoded piece table |
//! | … | the encoded layer index, to the end |

use skimmer_cache::LayerObjects;
use skimmer_index::erofs::Inodes;
use skimmer_index::index::LayerIndex;
use skimmer_proto::{Digest, PieceTable, piece_table};

use super::Layers;
use crate::layer::Cause;

const MAGIC: &[u8; 8] = b"SKBUNDL1";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("layer {0} has no index on this node: build it with `skimmer index build`")]
    None(Digest),
    #[error("this is not an exported index: it does not start with SKBUNDL1")]
    Magic,
    #[error("the exported index is cut short")]
    Short,
    #[error("read the piece table of the exported index")]
    Table { source: piece_table::Error },
    #[error("the exported index has the digest {actual}, its piece table names {expected}")]
    Index { expected: Digest, actual: Digest },
    #[error("read the index of layer {layer}")]
    Decode { layer: Digest, source: skimmer_index::index::Error },
    #[error("read the inodes of layer {layer}")]
    Inodes { layer: Digest, source: skimmer_index::erofs::ReadError },
    #[error("layer {0} is in use on this node with another index")]
    InUse(Digest),
    #[error("layer {layer}")]
    Layer { layer: Digest, source: Box<Cause> },
}

/// What is known of a layer by its index.
#[derive(Clone, Debug)]
pub struct Shown {
    pub index: LayerIndex,
    /// `index`, encoded.
    pub encoded: Vec<u8>,
    pub table: PieceTable,
    pub inodes: u64,
}

impl Layers {
    /// The index of `blob`, as it is on disk. Blocks.
    pub fn show(&self, blob: Digest) -> Result<Shown, Error> {
        let found = self.stored(blob).map_err(|cause| failed(blob, cause))?;
        found.ok_or(Error::None(blob))
    }

    /// The index of `blob` as a bundle. Blocks.
    pub fn export(&self, blob: Digest) -> Result<Vec<u8>, Error> {
        let Shown { encoded, table, .. } = self.show(blob)?;
        let table = table.encode();
        let mut out = Vec::with_capacity(16 + table.len() + encoded.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&(table.len() as u64).to_le_bytes());
        out.extend_from_slice(&table);
        out.extend_from_slice(&encoded);
        Ok(out)
    }

    /// Stores the index in `bundle`, which the caller vouches for: a lie in it shows when the layer
    /// is complete. The bytes of the layer come as they are needed. Returns the blob's digest.
    pub async fn import(&self, bundle: Vec<u8>) -> Result<Digest, Error> {
        let (table, encoded) = split(&bundle)?;
        let shown = decode(table, encoded)?;
        let layer = shown.table.blob;
        let this = self.clone();
        let _turn = self.shared().writer(layer).await;
        let stored = tokio::task::spawn_blocking(move || this.replace(&shown));
        let interrupted = |_| Err(failed(layer, Cause::Interrupted));
        stored.await.unwrap_or_else(interrupted).map(|()| layer)
    }

    fn replace(&self, shown: &Shown) -> Result<(), Error> {
        let layer = shown.table.blob;
        let known = self.stored(layer).map_err(|cause| failed(layer, cause))?;
        if known.is_some_and(|known| known.table == shown.table) {
            return Ok(());
        }
        if !self.get(layer).is_empty() {
            return Err(Error::InUse(layer));
        }
        // An eviction must not take the layer's folder away while it is written into.
        let _pin = self.shared().cache.pin_layer(layer);
        let files = self.shared().cache.layer(layer);
        let files = files.map_err(|source| failed(layer, Cause::Files { source }))?;
        self.shared().forget_proved(layer);
        let stored = files.store(&shown.encoded, &shown.table, &shown.index.inodes);
        stored.map_err(|source| failed(layer, Cause::Files { source }))
    }

    /// The index of `blob` on disk, if there is one that can be read.
    pub(super) fn stored(&self, blob: Digest) -> Result<Option<Shown>, Cause> {
        let files = self.shared().cache.layer(blob).map_err(|source| Cause::Files { source })?;
        let loaded = files.load().map_err(|source| Cause::Files { source })?;
        Ok(loaded.and_then(|LayerObjects { index, table }| decode(table, index).ok()))
    }
}

fn failed(layer: Digest, cause: Cause) -> Error {
    Error::Layer { layer, source: Box::new(cause) }
}

fn split(bundle: &[u8]) -> Result<(PieceTable, Vec<u8>), Error> {
    let rest = bundle.strip_prefix(MAGIC).ok_or(Error::Magic)?;
    let (len, rest) = rest.split_first_chunk::<8>().ok_or(Error::Short)?;
    let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| Error::Short)?;
    let (table, index) = rest.split_at_checked(len).ok_or(Error::Short)?;
    let table = PieceTable::decode(table).map_err(|source| Error::Table { source })?;
    Ok((table, index.to_vec()))
}

/// Checks everything that can be checked without the blob.
pub fn decode(table: PieceTable, encoded: Vec<u8>) -> Result<Shown, Error> {
    let (layer, actual) = (table.blob, Digest::of(&encoded));
    if actual != table.index {
        return Err(Error::Index { expected: table.index, actual });
    }
    let index = LayerIndex::decode(&encoded).map_err(|source| Error::Decode { layer, source })?;
    let inodes = Inodes::open(index.inodes.as_slice(), index.data_len)
        .map_err(|source| Error::Inodes { layer, source })?
        .inode_count();
    Ok(Shown { index, encoded, table, inodes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_no_bundle() {
        let long = [MAGIC.as_slice(), &[255; 8], b"x"].concat();
        let no_table = [MAGIC.as_slice(), &[3, 0, 0, 0, 0, 0, 0, 0], b"abcd"].concat();
        type Row<'a> = (&'a [u8], fn(&Error) -> bool);
        let rows: [Row<'_>; 5] = [
            (b"", |e| matches!(e, Error::Magic)),
            (b"SKBUNDL2", |e| matches!(e, Error::Magic)),
            (b"SKBUNDL1abc", |e| matches!(e, Error::Short)),
            (&long, |e| matches!(e, Error::Short)),
            (&no_table, |e| matches!(e, Error::Table { .. })),
        ];
        for (input, expected) in rows {
            let error = split(input).expect_err("not a bundle");
            assert!(expected(&error), "{input:?}: {error}");
        }
    }
}
