//! One layer: from "wanted" to a mount, and back.
//!
//! Owns: the layer's state machine, its open files, its mount, the work under way for it.
//! Does not own: bytes on disk (the cache's), which layers there are (see [`crate::layers`]).
//!
//! Invariants:
//! - What [`State`] says to do is done in the order in which it was decided, one at a time.
//! - While a layer is open it is pinned in the cache.
//! - What is mounted stays mounted until the layer is released, also when a better way was found: who mounts it from
//!   then on gets that.
//! - Only [`crate::Layers::begin`] brings a released layer back; whoever still holds one gets an
//!   error.

mod complete;
mod error;
mod filler;
mod implicit;
mod mended;
mod mounting;
mod open;
mod toc;
mod verify;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use skimmer_cache::{BlobRef, Class};
use skimmer_proto::Digest;
use tokio::sync::watch;

use crate::layers::Shared;
use crate::mount::{Mount, error_chain};
use crate::pulls::Turn;
use crate::state::{Action, Event, Machine, State};
pub use error::{Cause, LayerError};
use mounting::Again;
pub(crate) use open::Open;
pub use verify::Error as VerifyError;

/// A layer of an image, as the image's manifest and config describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSpec {
    pub blob: BlobRef,
    /// From the manifest; a hint.
    pub media_type: String,
    /// From the config: what the decoded tar must hash to.
    pub diff_id: Digest,
    /// The image's name, for messages.
    pub image: String,
    /// From the manifest: the digest that the table of contents inside the blob must have, if the
    /// manifest gives one.
    pub toc_digest: Option<Digest>,
}

/// Where a layer is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    pub id: u64,
    pub path: PathBuf,
}

/// Why a layer failed; shared by all who waited for it.
pub type Failure = Arc<LayerError>;

/// One layer in use. Made by [`crate::Layers::begin`].
pub struct Layer {
    shared: Arc<Shared>,
    spec: Mutex<LayerSpec>,
    core: Mutex<Core>,
    /// Sent to whenever the state may have changed.
    changed: watch::Sender<()>,
    /// Held by whoever mounts.
    mounting: Arc<tokio::sync::Mutex<()>>,
    /// Held by whoever completes.
    completing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Core {
    machine: Machine<Failure>,
    open: Option<Arc<Open>>,
    mount: Option<Mount>,
    /// What was mounted before there was a better way; containers may be using it.
    former: Vec<Mount>,
    /// Id of the mount, or of the one to come.
    place: Option<u64>,
    /// For a pull-through, while it isn't known whether there has to be one.
    turn: Option<Turn>,
    again: Again,
}

impl Layer {
    pub(crate) fn new(shared: Arc<Shared>, spec: LayerSpec) -> Arc<Self> {
        Arc::new(Self {
            shared,
            spec: Mutex::new(spec),
            core: Mutex::default(),
            changed: watch::Sender::new(()),
            mounting: Arc::default(),
            completing: tokio::sync::Mutex::default(),
        })
    }

