//! What goes on in the background: checkpoints, closing what nobody uses, measuring, evicting.
//!
//! One job a cache; it ends with the cache. Reads of the directory are O(entries) and happen here
//! only, so that opening a cache takes the same time whatever is in it.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use skimmer_proto::{Digest, error_chain};
use tokio::task::spawn_blocking;
use tracing::{debug, info, warn};

use crate::blob;
use crate::cache::{BLOBS, Error, Inner, LAYERS};
use crate::disk;
use crate::evict::{self, Candidate, What};
use crate::layer;
use crate::metrics::Evicted;
use crate::space::Space;

/// Evicted blobs on their way out; emptied at each start.
const TRASH: &str = "evicted";

/// While bytes come in, usage is measured this often, so that what is reported is true.
const MEASURE_INTERVAL: Duration = Duration::from_secs(60);

/// A writer that finds the disk full under the quota gets this share of what is in use evicted.
const ROOM_PERCENT: u64 = 10;

/// The background job.
pub async fn run(inner: Weak<Inner>, space: Arc<Space>, interval: Duration) {
    let began = Instant::now();
    let mut upkeep = Upkeep { began, measured: None, crowded: false };
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let round = spawn_blocking(move || {
            upkeep.round(&strong);
            upkeep
        });
        match round.await {
            Ok(after) => upkeep = after,
            Err(error) => {
                warn!(%error, "a round of cache upkeep failed");
                upkeep = Upkeep { began, measured: None, crowded: false };
            }
        }
        _ = tokio::time::timeout(interval, space.upkeep.notified()).await;
    }
}

/// What the job remembers between rounds.
struct Upkeep {
    began: Instant,
    /// When, and what the estimate was then.
    measured: Option<(Instant, u64)>,
    /// Over quota with nothing to evict.
    crowded: bool,
}

impl Upkeep {
    fn round(&mut self, inner: &Inner) {
        if self.measured.is_none() {
            empty_trash(inner);
        }
        inner.evict_abandoned();
        inner.checkpoint();
        inner.close_idle();
        let asked = inner.shared.space.asked();
        if (self.is_measuring_due(inner) || asked.is_some())
            && let Err(error) = self.measure_and_evict(inner, asked.is_some())
        {
            warn!(error = &error as &dyn std::error::Error, "cache could not be measured");
        }
        if let Some(round) = asked {
            inner.shared.space.made_room(round);
        }
        let used = inner.shared.space.used();
        inner.shared.metrics.used.set(i64::try_from(used).unwrap_or(i64::MAX));
    }

    fn is_measuring_due(&self, inner: &Inner) -> bool {
        let space = &inner.shared.space;
        self.measured.is_none_or(|(at, used)| {
            space.used() > space.quota_bytes
                || (space.used() != used && at.elapsed() > MEASURE_INTERVAL)
        })
    }

    fn measure_and_evict(&mut self, inner: &Inner, disk_full: bool) -> Result<(), Error> {
        let mut candidates = inner.candidates()?;
        let mut used = candidates.iter().map(|candidate| candidate.bytes).sum();
        let quota = inner.shared.space.quota_bytes;
        let mut excess = evict::excess(used, quota);
        let early = self.began.elapsed() < inner.config.eviction_delay;
        if disk_full {
            excess = excess.max(used / 100 * ROOM_PERCENT).max(1);
        } else if early {
            excess = 0;
        }
        if early {
            // Layers may be mounted that nobody has pinned yet.
            candidates.retain(|candidate| candidate.what <= What::PartialBlob);
        }
        let gone = inner.evict(evict::victims(candidates, excess));
        let freed: u64 = gone.iter().map(|gone| gone.bytes).sum();
        used -= freed.min(used);
        inner.shared.space.correct(used);
        self.measured = Some((Instant::now(), used));
        let crowded = excess > 0 && used > quota;
        if crowded && !self.crowded {
            warn!(used, quota, "cache is over its quota, and everything in it is in use");
        }
        self.crowded = crowded;
        Ok(())
    }
}

