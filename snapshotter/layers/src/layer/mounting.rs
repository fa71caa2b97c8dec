//! A layer's mounts: made when somebody wants one, taken over from an earlier process, left to a later one.
//!
//! Invariants:
//! - One at a time mounts a layer: whoever holds its turn.
//! - The kernel serves by itself only what is complete and proved. What it serves, complete or not, loses nothing.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::{Cause, Core, Failure, Layer, Mounted, Open};
use crate::fuse::LayerFs;
use crate::mount::{Left, LeftKind, Mount, error_chain};
use crate::state::State;

/// Before a layer that readers wait for is opened once more; twice as long each time.
const AGAIN: Duration = Duration::from_secs(5);
const LONGEST_AGAIN: Duration = Duration::from_secs(30);

/// When a layer that readers wait for is opened once more.
#[derive(Default)]
pub(super) struct Again {
    pause: Duration,
    is_due: bool,
}

impl Layer {
    /// Waits until the layer is ready and mounts it, unless it is mounted in the best way.
    pub async fn mount(self: &Arc<Self>) -> Result<Mounted, Failure> {
        self.ready().await?;
        let turn = Arc::clone(&self.mounting).lock_owned().await;
        let (open, best) = {
            let core = self.core();
            (core.open.clone(), self.best(&core))
        };
        if let Some(mounted) = best {
            return Ok(mounted);
        }
        let open = open.ok_or_else(|| self.failure(Cause::Released))?;
        let this = Arc::clone(self);
        let mount = move || {
            // Whoever waits for it may have gone: the turn lasts as long as the work does.
            let _turn = turn;
            let mounted = this.mount_now(&open)?;
            this.complete_later();
            Ok(mounted)
        };
        tokio::task::spawn_blocking(mount)
            .await
            .unwrap_or_else(|_| Err(Cause::Interrupted))
            .map_err(|cause| self.failure(cause))
    }

    /// Serves the mounts of this layer that an earlier process left, now that it is open.
    pub(super) fn take_over_later(self: &Arc<Self>) {
        if self.shared.mounts.has_left(self.digest()) {
            self.spawn(|this| async move {
                if let Err(failure) = this.mount().await
                    && !this.shared.leaving.has_begun()
                {
                    tracing::warn!(layer = %failure.layer, image = failure.image, error = error_chain(&*failure),
                        "mounts of an earlier process not taken over");
                }
            });
        }
    }

    /// Has a layer that could not be opened opened once more, if readers of an earlier process's mounts wait for it.
    pub(super) fn take_over_again(self: &Arc<Self>) {
        if !self.shared.mounts.has_left(self.digest()) {
            return;
        }
        let pause = {
            let Again { pause, is_due } = &mut self.core().again;
            if std::mem::replace(is_due, true) {
                return;
            }
            *pause = (*pause * 2).clamp(AGAIN, LONGEST_AGAIN);
            *pause
        };
        self.spawn(move |this| async move {
            tokio::time::sleep(pause).await;
            this.core().again.is_due = false;
            let has_failed = || matches!(this.state(), State::Failed { .. });
            if has_failed() {
                this.want();
            }
            // Somebody else's attempt has failed a moment ago: nothing was begun.
            if has_failed() {
                this.take_over_again();
            }
        });
    }

    /// Where the layer is mounted, or will be: the path exists from then on.
    pub fn place(&self) -> PathBuf {
        self.shared.mounts.path(self.reserved())
    }

    pub fn mounted(&self) -> Option<Mounted> {
        let core = self.core();
        core.mount.as_ref().or(core.former.last()).map(mounted)
    }

    /// Whether the kernel serves those who mount the layer now; `None`: it isn't mounted.
    pub(crate) fn is_in_kernel(&self) -> Option<bool> {
        let core = self.core();
        core.mount.as_ref().or(core.former.last()).map(|mount| !mount.is_fuse())
    }

    /// Has the kernel read on at full length once nothing that it reads has to be fetched.
    pub(super) fn read_far_ahead(&self) {
        let core = self.core();
        let Some(open) = &core.open else { return };
        if open.fill.data().complete() || open.fill.blob().is_complete() {
            let mounts = core.mount.iter().chain(&core.former);
            mounts.for_each(|mount| mount.set_read_ahead(self.shared.config.fuse.read_ahead_kib));
        }
    }

