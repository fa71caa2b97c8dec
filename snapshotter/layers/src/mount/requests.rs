//! What is under way in FUSE mounts whose kernel doesn't send it to the next process by itself.
//!
//! Owns: the journal of all mounts (see [`journal`]), made when the first of them needs it; its descriptor's name.
//! Does not own: the mounts' descriptors, by which the next process answers.
//!
//! Invariant: what is left of a mount waits until that is served or unmounted.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use fuser::InitFlags;
use skimmer_keeper::Keeper;

use super::error_chain;
use super::left::{Name, requests_name};
use crate::fuse::device::Device;
use crate::fuse::journal::{self, Journal, Left, Recorder};
use crate::fuse::replay::replay;
use crate::fuse::{Content, LayerFs};

/// See the module's documentation.
pub struct Requests {
    name: String,
    /// Without one there is no next process that could answer.
    keeper: Option<Arc<dyn Keeper>>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    journal: Option<Arc<Journal>>,
    left: Left,
}

impl Requests {
    /// Of the mounts in directory `root`.
    pub fn new(root: &Path, keeper: Option<Arc<dyn Keeper>>) -> Self {
        let name = requests_name(Name::place_of(root), journal::VERSION);
        Self { name, keeper, inner: Mutex::default() }
    }

    /// Under which the journal is kept.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes over what an earlier process left.
    pub fn find(&self, descriptor: Option<OwnedFd>) {
        let Some(found) = descriptor.map(Journal::left) else { return };
        match found {
            Ok((journal, left)) => *self.inner() = Inner { journal: Some(journal), left },
            Err(error) => {
                tracing::error!(%error, "what an earlier process was asked and didn't answer is lost");
            }
        }
    }

    /// Has the requests of mount `id` written down from now on, unless its kernel sends them again by itself.
    pub fn record(&self, id: u64, flags: InitFlags, recorder: &OnceLock<Recorder>) {
        let Some(keeper) = &self.keeper else { return };
        if flags.contains(InitFlags::FUSE_HAS_RESEND) {
            return;
        }
        let mut inner = self.inner();
        if inner.journal.is_none() {
            inner.journal = self.make(keeper.as_ref());
        }
        let Some(journal) = &inner.journal else { return };
        match journal.recorder(id) {
            Some(new) => drop(recorder.set(new)),
            None => {
                tracing::warn!(mount = id, "there are too many mounts to write down what is asked");
            }
        }
    }

    fn make(&self, keeper: &dyn Keeper) -> Option<Arc<Journal>> {
        let journal = Journal::new().inspect_err(|error| {
            tracing::warn!(%error, "what is under way when this process dies will be lost");
        });
        let journal = journal.ok()?;
        if let Err(error) = keeper.keep(&self.name, journal.as_fd()) {
            // It may be back before it is needed.
            tracing::warn!(
                error = error_chain(&error),
                "what is under way may be lost when this process dies"
            );
        }
        Some(journal)
    }

    /// Answers what an earlier process took of mount `id` and left, by what `file_system` says, which then writes down
    /// what it is asked.
    pub fn resume<C: Content>(
        &self,
        id: u64,
        device: &Device,
        file_system: &LayerFs<C>,
        flags: InitFlags,
    ) {
        let taken = self.inner().left.remove(&id).unwrap_or_default();
        if let Err(error) = replay(device, file_system, flags, taken) {
            tracing::error!(mount = id, %error, "readers who wait since an earlier process aren't all answered");
        }
        self.record(id, flags, &file_system.recorder());
    }

    /// Nobody is going to serve mount `id`.
    pub fn forget(&self, id: u64) {
        self.retain(|left| left != id);
    }

    /// Nobody is going to serve what an earlier process left, but the mounts that `is_wanted` tells of.
    pub fn retain(&self, is_wanted: impl Fn(u64) -> bool) {
        let mut inner = self.inner();
        let Inner { journal: Some(journal), left } = &mut *inner else { return };
        left.retain(|id, _| {
            let wanted = is_wanted(*id);
            if !wanted {
                journal.forget(*id);
            }
            wanted
        });
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
