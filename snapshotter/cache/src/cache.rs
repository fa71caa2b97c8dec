//! The cache: one directory of blobs and layers, and who has them open.
//!
//! Owns: the open handles (one per digest), the pins, the upkeep job (checkpoints, eviction).
//! Does not own: what is in the files.
//!
//! Documents are [`Documents`]'s. `evicted/` holds blobs on their way out. Nothing here is remembered outside the files themselves: blobs and layers are what is found under
//! `blobs-v1/` and `layers-v1/`, and their last use is their directory's modification time.

mod held;
mod stored;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::registry::Registry;
use skimmer_proto::Digest;
use tokio::task::{JoinError, spawn_blocking};

use crate::blob::{self, Blob, Shared};
use crate::disk;
use crate::documents::{self, Documents};
use crate::fetch::Fetcher;
use crate::layer::{self, LayerFiles};
use crate::metrics::Metrics;
use crate::planner::{Capacity, Limits};
use crate::source::{BlobRef, Sources};
use crate::space::Space;
use crate::upkeep;

pub use self::held::{Held, WeakCache};
pub use self::stored::{Entry, Prune};

pub(crate) const BLOBS: &str = "blobs-v1";
pub(crate) const LAYERS: &str = "layers-v1";
const DOCUMENTS: &str = "documents-v1";

/// Eviction starts here, as a share of the file system, unless the configuration says otherwise.
const DEFAULT_QUOTA_PERCENT: u64 = 80;

/// Connections to a source that only faults use.
const RESERVED_CONNECTIONS: usize = 2;

#[derive(Clone, Debug)]
pub struct Config {
    /// Holds `blobs-v1/` and `layers-v1/`.
    pub root: PathBuf,
    /// `None`: 80 % of the file system that `root` is on.
    pub quota_bytes: Option<u64>,
    /// How long a fetch that fails is tried again.
    pub deadline: Duration,
    /// Connections to a source at once, those that are reserved for faults not counted.
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