    /// Has the kernel read what it serves by itself from the disk, where that is better.
    pub(crate) fn read_directly(&self) {
        let mut core = self.core();
        let Core { machine, open: Some(open), mount, former, .. } = &mut *core else { return };
        if matches!(machine.state(), State::Local) {
            let data = open.fill.data().file();
            mount.iter_mut().chain(former).for_each(|mount| mount.read_directly(data));
        }
    }

    /// What of the layer outlives this process is its successor's from now on.
    pub(crate) fn leave(&self) {
        let mounts = self.core().take_mounts();
        mounts.into_iter().for_each(Mount::leave);
    }

    fn reserved(&self) -> u64 {
        *self.core().place.get_or_insert_with(|| self.shared.mounts.reserve())
    }

    /// The mount, if there can't be a better one and nothing waits to be taken over.
    fn best(&self, core: &Core) -> Option<Mounted> {
        let mount = core.mount.as_ref()?;
        let outgrown = mount.is_fuse() && self.suits_kernel(core);
        (!outgrown && !self.shared.mounts.has_left(self.digest())).then(|| mounted(mount))
    }

    /// Whether the kernel may serve the layer, and can.
    fn suits_kernel(&self, core: &Core) -> bool {
        matches!(core.machine.state(), State::Local) && self.shared.mounts.has_kernel()
    }

    /// Mounts `open`, unless the layer has been released meanwhile.
    fn mount_now(self: &Arc<Self>, open: &Arc<Open>) -> Result<Mounted, Cause> {
        {
            // Some of what was left may need every byte, and says so only when it is served.
            let _keep = open.fill.data().keep();
            let mut served = Ok(());
            for left in self.shared.mounts.take_left(self.digest()) {
                served = served.and(self.take_over(left, open));
            }
            served?;
        }
        if let Some(best) = self.best(&self.core()) {
            return Ok(best);
        }
        if self.suits_kernel(&self.core())
            && let Some(mount) = self.mount_in_kernel(open)
        {
            return self.enter(mount, open);
        }
        // Complete or not, what serves it already will do.
        if let Some(mount) = self.core().mount.as_ref().map(mounted) {
            return Ok(mount);
        }
        if let Some(mount) = self.mount_lazily(open) {
            return self.enter(mount, open);
        }
        let config = &self.shared.config.fuse;
        let file_system = LayerFs::new(open.reader(self, &self.shared), config);
        let mount = self.shared.mounts.fuse(self.reserved(), &open.subject, file_system, config);
        self.enter(mount.map_err(|source| Cause::Mount { source })?, open)
    }

    /// The kernel's mount; `None` if the layer is better off with FUSE.
    fn mount_in_kernel(&self, open: &Open) -> Option<Mount> {
        // Where a mount is, there is no second one.
        let is_mounted = self.core().mount.is_some();
        let id = if is_mounted { self.shared.mounts.reserve() } else { self.reserved() };
        let (inodes, data) = open.paths();
        let file = open.fill.data();
        let _keep = file.keep();
        // What was found wrong on disk since the layer was proved is missing again.
        if !file.complete() {
            return None;
        }
        file.forbid_punching();
        match self.shared.mounts.kernel(id, &inodes, &data) {
            Ok(mount) => {
                let kib = self.shared.config.fuse.read_ahead_kib;
                mount.inspect(|mount| mount.set_read_ahead(kib))
            }
            Err(error) => {
                tracing::warn!(layer = %self.digest(), error = error_chain(&error), "the kernel doesn't serve the layer, FUSE does");
                None
            }
        }
    }

    /// A mount by the kernel, which asks for what is missing; `None` if the layer is better off with FUSE.
    fn mount_lazily(&self, open: &Open) -> Option<Mount> {
        let mounts = &self.shared.mounts;
        if mounts.lazily().is_err() || matches!(self.state(), State::Local) {
            return None;
        }
        open.fill.data().forbid_punching();
        let filler = open.filler(self, &self.shared);
        let mounted = mounts.lazy(self.reserved(), &open.subject, &open.paths().0, &filler);
        mounted
            .inspect_err(|error| {
                tracing::warn!(layer = %self.digest(), error = error_chain(error), "the kernel doesn't serve the incomplete layer, FUSE does");
            })
            .ok()
    }

