//! The layers in use, and what they share.
//!
//! Owns: one [`Layer`] per blob and DiffID in use, the directory of mounts, the bounds on work.
//! Does not own: which snapshots need a layer: whoever calls [`Layers::begin`] says so with
//! [`Layers::release`].

mod batch;
pub(crate) mod bundle;
mod direct;
mod rot;
mod scrub;
mod status;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use prometheus_client::registry::Registry;
use skimmer_cache::Cache;
use skimmer_proto::Digest;
use skimmer_store::{Store, Sync, Table};
use tokio::runtime::Handle;
use tokio::sync::{OwnedMutexGuard, Semaphore, watch};

pub use bundle::{Error as BundleError, Shown};
pub use rot::{Checked, Error as CheckError, Pause};
pub use scrub::Scrub;
pub use status::{Mode, Status};

use crate::buffers::Buffers;
use crate::config::Config;
use crate::fill::Decoders;
use crate::fuse::answer::Leaving;
use crate::fuse::device::bound_idle_memory;
use crate::indexes::Indexes;
use crate::layer::{Cause, Layer, LayerSpec};
use crate::metrics::Metrics;
use crate::mount::{self, Keeping, Mounts, Reason, error_chain};
use crate::pulls::Pulls;
use crate::turns::Places;

/// Layers that are completed in the background at once.
const BACKGROUND_LAYERS: usize = 1;

/// Table of blobs whose index has been proved on this node: key: SHA-256, value: empty.
const PROVED: &str = "layers-proved-v1";

/// Table of blobs whose table of contents was found to be wrong: key: SHA-256, value: empty.
const WRONG_TOCS: &str = "layers-wrong-tocs-v1";

/// All layers in use. Clones share them; when the last is dropped, everything is unmounted.
#[derive(Clone)]
pub struct Layers {
    owner: Arc<Owner>,
}

struct Owner {
    shared: Arc<Shared>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.drain();
    }
}

/// What layers have in common.
pub(crate) struct Shared {
    pub config: Config,
    pub cache: Cache,
    pub mounts: Mounts,
    pub metrics: Arc<Metrics>,
    pub runtime: Handle,
    pub buffers: Arc<Buffers>,
    pub leaving: Leaving,
    pub decoders: Decoders,
    /// For reads that wait for bytes.
    pub places: Arc<Places>,
    pub pulls: Pulls,
    pub background: Arc<Semaphore>,
    /// How many layers have become complete.
    pub completed: watch::Sender<u64>,
    started: Instant,
    proved: Table,
    wrong_tocs: Table,
    /// Where indexes are shared with other nodes, if they are.
    pub indexes: OnceLock<Arc<dyn Indexes>>,
    layers: Mutex<BTreeMap<Key, Arc<Layer>>>,
    /// Held by whoever builds or loads a blob's index.
    writers: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

/// A blob and what an image claims that it decodes to: a claim is proved or refused by itself.
type Key = (Digest, Digest);

impl Layers {
    /// Opens the directory of mounts. Of what an earlier process left there, what can be taken over waits for
    /// [`Layers::resume`], the rest is unmounted. To be called on a tokio runtime, which runs the work. Blocks.
    pub fn open(
        config: Config,
        cache: Cache,
        store: &Store,
        keeping: Keeping,
        registry: &mut Registry,
    ) -> Result<Self, mount::Error> {
        bound_idle_memory();
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
        let buffers = Arc::<Buffers>::default();
        let shared = Shared {
            mounts: Mounts::open(&config.mounts, config.mode, keeping)?
                .labelled(config.selinux_context.as_deref()),
            metrics: Arc::new(Metrics::new(registry)),
            runtime: Handle::current(),
            decoders: Decoders::new(processors, Arc::clone(&buffers)),
            buffers,
            leaving: Leaving::default(),
            places: Places::new(config.fuse.max_waiting),
            pulls: Pulls::new(config.pulls),
            background: Arc::new(Semaphore::new(BACKGROUND_LAYERS)),
            completed: watch::Sender::new(0),
            started: Instant::now(),
            proved: store.table(PROVED),
            wrong_tocs: store.table(WRONG_TOCS),
            indexes: OnceLock::new(),
            layers: Mutex::default(),
            writers: Mutex::default(),
            config,
            cache,
        };
        for left in shared.mounts.take_left_data() {
            shared.cache.peek_layer(left.blob).lend_data(left.file);
        }
        let owner = Arc::new(Owner { shared: Arc::new(shared) });
        if owner.shared.mounts.reads_directly() {
            tracing::info!(
                "complete layers that memory has let go of are read from the disk, without a second copy in memory"
            );
            owner.shared.runtime.spawn(direct::run(Arc::downgrade(&owner)));
        }
        Ok(Self { owner })
    }

    /// Whether the kernel serves layers that are not complete yet; if not, why.
    pub fn lazily(&self) -> Result<(), &Reason> {
        self.shared().mounts.lazily()
    }

    /// The layer that `spec` describes, with work on it under way. Calling it again with the same
    /// blob and DiffID gives the same layer; a failed one is tried again.
    pub fn begin(&self, spec: LayerSpec) -> Arc<Layer> {
        let key = (spec.blob.digest, spec.diff_id);
        let mut layers = self.shared().layers();
        let layer = match layers.get(&key) {
            Some(layer) => {
                layer.update(&spec);
                Arc::clone(layer)
            }
            None => {
                let layer = Layer::new(Arc::clone(self.shared()), spec);
                layers.insert(key, Arc::clone(&layer));
                layer
            }
        };
        layer.want();
        layer
    }

