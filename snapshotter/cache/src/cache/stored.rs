//! What is on disk, for those who look it through, and what takes the space.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use skimmer_proto::Digest;
use tokio::task::spawn_blocking;

use super::{BLOBS, Cache, Error, Inner, LAYERS};
use crate::disk;
use crate::evict::{self, Candidate, What};

/// Where the present pass of checks has got to (see [`crate::scrub`]).
const SCRUB: &str = "scrub-v1";

/// Something on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `blob`, `data`, `chunks` (of the data of a layer in use, those that nobody reads) or `objects`.
    pub what: &'static str,
    /// The digest of the blob, or of the layer's blob.
    pub digest: Digest,
    pub bytes: u64,
    pub last_use: SystemTime,
    pub in_use: bool,
}

/// What [`Cache::prune`] gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prune {
    /// What isn't in use.
    Unused,
    /// And chunks that nobody reads of layers in use.
    All,
}

impl Cache {
    /// The digests of all blobs and layers on disk, in order. Blocks.
    pub fn on_disk(&self) -> Result<Vec<Digest>, Error> {
        let mut all = BTreeSet::new();
        for kind in [BLOBS, LAYERS] {
            self.inner.each(kind, |digest, _, _| {
                all.insert(digest);
                Ok(())
            })?;
        }
        Ok(all.into_iter().collect())
    }

    /// Everything on disk, with its size. Blocks.
    pub fn entries(&self) -> Result<Vec<Entry>, Error> {
        let candidates = self.inner.candidates()?.into_iter();
        Ok(candidates.filter(|c| c.bytes > 0).map(Entry::from).collect())
    }

    /// Evicts what isn't in use. What went, with the bytes that it freed.
    pub async fn prune(&self, what: Prune) -> Result<Vec<Entry>, Error> {
        let inner = Arc::clone(&self.inner);
        let job = move || inner.prune(what);
        spawn_blocking(job).await.map_err(|source| Error::Job { source })?
    }

    /// Bytes and files that the blob and its layer take on disk. No use of them. Blocks.
    pub fn occupied(&self, digest: Digest) -> Result<(u64, u64), Error> {
        let (mut bytes, mut files) = (0, 0);
        for path in [self.inner.blob_dir(digest), self.inner.layer_dir(digest)] {
            let found = disk::occupied(&path).map_err(|source| Error::Scan { path, source })?;
            bytes += found.0;
            files += found.1;
        }
        Ok((bytes, files))
    }

    /// The text that [`Self::note_scrub`] wrote last. Blocks.
    pub fn scrub_note(&self) -> Option<String> {
        let bytes = disk::read_optional(&self.scrub_path()).ok()??;
        String::from_utf8(bytes).ok()
    }

    /// Remembers how far the present pass of checks has got. Blocks.
    pub fn note_scrub(&self, text: &str) -> io::Result<()> {
        disk::write_atomically(&self.inner.config.root, SCRUB, text.as_bytes())
    }

    fn scrub_path(&self) -> PathBuf {
        self.inner.config.root.join(SCRUB)
    }
}

impl Inner {
    fn prune(&self, what: Prune) -> Result<Vec<Entry>, Error> {
        let mut candidates = self.candidates()?;
        let used: u64 = candidates.iter().map(|candidate| candidate.bytes).sum();
        candidates.retain(|c| what == Prune::All || c.what != What::Chunks);
        let gone = self.evict(evict::victims(candidates, u64::MAX));
        let freed: u64 = gone.iter().map(|gone| gone.bytes).sum();
        self.shared.space.correct(used - freed.min(used));
        Ok(gone.into_iter().map(Entry::from).collect())
    }
}

impl From<Candidate> for Entry {
    fn from(candidate: Candidate) -> Self {
        let Candidate { what, digest, bytes, last_use, in_use } = candidate;
        Self { what: what.name(), digest, bytes, last_use, in_use }
    }
}
