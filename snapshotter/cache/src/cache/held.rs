//! What a cache holds, for those who serve it to other nodes.

use std::sync::{Arc, Weak};

use skimmer_proto::{Digest, PieceTable};
use tokio::task::spawn_blocking;

use super::{BLOBS, Cache, Error, Inner, touched};
use crate::blob::{self, Blob, Pieces};
use crate::source::{BlobKind, BlobRef};

/// A blob that has some bytes on disk.
#[derive(Clone, Debug)]
pub struct Held {
    pub blob: Arc<Blob>,
    /// A table that was trusted here; its pieces may be vouched for.
    pub table: Option<Arc<PieceTable>>,
}

impl Cache {
    /// The blob, if it is open or has bytes on disk. Blocks briefly.
    pub fn held(&self, digest: Digest) -> Result<Option<Held>, blob::Error> {
        let held = self.peek(digest)?;
        if held.is_some() {
            touched(&self.inner.blob_dir(digest));
        }
        Ok(held)
    }

    /// As [`Self::held`], but that isn't a use of it.
    pub fn peek(&self, digest: Digest) -> Result<Option<Held>, blob::Error> {
        let dir = self.inner.blob_dir(digest);
        let open = self.inner.open().blobs.get(&digest).cloned();
        let blob = match open {
            Some(blob) => blob,
            None => {
                let stored = Pieces::stored_len(&dir);
                let failed = |source| blob::Error::Open { digest, dir: dir.clone(), source };
                let Some((len, _)) = stored.map_err(failed)? else { return Ok(None) };
                let origins = Vec::new();
                self.opened(BlobRef { digest, len, kind: BlobKind::Blob, origins })?
            }
        };
        let table = blob.table().or_else(|| self.stored_table(&blob));
        Ok(Some(Held { blob, table }))
    }

    /// The digests of all blobs that have a directory. Time O(blobs).
    pub async fn inventory(&self) -> Result<Vec<Digest>, Error> {
        let inner = Arc::clone(&self.inner);
        let job = move || {
            let mut digests = Vec::new();
            inner.each(BLOBS, |digest, _, _| {
                digests.push(digest);
                Ok(())
            })?;
            Ok(digests)
        };
        spawn_blocking(job).await.map_err(|source| Error::Job { source })?
    }

    /// A handle that doesn't keep the cache open.
    pub fn downgrade(&self) -> WeakCache {
        WeakCache { inner: Arc::downgrade(&self.inner) }
    }

    fn stored_table(&self, blob: &Blob) -> Option<Arc<PieceTable>> {
        let files = self.inner.layer_files(blob.digest());
        let table = files.table().ok().flatten()?;
        (table.geometry == blob.geometry()).then(|| Arc::new(table))
    }
}

/// See [`Cache::downgrade`].
#[derive(Clone, Debug)]
pub struct WeakCache {
    inner: Weak<Inner>,
}

impl WeakCache {
    pub fn upgrade(&self) -> Option<Cache> {
        self.inner.upgrade().map(|inner| Cache { inner })
    }
}
