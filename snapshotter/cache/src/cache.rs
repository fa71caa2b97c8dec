//! The cache: one directory of blobs and layers, and who has them open.
//!
//! Owns: the open handles (one per digest), the pins, the upkeep job (checkpoints, eviction).
//! Does not own: what is in the files.
//!
//! Nothing here is remembered outside the files themselves: blobs and layers are what is found under
//! `blobs-v1/` and `layers-v1/`, and their last use is their directory's modification time.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::registry::Registry;
use skimmer_proto::Digest;

use crate::blob::{self, Blob, Shared};
use crate::disk;
use crate::fetch::Fetcher;
use crate::layer::{self, LayerFiles};
use crate::metrics::Metrics;
use crate::planner::{Capacity, Limits};
use crate::source::{BlobRef, Source};
use crate::space::Space;

pub(crate) const BLOBS: &str = "blobs-v1";
pub(crate) const LAYERS: &str = "layers-v1";

/// Eviction starts here, as a share of the file system, unless the configuration says otherwise.
const DEFAULT_QUOTA_PERCENT: u64 = 80;

#[derive(Clone, Debug)]
pub struct Config {
    /// Holds `blobs-v1/` and `layers-v1/`.
    pub root: PathBuf,
    /// `None`: 80 % of the file system that `root` is on.
    pub quota_bytes: Option<u64>,
    /// How long a fetch that fails is tried again.
    pub deadline: Duration,
    /// Connections to a source at once, the one that is reserved for faults not counted.
    pub connections: usize,
    /// Of these, for one blob.
    pub connections_per_blob: usize,
    /// How far a pull-through fetches ahead of what has been consumed.
    pub read_ahead_bytes: u64,
    /// A stream that brings nothing for so long is given up.
    pub stall: Duration,
    /// Time between checkpoints of what is being filled.
    pub checkpoint_interval: Duration,
    /// Nothing is evicted so soon after the start: layers in use have to be pinned first.
    pub eviction_delay: Duration,
}

impl Config {
    /// The defaults, in `root`.
    pub const fn new(root: PathBuf) -> Self {
        Self {
            root,
            quota_bytes: None,
            deadline: Duration::from_secs(300),
            connections: 16,
            connections_per_blob: 4,
            read_ahead_bytes: 64 << 20,
            stall: Duration::from_secs(60),
            checkpoint_interval: Duration::from_secs(10),
            eviction_delay: Duration::from_secs(60),
        }
    }

    fn limits(&self, sources: usize) -> Limits {
        let capacity = Capacity { connections: self.connections + 1, reserved: 1 };
        Limits {
            sources: vec![capacity; sources],
            per_blob: self.connections_per_blob,
            background: 2,
            run_bytes: [4 << 20, 4 << 20, 1 << 20],
            wrong: 3,
            backoff: Duration::from_millis(250),
            backoff_max: Duration::from_secs(10),
            deadline: self.deadline,
        }
    }
}

/// Cheap to clone; all clones are one cache.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub config: Config,
    pub shared: Shared,
    pub open: Mutex<Open>,
}

/// What the process has open. Who finds a handle with no other owner under this lock may close and
/// evict it.
#[derive(Debug, Default)]
pub(crate) struct Open {
    pub blobs: HashMap<Digest, Arc<Blob>>,
    pub layers: HashMap<Digest, Arc<LayerFiles>>,
    pub pins: HashMap<Digest, usize>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make {}", path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error("ask for the size of the file system of {}", path.display())]
    FileSystem { path: PathBuf, source: io::Error },
}