    pub fn spec(&self) -> LayerSpec {
        self.spec.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn digest(&self) -> Digest {
        self.spec.lock().unwrap_or_else(PoisonError::into_inner).blob.digest
    }

    pub fn state(&self) -> State<Failure> {
        self.core().machine.state().clone()
    }

    /// Waits until the layer can be mounted. A layer that failed a while ago is tried again.
    pub async fn ready(self: &Arc<Self>) -> Result<(), Failure> {
        let mut changes = self.changed.subscribe();
        if !matches!(self.state(), State::Absent) {
            self.want();
        }
        loop {
            match self.state() {
                State::Lazy | State::Local => return Ok(()),
                State::Failed { error, .. } => return Err(error),
                State::Absent => return Err(self.failure(Cause::Released)),
                State::Opening | State::PullThrough => {}
            }
            // The sender lives in `self`.
            let _ = changes.changed().await;
        }
    }

    /// Whether the layer has no index, and is mounted by the table of contents inside its blob.
    pub(crate) fn is_provisional(&self) -> bool {
        self.opened().is_some_and(|open| open.toc.is_some())
    }

    pub(crate) const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn opened(&self) -> Option<Arc<Open>> {
        self.core().open.clone()
    }

    /// Somebody needs the layer.
    pub(crate) fn want(self: &Arc<Self>) {
        self.apply(Event::Wanted, None);
    }

    /// Nobody needs it any more. Blocks for as long as an unmount takes.
    pub(crate) fn release(self: &Arc<Self>) {
        self.apply(Event::Released, None);
    }

    /// Newer knowledge of where the blob may be had.
    pub(crate) fn update(&self, spec: &LayerSpec) {
        let mut known = self.spec.lock().unwrap_or_else(PoisonError::into_inner);
        known.clone_from(spec);
    }

    pub(crate) fn is_absent(&self) -> bool {
        matches!(self.core().machine.state(), State::Absent)
    }

    /// Feeds the state machine and does what it says. `open` comes with [`Event::Ready`], and with
    /// [`Event::Completed`] if the layer is opened anew.
    fn apply(self: &Arc<Self>, event: Event<Failure>, open: Option<Arc<Open>>) {
        let now = self.shared.now();
        let (action, closed, completed, turn) = {
            let mut core = self.core();
            let state = core.machine.state();
            let before = matches!(state, State::Local);
            if open.is_some() && (state.is_working() || state.is_ready()) {
                core.open = open;
                core.outgrow();
            }
            let action = core.machine.apply(now, event);
            let completed = !before && matches!(core.machine.state(), State::Local);
            let closed = (action == Action::Close).then(|| {
                core.place = None;
                (core.take_mounts(), core.open.take())
            });
            let opening = matches!(core.machine.state(), State::Opening);
            let turn = if opening { None } else { core.turn.take() };
            if action == Action::Open {
                core.turn = Some(self.shared.pulls.queue());
            }
            (action, closed, completed, turn)
        };
        self.changed.send_replace(());
        if completed {
            self.shared.completed.send_modify(|count| *count += 1);
        }
        match action {
            Action::Nothing => {}
            Action::Open => self.spawn(Self::open),
            Action::PullThrough => self.spawn(|layer| layer.pull_through(turn)),
            Action::Close => {
                let (mounts, open) = closed.unwrap_or_default();
                self.close(mounts, open.as_deref());
            }
        }
    }

    fn close(self: &Arc<Self>, mounts: Vec<Mount>, open: Option<&Open>) {
        for mount in mounts {
            self.shared.metrics.mounts.dec();
            if let Err(error) = mount.unmount() {
                tracing::warn!(layer = %self.digest(), error = error_chain(&error), "mount left behind");
            }
        }
        if let Some(open) = open {
            open.checkpoint();
        }
        self.shared.forget(self);
    }

    fn spawn<F>(self: &Arc<Self>, work: impl FnOnce(Arc<Self>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.shared.runtime.spawn(work(Arc::clone(self)));
    }

    /// Looks for the layer on disk.
    async fn open(self: Arc<Self>) {
        let spec = self.spec();
        let writer = self.shared.writer(spec.blob.digest).await;
        let shared = Arc::clone(&self.shared);
        let found = tokio::task::spawn_blocking(move || Open::load(&shared, &spec))
            .await
            .unwrap_or(Err(Cause::Interrupted));
        let found = match found {
            Ok(None) => Ok(match self.open_by_others().await {
                Some(open) => Some(open),
                None => self.open_by_toc().await,
            }),
            found => found,
        };
        // The pull-through takes its own turn.
        drop(writer);
        match found {
            Ok(Some(open)) => self.ready_with(open),
            Ok(None) => self.apply(Event::NoIndex, None),
            Err(cause) => self.fail(cause),
        }
    }

    async fn pull_through(self: Arc<Self>, turn: Option<Turn>) {
        let spec = self.spec();
        let turn = turn.unwrap_or_else(|| self.shared.pulls.queue());
        let Some(_turn) = turn.come().await else { return };
        let _writer = self.shared.writer(spec.blob.digest).await;
        match Open::pull(&self.shared, &spec, Class::PullThrough).await {
            Ok((open, _)) => {
                self.publish(open.fill.blob().table());
                self.ready_with(open);
            }
            Err(cause) => {
                self.shared.metrics.failed_pulls.inc();
                self.fail(cause);
            }
        }
    }

    fn ready_with(self: &Arc<Self>, open: Open) {
        let complete = open.is_local();
        self.apply(Event::Ready { complete }, Some(Arc::new(open)));
        self.take_over_later();
        if !complete && self.spec().blob.len < self.shared.config.min_layer_bytes {
            self.complete_now();
        }
    }

    fn fail(self: &Arc<Self>, cause: Cause) {
        let failure = self.failure(cause);
        tracing::warn!(layer = %failure.layer, image = failure.image, error = error_chain(&*failure), "layer failed");
        self.apply(Event::Failed(failure), None);
        self.take_over_again();
    }

    /// Bytes that were on disk are there no more: what is local is no longer, until it has been completed again.
    /// Whether it was local.
    pub(crate) fn lose(self: &Arc<Self>) -> bool {
        let is_local = matches!(self.state(), State::Local);
        if is_local {
            self.apply(Event::Lost, None);
        }
        is_local
    }

    fn failure(&self, cause: Cause) -> Failure {
        let spec = self.spec();
        Arc::new(LayerError { layer: spec.blob.digest, image: spec.image, cause })
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