    /// The layers of `blob` in use; several if images disagree about its DiffID.
    pub fn get(&self, blob: Digest) -> Vec<Arc<Layer>> {
        self.shared().of_blob(blob)
    }

    /// Nobody needs `blob` as a layer any more: unmounts it and lets the cache evict it. Files that
    /// are still open on the mount stay readable.
    pub async fn release(&self, blob: Digest) {
        let (layers, shared) = (self.get(blob), Arc::clone(self.shared()));
        let released = tokio::task::spawn_blocking(move || {
            layers.iter().for_each(Layer::release);
            if !shared.leaving.has_begun() {
                // Of an earlier process, if the layer could never be opened since.
                let left = shared.mounts.take_left(blob);
                left.into_iter().for_each(|left| shared.mounts.discard(left));
            }
        });
        if released.await.is_err() {
            tracing::error!(%blob, "releasing a layer was interrupted");
        }
    }

    /// Serves what an earlier process left mounted of these layers, which snapshots use, and unmounts the rest of
    /// it. Returns at once: who reads there waits until it is served.
    pub fn resume(&self, used: impl IntoIterator<Item = LayerSpec>) {
        let mounts = &self.shared().mounts;
        let left: BTreeSet<Digest> = mounts.left().into_iter().collect();
        let mut resumed = BTreeSet::new();
        for spec in used.into_iter().filter(|spec| left.contains(&spec.blob.digest)) {
            resumed.insert(spec.blob.digest);
            self.begin(spec);
        }
        for blob in left.difference(&resumed) {
            tracing::info!(layer = %blob, "unmounting a layer that no snapshot uses");
            mounts.take_left(*blob).into_iter().for_each(|left| mounts.discard(left));
        }
    }

    /// The blobs of layers that an earlier process served by mounts that nobody kept: their readers get errors.
    pub fn lost(&self) -> &BTreeSet<Digest> {
        self.shared().mounts.lost()
    }

    /// Leaves what is mounted to the next process, as far as it can live until then, and unmounts the rest. Blocks.
    pub fn leave(&self) {
        self.shared().leaving.begin();
        self.shared().mounts.begin_leaving();
        let all: Vec<_> = self.shared().layers().values().map(Arc::clone).collect();
        for layer in all {
            layer.leave();
            layer.release();
        }
    }

    /// Counts the layers that have become complete since the start.
    pub fn completed(&self) -> watch::Receiver<u64> {
        self.shared().completed.subscribe()
    }

    /// Unmounts everything. Blocks; what is fetched and decoded so far is kept.
    pub fn drain(&self) {
        self.shared().drain();
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.owner.shared
    }
}

impl Shared {
    /// Time since these layers were opened.
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// A turn at writing the index and data file of `blob`.
    pub async fn writer(&self, blob: Digest) -> OwnedMutexGuard<()> {
        let turn = {
            let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
            writers.retain(|_, turn| turn.strong_count() > 0);
            let known = writers.get(&blob).and_then(Weak::upgrade);
            let turn = known.unwrap_or_default();
            writers.insert(blob, Arc::downgrade(&turn));
            turn
        };
        turn.lock_owned().await
    }

    /// Drops `layer` unless somebody has begun it again.
    pub fn forget(&self, layer: &Arc<Layer>) {
        let mut layers = self.layers();
        let spec = layer.spec();
        let key = (spec.blob.digest, spec.diff_id);
        let same = layers.get(&key).is_some_and(|known| Arc::ptr_eq(known, layer));
        if same && layer.is_absent() {
            layers.remove(&key);
        }
    }

    pub fn is_proved(&self, blob: Digest) -> Result<bool, Cause> {
        self.proved.contains(blob.as_bytes()).map_err(|source| Cause::Record { source })
    }

    /// Remembers that the index of `blob` has been checked against all of its bytes. If it is
    /// forgotten in a crash, the layer is verified once more.
    pub fn record_proved(&self, blob: Digest) -> Result<(), Cause> {
        let written = self.proved.put(blob.as_bytes(), &[], Sync::Later);
        written.map_err(|source| Cause::Record { source })
    }

    pub fn forget_proved(&self, blob: Digest) {
        if let Err(error) = self.proved.delete(blob.as_bytes(), Sync::Now) {
            tracing::error!(layer = %blob, error = error_chain(&error), "wrong layer not struck off");
        }
    }

    /// Whether the TOC inside `blob` has deceived this node before.
    pub fn is_wrong_toc(&self, blob: Digest) -> Result<bool, skimmer_store::Error> {
        self.wrong_tocs.contains(blob.as_bytes())
    }

    pub fn record_wrong_toc(&self, blob: Digest) {
        if let Err(error) = self.wrong_tocs.put(blob.as_bytes(), &[], Sync::Now) {
            tracing::error!(layer = %blob, error = error_chain(&error), "wrong table of contents not remembered");
        }
    }

    fn layers(&self) -> MutexGuard<'_, BTreeMap<Key, Arc<Layer>>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of_blob(&self, blob: Digest) -> Vec<Arc<Layer>> {
        let first = (blob, Digest::from_bytes([0; 32]));
        let of_blob = self.layers();
        of_blob
            .range(first..)
            .take_while(|(key, _)| key.0 == blob)
            .map(|(_, l)| Arc::clone(l))
            .collect()
    }

    fn drain(&self) {
        let all: Vec<_> = self.layers().values().map(Arc::clone).collect();
        for layer in all {
            layer.release();
        }
    }
}
