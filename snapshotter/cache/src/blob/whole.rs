//! A blob whole and for good: what may be shared with others than the cache.

use std::fs::File;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use skimmer_proto::piece_table::piece_value;
use skimmer_proto::{Digest, PieceTable};
use tokio::task::spawn_blocking;

use super::{Blob, Error, Pieces};
use crate::source::Class;

/// Bytes that don't match the digest are fetched once more.
const ATTEMPTS: usize = 2;

/// A blob of which every byte is on disk and has matched its SHA-256. Its file has the blob's length,
/// mode 0444, and is never written again; while this lives it isn't evicted.
#[derive(Clone, Debug)]
pub struct Whole {
    blob: Arc<Blob>,
    pieces: Arc<Pieces>,
}

impl Whole {
    pub fn digest(&self) -> Digest {
        self.blob.digest()
    }

    /// Never zero, but for the blob of no bytes.
    pub fn size(&self) -> u64 {
        self.blob.len()
    }

    /// To be read, or to be given another name. Not to be written.
    pub fn file(&self) -> &File {
        &self.pieces.file
    }
}

impl Blob {
    /// Fetches what is missing, checks the whole by its SHA-256 unless that was done, and writes down
    /// that it was.
    pub async fn whole(self: &Arc<Self>, class: Class) -> Result<Whole, Error> {
        let mut attempt = 1;
        loop {
            let pieces = self.pieces();
            if !pieces.is_proved() {
                let (actual, root) = self.sums(class).await?;
                if actual != self.digest {
                    // With a table, a layer lives by these bytes: it is for the layer to find out.
                    if attempt == ATTEMPTS || self.table().is_some() {
                        return Err(Error::Digest { digest: self.digest, actual });
                    }
                    self.distrust().await?;
                    attempt += 1;
                    continue;
                }
                pieces.all_verified(root);
            }
            let written = Arc::clone(&pieces);
            let checkpoint = spawn_blocking(move || written.checkpoint()).await;
            checkpoint
                .unwrap_or_else(|error| Err(std::io::Error::other(error)))
                .map_err(|source| Error::Checkpoint { digest: self.digest, source })?;
            // Else they were replaced meanwhile.
            if pieces.is_sealed() && Arc::ptr_eq(&pieces, &self.pieces()) {
                return Ok(Whole { blob: Arc::clone(self), pieces });
            }
        }
    }

    /// The caller has read the whole blob, every byte of which is on disk: it matched its SHA-256, and
    /// `table` is what it gives.
    pub fn matched(&self, table: &PieceTable) {
        let pieces = self.pieces();
        if pieces.present.all() && table.blob == self.digest && table.geometry == self.geometry {
            pieces.all_verified(*table.root());
        }
    }

    /// SHA-256 and BLAKE3 root of the whole.
    async fn sums(self: &Arc<Self>, class: Class) -> Result<(Digest, [u8; 32]), Error> {
        let (geometry, digest) = (self.geometry, self.digest);
        let (mut hash, mut values) = (Sha256::new(), Vec::new());
        let mut pull = self.pull_through(class);
        while let Some(bytes) = pull.next().await? {
            let summed = spawn_blocking(move || {
                hash.update(&bytes);
                let piece = u32::try_from(values.len()).unwrap_or(u32::MAX);
                values.push(piece_value(geometry, piece, &bytes));
                (hash, values)
            });
            (hash, values) = summed.await.map_err(|error| Error::Read {
                digest,
                piece: 0,
                source: std::io::Error::other(error),
            })?;
        }
        let actual = Digest::from_bytes(hash.finalize().into());
        // What it decodes to has no part in the root.
        let table = PieceTable::new(geometry, digest, digest, digest, values);
        let table = table.map_err(|error| Error::Read {
            digest,
            piece: 0,
            source: std::io::Error::other(error),
        })?;
        Ok((actual, *table.root()))
    }
}