impl Inner {
    /// Records on disk what is present, for everything open. Blocks on the disk.
    pub fn checkpoint(&self) {
        let (blobs, layers) = {
            let open = self.open();
            // Those with nothing to record too: somebody else may be in the middle of it.
            let (blobs, layers) = (open.blobs.values(), open.layers.values());
            (blobs.cloned().collect::<Vec<_>>(), layers.cloned().collect::<Vec<_>>())
        };
        for blob in blobs {
            if let Err(error) = blob.checkpoint() {
                warn!(error = &error as &dyn std::error::Error, "blob checkpoint not written");
            }
        }
        for layer in layers {
            if let Err(error) = layer.checkpoint() {
                warn!(error = &error as &dyn std::error::Error, "layer checkpoint not written");
            }
        }
    }

    /// Closes what nobody uses and what is recorded on disk.
    fn close_idle(&self) {
        let mut open = self.open();
        open.blobs.retain(|_, blob| Arc::strong_count(blob) > 1 || blob.is_dirty());
        open.layers.retain(|_, layer| {
            let is_used = Arc::strong_count(layer) > 1 || layer.is_read() || layer.is_lent();
            is_used || layer.is_dirty()
        });
    }

    /// Gives up the data of layers that no image needs, as far as it isn't in use.
    fn evict_abandoned(&self) {
        let now = SystemTime::now();
        let idle: Vec<Digest> = {
            let open = self.open();
            let idle = open.abandoned.iter().filter(|blob| !open.is_layer_used(**blob));
            idle.copied().collect()
        };
        let data = idle.iter().filter_map(|digest| {
            let bytes = layer::data_allocated(&self.layer_dir(*digest)).ok()?;
            let (what, digest) = (What::Data, *digest);
            Some(Candidate { what, digest, bytes, last_use: now, in_use: false })
        });
        let gone = self.evict(data.collect());
        self.shared.space.discharge(gone.iter().map(|gone| gone.bytes).sum());
        // What somebody looked at just then goes next time.
        let is_there = |digest| self.layer_dir(digest).join(layer::DATA).exists();
        let done: Vec<Digest> = idle.into_iter().filter(|digest| !is_there(*digest)).collect();
        self.open().abandoned.retain(|digest| !done.contains(digest));
    }

    /// Everything on disk, with its size and use. What holds no byte, as after the death of a process that had just begun
    /// it, counts as one: it is to go too.
    pub fn candidates(&self) -> Result<Vec<Candidate>, Error> {
        let mut all = Vec::new();
        self.each(BLOBS, |digest, dir, last_use| {
            let data = fs::metadata(dir.join(blob::DATA));
            let what = match &data {
                Ok(metadata) if metadata.permissions().mode() & 0o222 == 0 => What::WholeBlob,
                _ => What::PartialBlob,
            };
            // What containerd has under a name of its own stays on disk whatever is removed here.
            let is_shared = data.is_ok_and(|metadata| metadata.nlink() > 1);
            let bytes = if is_shared { 0 } else { disk::allocated(dir)?.max(1) };
            let in_use = self.open().is_blob_used(digest);
            all.push(Candidate { what, digest, bytes, last_use, in_use });
            Ok(())
        })?;
        self.each(LAYERS, |digest, dir, last_use| {
            let data = layer::data_allocated(dir)?;
            let objects = disk::allocated(dir)?.saturating_sub(data).max(1);
            let in_use = self.open().is_layer_used(digest);
            let open = in_use.then(|| self.open().layers.get(&digest).cloned()).flatten();
            let cold = open.map_or(0, |files| files.cold_bytes()).min(data);
            for (what, bytes, in_use) in [
                (What::Data, data - cold, in_use),
                (What::Chunks, cold, false),
                (What::Objects, objects, in_use),
            ] {
                all.push(Candidate { what, digest, bytes, last_use, in_use });
            }
            Ok(())
        })?;
        Ok(all)
    }