impl Cache {
    /// Opens the cache in `config.root`. Must be called within a tokio runtime, which will run the
    /// transfers and the upkeep. Takes the same time whatever is cached.
    pub fn open(
        config: Config,
        source: Arc<dyn Source>,
        registry: &mut Registry,
    ) -> Result<Self, Error> {
        for name in [BLOBS, LAYERS] {
            let path = config.root.join(name);
            fs::create_dir_all(&path).map_err(|source| Error::Make { path, source })?;
        }
        let quota_bytes = match config.quota_bytes {
            Some(bytes) => bytes,
            None => default_quota(&config.root)?,
        };
        let metrics = Metrics::register(registry);
        metrics.quota.set(i64::try_from(quota_bytes).unwrap_or(i64::MAX));
        let space = Arc::new(Space::new(quota_bytes));
        let (limits, stall) = (config.limits(1), config.stall);
        let (for_space, for_metrics) = (Arc::clone(&space), metrics.clone());
        let fetcher = Fetcher::new(vec![source], limits, stall, for_space, for_metrics);
        let (deadline, read_ahead_bytes) = (config.deadline, config.read_ahead_bytes);
        let shared = Shared { fetcher, space, metrics, deadline, read_ahead_bytes };
        let inner = Arc::new(Inner { config, shared, open: Mutex::default() });
        Ok(Self { inner })
    }

    /// The blob, made if there is none on disk. All callers share one per digest. Blocks briefly.
    pub fn blob(&self, blob: BlobRef) -> Result<Arc<Blob>, blob::Error> {
        let mut open = self.inner.open();
        let dir = self.inner.blob_dir(blob.digest);
        if let Some(known) = open.blobs.get(&blob.digest) {
            if known.len() == blob.len {
                known.add_origins(blob.origins);
                return Ok(Arc::clone(known));
            }
            // One of the two manifests lies; who has proof, or came first, is believed.
            if Arc::strong_count(known) > 1 || known.is_verified() {
                let (digest, known, claimed) = (blob.digest, known.len(), blob.len);
                return Err(blob::Error::Length { digest, claimed, known });
            }
            open.blobs.remove(&blob.digest);
        }
        let digest = blob.digest;
        let opened = Arc::new(Blob::open(&dir, blob, self.inner.shared.clone())?);
        open.blobs.insert(digest, Arc::clone(&opened));
        touched(&dir);
        Ok(opened)
    }

    /// The files of the layer whose blob is `blob`. All callers share one per digest.
    pub fn layer(&self, blob: Digest) -> Result<Arc<LayerFiles>, layer::Error> {
        let mut open = self.inner.open();
        let dir = self.inner.layer_dir(blob);
        if dir.exists() {
            touched(&dir);
        }
        let space = &self.inner.shared.space;
        let files = open.layers.entry(blob);
        let files =
            files.or_insert_with(|| Arc::new(LayerFiles::new(blob, dir, Arc::clone(space))));
        Ok(Arc::clone(files))
    }

    /// While the pin lives, the layer isn't evicted.
    pub fn pin_layer(&self, blob: Digest) -> Pin {
        *self.inner.open().pins.entry(blob).or_default() += 1;
        Pin { blob, inner: Arc::clone(&self.inner) }
    }
}

impl Inner {
    pub fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn blob_dir(&self, digest: Digest) -> PathBuf {
        self.config.root.join(BLOBS).join(digest.hex())
    }

    pub fn layer_dir(&self, blob: Digest) -> PathBuf {
        self.config.root.join(LAYERS).join(blob.hex())
    }
}

/// Keeps a layer from eviction: it is mounted, or about to be.
#[derive(Debug)]
pub struct Pin {
    blob: Digest,
    inner: Arc<Inner>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut open = self.inner.open();
        if let Some(count) = open.pins.get_mut(&self.blob) {
            *count -= 1;
            if *count == 0 {
                open.pins.remove(&self.blob);
                touched(&self.inner.layer_dir(self.blob));
            }
        }
    }
}

/// Notes a use. A failure costs the entry its place in the order of eviction, no more.
fn touched(dir: &Path) {
    if let Err(error) = disk::touch(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::debug!(dir = %dir.display(), %error, "last use not noted");
    }
}

fn default_quota(root: &Path) -> Result<u64, Error> {
    let stat = nix::sys::statvfs::statvfs(root)
        .map_err(|errno| Error::FileSystem { path: root.to_owned(), source: errno.into() })?;
    Ok(stat.blocks() * stat.fragment_size() / 100 * DEFAULT_QUOTA_PERCENT)
}