    /// Has the kernel ask no more for what it reads of a layer that is complete and proved, on disk too.
    pub(super) fn hand_over(&self) {
        let mut core = self.core();
        let Core { machine, open: Some(open), mount, former, .. } = &mut *core else { return };
        if matches!(machine.state(), State::Local) {
            let data = open.fill.data().file();
            mount.iter_mut().chain(former).for_each(|mount| mount.complete(data));
        }
    }

    /// Makes `mount` the layer's, unless the layer was released or opened anew meanwhile.
    fn enter(&self, mount: Mount, open: &Arc<Open>) -> Result<Mounted, Cause> {
        let result = mounted(&mount);
        let mut core = self.core();
        if !core.open.as_ref().is_some_and(|current| Arc::ptr_eq(current, open)) {
            drop(core);
            drop(mount);
            return Err(Cause::Released);
        }
        core.supersede(mount);
        drop(core);
        self.shared.metrics.mounts.inc();
        self.read_far_ahead();
        self.hand_over();
        Ok(result)
    }

    /// Serves what an earlier process left: by `open`, if that is what it served.
    fn take_over(self: &Arc<Self>, left: Left, open: &Arc<Open>) -> Result<(), Cause> {
        match &left.kind {
            LeftKind::Fuse { subject, .. } if *subject != open.subject => {
                let subject = *subject;
                self.take_over_aside(left, subject);
            }
            LeftKind::Lazy { subject, .. } if *subject != open.subject => {
                tracing::error!(layer = %self.digest(), mount = left.id,
                    "a mount of an earlier process shows the layer by another index, containers that use it get errors");
                self.shared.mounts.discard(left);
            }
            _ => {
                let mount = self.serve(left, open)?;
                self.enter_left(mount, true)?;
            }
        }
        Ok(())
    }

    /// Serves what an earlier process served, which was the same as `open` is.
    pub(super) fn serve(&self, left: Left, open: &Open) -> Result<Mount, Cause> {
        let (mounts, config) = (&self.shared.mounts, &self.shared.config.fuse);
        let id = left.id;
        let served = match left.kind {
            LeftKind::Kernel => {
                open.fill.data().forbid_punching();
                Ok(mounts.adopt(id))
            }
            LeftKind::Fuse { flags, descriptor, .. } => {
                let file_system = LayerFs::new(open.reader(self, &self.shared), config);
                mounts.resume(id, (flags, descriptor), file_system, config)
            }
            LeftKind::Lazy { subject, file } => {
                open.fill.data().forbid_punching();
                let filler = open.filler(self, &self.shared);
                mounts.resume_lazy((id, &subject), file, &filler)
            }
        };
        served.map_err(|source| Cause::Mount { source })
    }

    /// Makes what an earlier process left the layer's. `current`: it shows the layer as it is shown to others now.
    pub(super) fn enter_left(&self, mount: Mount, current: bool) -> Result<(), Cause> {
        let id = mount.id();
        tracing::info!(layer = %self.digest(), mount = id, "took over what an earlier process left mounted");
        let mut core = self.core();
        if self.shared.leaving.has_begun() {
            // Those that were there have been left already.
            drop(core);
            mount.leave();
            return Err(Cause::Released);
        }
        // Another place may have been promised since this process started.
        let promised = core.place.is_some_and(|place| place != id);
        let better = core.mount.as_ref().is_none_or(|known| known.is_fuse() && !mount.is_fuse());
        if current && better && !promised {
            core.supersede(mount);
        } else {
            core.former.push(mount);
        }
        drop(core);
        self.shared.metrics.mounts.inc();
        self.hand_over();
        Ok(())
    }
}

impl Core {
    /// There is a better way to mount the layer than what is mounted.
    pub(super) fn outgrow(&mut self) {
        if let Some(mount) = self.mount.take() {
            self.former.push(mount);
            self.place = None;
        }
    }

    /// Who mounts the layer from now on gets `mount`.
    fn supersede(&mut self, mount: Mount) {
        self.outgrow();
        self.place = Some(mount.id());
        self.mount = Some(mount);
    }

    pub(super) fn take_mounts(&mut self) -> Vec<Mount> {
        self.mount.take().into_iter().chain(self.former.drain(..)).collect()
    }
}

fn mounted(mount: &Mount) -> Mounted {
    Mounted { id: mount.id(), path: mount.path().to_owned() }
}