    /// Visits the directories of `kind`; what has gone meanwhile is passed over.
    pub fn each(
        &self,
        kind: &str,
        mut visit: impl FnMut(Digest, &Path, SystemTime) -> io::Result<()>,
    ) -> Result<(), Error> {
        let path = self.config.root.join(kind);
        let failed = |source| Error::Scan { path: path.clone(), source };
        for entry in fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let Some(digest) = name.to_str().and_then(|name| Digest::from_hex(name).ok()) else {
                continue;
            };
            let visited = entry
                .metadata()
                .and_then(|metadata| visit(digest, &entry.path(), metadata.modified()?));
            match visited {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                visited => visited.map_err(failed)?,
            }
        }
        Ok(())
    }

    /// Evicts what isn't in use by now. What went, with the bytes that it freed.
    pub fn evict(&self, victims: Vec<Candidate>) -> Vec<Candidate> {
        let mut gone = Vec::new();
        for victim in victims {
            let (what, digest, bytes) = (victim.what.name(), victim.digest, victim.bytes);
            let whole = |gone| if gone { bytes } else { 0 };
            let evicted = match victim.what {
                What::WholeBlob | What::PartialBlob => self.evict_blob(digest).map(whole),
                What::Data => {
                    self.evict_layer(digest, |files, wants| files.evict_data(wants)).map(whole)
                }
                What::Chunks => self.evict_chunks(digest, bytes),
                What::Objects => {
                    self.evict_layer(digest, |files, wants| files.evict(wants)).map(whole)
                }
            };
            match evicted {
                Ok(0) => {}
                Ok(bytes) => {
                    debug!(what, %digest, bytes, "evicted");
                    gone.push(Candidate { bytes, ..victim });
                    let label = Evicted { what };
                    self.shared.metrics.evicted.get_or_create(&label).inc_by(bytes);
                }
                Err(error) => {
                    let error = error_chain(&error);
                    warn!(what, %digest, error, "could not be evicted");
                }
            }
        }
        if !gone.is_empty() {
            let bytes: u64 = gone.iter().map(|gone| gone.bytes).sum();
            info!(bytes, "evicted from the cache");
        }
        gone
    }

    /// Moves the directory away under the lock, so that nobody opens it half removed. Whether it was there: somebody
    /// else may evict at the same time.
    fn evict_blob(&self, digest: Digest) -> io::Result<bool> {
        /// The blob may be back, and evicted again, before it is removed.
        static MOVED: AtomicU64 = AtomicU64::new(0);
        let trash = self.config.root.join(TRASH);
        fs::create_dir_all(&trash)?;
        let gone = trash.join(format!("{}-{}", digest.hex(), MOVED.fetch_add(1, Relaxed)));
        let closed = {
            let mut open = self.open();
            if open.is_blob_used(digest) {
                return Ok(false);
            }
            match fs::rename(self.blob_dir(digest), &gone) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                moved => moved?,
            }
            open.blobs.remove(&digest)
        };
        drop(closed);
        if let Some(source) = self.shared.fetcher.piece_source() {
            source.forgotten(digest);
        }
        fs::remove_dir_all(&gone)?;
        Ok(true)
    }

    fn evict_layer(
        &self,
        digest: Digest,
        evict: impl FnOnce(&layer::LayerFiles, &dyn Fn() -> bool) -> Result<bool, layer::Error>,
    ) -> io::Result<bool> {
        if self.open().is_layer_used(digest) {
            return Ok(false);
        }
        // Whoever pins it and opens a file meanwhile waits, then finds it empty.
        let is_pinned = || self.open().pins.contains_key(&digest);
        evict(&self.layer_files(digest), &is_pinned).map_err(io::Error::other)
    }

    /// Frees `wanted` bytes of chunks of a layer in use, or as many as there are that nobody reads.
    fn evict_chunks(&self, digest: Digest, wanted: u64) -> io::Result<u64> {
        let files = self.open().layers.get(&digest).cloned();
        files.map_or(Ok(0), |files| files.punch_cold(wanted).map_err(io::Error::other))
    }
}

fn empty_trash(inner: &Inner) {
    match fs::remove_dir_all(inner.config.root.join(TRASH)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(%error, "left-overs of an eviction could not be removed");
        }
        _ => {}
    }
}