    fn limits(&self, sources: &Sources) -> Limits {
        let connections = self.connections + RESERVED_CONNECTIONS;
        let ranges = Capacity::Ranges { connections, reserved: RESERVED_CONNECTIONS };
        let pieces = sources.pieces.as_ref().map(|_| Capacity::Pieces);
        Limits {
            sources: pieces.into_iter().chain([ranges]).collect(),
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
    pub documents: Documents,
}

/// What the process has open. Who finds a handle with no other owner under this lock may close and
/// evict it.
#[derive(Debug, Default)]
pub(crate) struct Open {
    pub blobs: HashMap<Digest, Arc<Blob>>,
    pub layers: HashMap<Digest, Arc<LayerFiles>>,
    pub pins: HashMap<Digest, usize>,
    /// Layers whose data is to go as soon as nobody uses it.
    pub abandoned: BTreeSet<Digest>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make {}", path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error("ask for the size of the file system of {}", path.display())]
    FileSystem { path: PathBuf, source: io::Error },
    #[error("look through {}", path.display())]
    Scan { path: PathBuf, source: io::Error },
    #[error("open the cache's documents")]
    Documents(#[from] documents::Error),
    #[error("cache job ended early")]
    Job { source: JoinError },
}

impl Cache {
    /// Opens the cache in `config.root`. Must be called within a tokio runtime, which will run the
    /// transfers and the upkeep. Takes the same time whatever blobs and layers are cached.
    pub fn open(config: Config, sources: Sources, registry: &mut Registry) -> Result<Self, Error> {
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
        let (limits, stall) = (config.limits(&sources), config.stall);
        let (for_space, for_metrics) = (Arc::clone(&space), metrics.clone());
        let fetcher = Fetcher::new(sources, limits, stall, for_space, for_metrics);
        let (deadline, read_ahead_bytes) = (config.deadline, config.read_ahead_bytes);
        let shared = Shared { fetcher, space, metrics, deadline, read_ahead_bytes };
        let documents = Documents::open(config.root.join(DOCUMENTS))?;
        let inner = Arc::new(Inner { config, shared, open: Mutex::default(), documents });
        let for_upkeep = Arc::clone(&inner.shared.space);
        let job = upkeep::run(Arc::downgrade(&inner), for_upkeep, inner.config.checkpoint_interval);
        tokio::spawn(job);
        Ok(Self { inner })
    }

    /// The blob, made if there is none on disk. All callers share one per digest. Blocks briefly.
    pub fn blob(&self, blob: BlobRef) -> Result<Arc<Blob>, blob::Error> {
        let opened = self.opened(blob)?;
        touched(&self.inner.blob_dir(opened.digest()));
        Ok(opened)
    }

    fn opened(&self, blob: BlobRef) -> Result<Arc<Blob>, blob::Error> {
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
        Ok(opened)
    }

    /// The files of the layer whose blob is `blob`, on disk or not. All callers share one per digest.
    pub fn layer(&self, blob: Digest) -> Result<Arc<LayerFiles>, layer::Error> {
        match disk::touch(&self.inner.layer_dir(blob)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(layer::Error::Read { blob, name: "directory", source })
            }
            _ => Ok(self.inner.layer_files(blob)),
        }
    }

    /// As [`Self::layer`], but that isn't a use of it.
    pub fn peek_layer(&self, blob: Digest) -> Arc<LayerFiles> {
        self.inner.layer_files(blob)
    }

    /// While the pin lives, the layer isn't evicted. Its end is a use of the layer.
    pub fn pin_layer(&self, blob: Digest) -> Pin {
        self.pin(blob, true)
    }

    /// As [`Self::pin_layer`], but that isn't a use of it.
    pub fn pin_layer_untouched(&self, blob: Digest) -> Pin {
        self.pin(blob, false)
    }

    fn pin(&self, blob: Digest, is_use: bool) -> Pin {
        let mut open = self.inner.open();
        *open.pins.entry(blob).or_default() += 1;
        if is_use {
            open.abandoned.remove(&blob);
        }
        drop(open);
        Pin { blob, is_use, inner: Arc::clone(&self.inner) }
    }

    /// No image needs the layer any more: its data goes in the background, quota or not, once nobody has it open, and
    /// unless somebody [pins](Self::pin_layer) it first. The blob stays, within the quota. If the process ends before,
    /// the data stays likewise.
    pub fn abandon_layer(&self, blob: Digest) {
        self.inner.open().abandoned.insert(blob);
        self.inner.shared.space.upkeep.notify_one();
    }

    /// Manifests and configurations; bounded by themselves, beside the quota.
    pub fn documents(&self) -> &Documents {
        &self.inner.documents
    }

    pub fn usage(&self) -> Usage {
        let space = &self.inner.shared.space;
        Usage { used_bytes: space.used(), quota_bytes: space.quota_bytes }
    }

    /// Evicts something, after a write to a layer's data file failed with "no space left on
    /// device". The caller then tries once more.
    pub async fn make_room(&self) {
        self.inner.shared.space.make_room().await;
    }

    /// Records on disk what is present, so that nothing is fetched again after a restart. For the
    /// orderly end of the process.
    pub async fn drain(&self) -> Result<(), Error> {
        let inner = Arc::clone(&self.inner);
        spawn_blocking(move || inner.checkpoint()).await.map_err(|source| Error::Job { source })
    }
}

/// How full the cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Disk space in use; measured in the background, so right after the start less than it is.
    pub used_bytes: u64,
    pub quota_bytes: u64,
}

impl Open {
    pub fn is_blob_used(&self, digest: Digest) -> bool {
        self.blobs.get(&digest).is_some_and(|blob| Arc::strong_count(blob) > 1)
    }

    pub fn is_layer_used(&self, blob: Digest) -> bool {
        let is_read = |files: &Arc<LayerFiles>| files.is_read();
        self.pins.contains_key(&blob) || self.layers.get(&blob).is_some_and(is_read)
    }
}

impl Inner {
    pub fn layer_files(&self, blob: Digest) -> Arc<LayerFiles> {
        let mut open = self.open();
        let files = open.layers.entry(blob).or_insert_with(|| {
            let space = Arc::clone(&self.shared.space);
            Arc::new(LayerFiles::new(blob, self.layer_dir(blob), space))
        });
        Arc::clone(files)
    }

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
    is_use: bool,
    inner: Arc<Inner>,
}

impl Pin {
    /// Whether nobody else keeps the layer.
    pub fn is_only(&self) -> bool {
        self.inner.open().pins.get(&self.blob).is_none_or(|count| *count == 1)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut open = self.inner.open();
        if let Some(count) = open.pins.get_mut(&self.blob) {
            *count -= 1;
            if *count == 0 {
                open.pins.remove(&self.blob);
                if self.is_use {
                    touched(&self.inner.layer_dir(self.blob));
                }
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
