//! The directory of mounts: `<mounts>/<decimal id>`, one or more a layer.
//!
//! Owns: the ids, the mount points, the threads that serve them, and the names under which descriptors are kept.
//! Does not own: what is mounted (see [`crate::fuse`]), when (see [`crate::layer`]).
//!
//! Invariants:
//! - An id is not used twice as long as anything is mounted under it; a number is a path that a container may name.
//! - Nothing here opens a file on a mount that this process serves: a fork would inherit the
//!   descriptor and flush it to a server that does not answer forks.
//! - What a dead predecessor left is taken over ([`Left`]) or unmounted before the first new mount.
//! - A FUSE mount's path is told to nobody before its descriptor is kept, where there is a keeper.
//! - The kernel serves an incomplete layer only where somebody keeps what its readers wait by (see [`prefill`]).

mod cached;
mod direct;
pub mod info;
mod kernel;
mod lazy;
mod left;
mod mounted;
pub mod prefill;
mod read_ahead;
mod requests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::InitFlags;
use nix::mount::{MntFlags, umount2};
use skimmer_keeper::{Keeper, Kept};
use skimmer_proto::Digest;
pub use skimmer_proto::error_chain;

use crate::config::{FuseConfig, MountMode};
use crate::fuse::device::{self, Device, FILE_SYSTEM};
use crate::fuse::{Content, LayerFs};
use crate::label::Label;
pub use cached::forget as forget_cached;
use kernel::Kernel;
pub use kernel::version;
use lazy::LeftData;
pub use lazy::Reason;
pub use left::Subject;
use left::{DataName, Name, Record};
pub use mounted::Mount;
use mounted::Server;
use prefill::{FileId, LeftPrefill, Prefill};
use read_ahead::Bdi;
use requests::Requests;

/// A failed operation on the directory of mounts or on one mount.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("create the directory of mounts {}", path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error("read /proc/self/mountinfo")]
    Info { source: io::Error },
    #[error("create the mount point {}", path.display())]
    Point { path: PathBuf, source: io::Error },
    #[error("unmount {}, left behind by an earlier process", path.display())]
    Stale { path: PathBuf, source: io::Error },
    #[error("unmount {}", path.display())]
    Unmount { path: PathBuf, source: io::Error },
    #[error("serve {}", path.display())]
    Serve { path: PathBuf, source: device::Error },
    #[error("have the kernel serve a layer")]
    Kernel { source: kernel::Error },
    #[error("write {}", path.display())]
    Record { path: PathBuf, source: io::Error },
    #[error("put bytes where the kernel is about to read")]
    Prefill { source: prefill::Error },
    #[error("the kernel can't serve layers before they are complete (mount.mode)")]
    NotLazy { source: Reason },
}

/// Somebody who keeps descriptors for a successor, and what a predecessor left there.
pub type Keeping = Option<(Arc<dyn Keeper>, Vec<Kept>)>;

/// The directory of mounts.
pub struct Mounts {
    root: PathBuf,
    next: AtomicU64,
    kernel: Kernel,
    label: Label,
    keeper: Option<Arc<dyn Keeper>>,
    left: Mutex<BTreeMap<Digest, Vec<Left>>>,
    left_data: Mutex<Vec<LeftData>>,
    /// The blobs of layers whose readers nobody can answer any more.
    lost: BTreeSet<Digest>,
    /// Whether incomplete layers may be the kernel's.
    lazily: Result<(), Reason>,
    /// There is one if they may, or if an earlier process left some.
    prefill: Option<Arc<Prefill>>,
    requests: Requests,
}

/// A mount that an earlier process left, of a layer of a known blob.
#[derive(Debug)]
pub struct Left {
    pub id: u64,
    pub kind: LeftKind,
}

#[derive(Debug)]
pub enum LeftKind {
    /// The kernel serves it by itself.
    Kernel,
    /// The kernel serves it, and readers of what is missing wait for whoever takes it over. `file`: whose bytes they
    /// wait for; `None`: nobody kept it.
    Lazy { subject: Subject, file: Option<FileId> },
    /// Readers wait for whoever [takes it over](Mounts::resume).
    Fuse { subject: Subject, flags: InitFlags, descriptor: OwnedFd },
}

impl Mounts {
    /// Creates the directory and looks at what is mounted inside: what can be taken over waits for
    /// [`Mounts::take_left`], the rest is unmounted lazily (containers that still use it see ENOTCONN as before). Empty
    /// mount points are removed.
    pub fn open(root: &Path, mode: MountMode, keeping: Keeping) -> Result<Self, Error> {
        let root = fs::create_dir_all(root)
            .and_then(|()| root.canonicalize())
            .map_err(|source| Error::Root { path: root.to_owned(), source })?;
        let (keeper, kept) = match keeping {
            Some((keeper, kept)) => (Some(keeper), kept),
            None => (None, Vec::new()),
        };
        let kernel = Kernel::new(mode != MountMode::Fuse);
        let lazily = lazy::may(mode, &kernel, keeper.as_ref().map(|keeper| keeper.lasts()), &root);
        let lazily = lazy::insist(mode, lazily)?;
        let mut mounts = Self {
            next: AtomicU64::new(1),
            kernel,
            requests: Requests::new(&root, keeper.clone()),
            root,
            label: Label::default(),
            keeper,
            left: Mutex::default(),
            left_data: Mutex::default(),
            lost: BTreeSet::new(),
            lazily,
            prefill: None,
        };
        mounts.look_back(kept)?;
        mounts.lazily = lazy::insist(mode, mounts.lazily)?;
        remove_points(&mounts.root)?;
        Ok(mounts)
    }

    /// Has mounts to come labelled with an SELinux context, where SELinux is on.
    pub fn labelled(mut self, context: Option<&str>) -> Self {
        self.label = Label::new(context);
        self
    }

    /// An id for a mount to come. Its path doesn't exist until then.
    pub fn reserve(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub fn path(&self, id: u64) -> PathBuf {
        left::path_of(&self.root, id)
    }

    /// Whether complete layers can be served by the kernel, as far as is known.
    pub fn has_kernel(&self) -> bool {
        self.kernel.can()
    }

    /// Whether the kernel can read what it serves past a second copy in the page cache.
    pub fn reads_directly(&self) -> bool {
        direct::is_possible(&self.kernel)
    }

    /// Mounts `file_system` under the reserved `id` and serves it until the [`Mount`] is dropped.
    pub fn fuse<C: Content>(
        &self,
        id: u64,
        subject: &Subject,
        file_system: LayerFs<C>,
        config: &FuseConfig,
    ) -> Result<Mount, Error> {
        let path = self.point(id)?;
        let (agreed, recorder) = (file_system.agreed(), file_system.recorder());
        let flags = || InitFlags::from_bits_retain(agreed.load(Ordering::Acquire));
        let greeted = || self.requests.record(id, flags(), &recorder);
        let served = Device::mount(&path, &subject.source(), &self.label)
            .and_then(|device| device.serve(file_system, config, greeted).map(|_thread| device));
        match served {
            Ok(device) => {
                Bdi::Device.set_read_ahead(&path, config.lazy_read_ahead_kib);
                let flags = flags();
                let name = self.name(id, flags);
                self.keep(&name, &device);
                Ok(self.mount(id, self.fuse_server(name)))
            }
            Err(source) => {
                self.give_up(&path);
                Err(Error::Serve { path, source })
            }
        }
    }

    /// Has the kernel serve a complete layer under the reserved `id`. `None`: this kernel can't.
    pub fn kernel(&self, id: u64, inodes: &Path, data: &Path) -> Result<Option<Mount>, Error> {
        if !self.has_kernel() {
            return Ok(None);
        }
        let path = self.point(id)?;
        let mounted = self.kernel.mount(inodes, data, &path, &self.label);
        if !matches!(mounted, Ok(Some(_))) {
            self.give_up(&path);
        }
        match mounted {
            Ok(bdi) => Ok(bdi.map(|bdi| self.mount(id, Server::Kernel).reading_ahead_by(bdi))),
            Err(source) => Err(Error::Kernel { source }),
        }
    }

    /// Serves a mount that an earlier process served, with a file system of the same subject; unmounts what can't be.
    pub fn resume<C: Content>(
        &self,
        id: u64,
        (flags, descriptor): (InitFlags, OwnedFd),
        file_system: LayerFs<C>,
        config: &FuseConfig,
    ) -> Result<Mount, Error> {
        // If it comes to nothing, it is unmounted and its readers are told.
        let mount = self.mount(id, self.fuse_server(self.name(id, flags)));
        let device = Device::left(descriptor);
        self.requests.resume(id, &device, &file_system, flags);
        let served = device.resume(file_system, flags, config);
        let _thread = served.map_err(|source| Error::Serve { path: self.path(id), source })?;
        Ok(mount)
    }

    /// A mount that an earlier process left and the kernel serves.
    pub fn adopt(&self, id: u64) -> Mount {
        self.mount(id, Server::Kernel)
    }

    /// The blobs of whose layers something was left that nobody has taken yet.
    pub fn left(&self) -> Vec<Digest> {
        self.left_ones().keys().copied().collect()
    }

    pub fn has_left(&self, blob: Digest) -> bool {
        self.left_ones().contains_key(&blob)
    }

    /// What was left of layers of `blob`; it is the caller's from now on.
    pub fn take_left(&self, blob: Digest) -> Vec<Left> {
        self.left_ones().remove(&blob).unwrap_or_default()
    }

    /// The blobs of layers that an earlier process served, by mounts that nobody kept.
    pub const fn lost(&self) -> &BTreeSet<Digest> {
        &self.lost
    }

    /// Whether the kernel serves a layer of `blob` on an earlier process's behalf.
    pub fn kernel_left(&self, blob: Digest) -> bool {
        let left = self.left_ones();
        let is_kernel = |left: &Left| !matches!(left.kind, LeftKind::Fuse { .. });
        left.get(&blob).is_some_and(|all| all.iter().any(is_kernel))
    }

    /// Unmounts what was left and isn't wanted; readers that still wait are told.
    pub fn discard(&self, left: Left) {
        self.requests.forget(left.id);
        let server = match &left.kind {
            LeftKind::Kernel => Server::Kernel,
            LeftKind::Fuse { flags, .. } => self.fuse_server(self.name(left.id, *flags)),
            LeftKind::Lazy { file, .. } => self.lazy_server(left.id, *file),
        };
        drop(self.mount(left.id, server));
    }

    fn mount(&self, id: u64, server: Server) -> Mount {
        Mount::new(id, self.path(id), server)
    }

    fn fuse_server(&self, name: Name) -> Server {
        Server::Fuse(self.keeper.as_ref().map(|keeper| (name, Arc::clone(keeper))))
    }

    fn point(&self, id: u64) -> Result<PathBuf, Error> {
        let path = self.path(id);
        fs::create_dir(&path).map_err(|source| Error::Point { path: path.clone(), source })?;
        // Of an earlier mount of this number, which is gone.
        lazy::remove_record(&left::record_of(&path));
        Ok(path)
    }

    /// Undoes what there is of a mount that failed.
    fn give_up(&self, path: &Path) {
        // Both may fail for want of anything to undo; the first error is the one to tell.
        let _ = umount2(path, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(path);
    }

    fn name(&self, id: u64, flags: InitFlags) -> Name {
        Name { place: Name::place_of(&self.root), id, flags }
    }

    /// Without it the layer works, until this process ends or the keeper is back.
    fn keep(&self, name: &Name, device: &Device) {
        let Some(keeper) = &self.keeper else { return };
        if let Err(error) = keeper.keep(&name.text(), device.as_fd()) {
            tracing::warn!(
                mount = name.id,
                error = error_chain(&error),
                "a mount will not survive this process"
            );
        }
    }

    /// Sorts out what is mounted in the directory and whose descriptors were kept.
    fn look_back(&mut self, kept: Vec<Kept>) -> Result<(), Error> {
        let mut kept = self.sort(kept);
        self.requests.find(kept.requests.take());
        let prefill = self.open_prefill(std::mem::take(&mut kept.prefill));
        let events = prefill.map_err(|source| Error::Prefill { source })?;
        let mut last = 0;
        // The newest first.
        for line in mount_info()?.into_iter().rev() {
            let Some(id) = left::id_of(&self.root, &line.mount_point) else { continue };
            last = last.max(id);
            let found = match line.file_system.as_str() {
                FILE_SYSTEM => Subject::parse(&line.source).and_then(|subject| {
                    let Some((name, descriptor)) = kept.fuse.remove(&id) else {
                        self.lost.insert(subject.blob);
                        return None;
                    };
                    let kind = LeftKind::Fuse { subject, flags: name.flags, descriptor };
                    Some((subject.blob, kind))
                }),
                kernel::FILE_SYSTEM => self.left_by_kernel(id, &line, &mut kept),
                _ => continue,
            };
            match found {
                Some((blob, kind)) => {
                    if matches!(kind, LeftKind::Lazy { file: None, .. }) {
                        self.lost.insert(blob);
                    }
                    self.left_ones().entry(blob).or_default().push(Left { id, kind });
                }
                None => unmount_dead(&line.mount_point)?,
            }
        }
        let is_fuse = |left: &&Left| matches!(left.kind, LeftKind::Fuse { .. });
        let served: BTreeSet<u64> =
            self.left_ones().values().flatten().filter(is_fuse).map(|left| left.id).collect();
        self.requests.retain(|id| served.contains(&id));
        for (name, _fd) in kept.fuse.into_values() {
            last = last.max(name.id);
            self.release(&name);
        }
        for (name, file) in kept.data.into_values() {
            last = last.max(name.id);
            if kept.mounted.contains(&name.id) || self.expect(&name, &file, false).is_some() {
                self.lend_later(name.blob, file);
            }
        }
        self.next = AtomicU64::new(last + 1);
        if let (Some(prefill), Some(events)) = (&self.prefill, events) {
            prefill.start(events).map_err(|source| Error::Prefill { source })?;
        }
        Ok(())
    }

    fn left_by_kernel(
        &self,
        id: u64,
        line: &info::Line,
        kept: &mut KeptHere,
    ) -> Option<(Digest, LeftKind)> {
        let Some(Record { subject, kept: owner }) = lazy::recorded(&line.mount_point, id) else {
            let blob = kernel::inodes_of(&line.source).and_then(|inodes| left::blob_of(&inodes))?;
            return Some((blob, LeftKind::Kernel));
        };
        let data = kept.data.get(&owner);
        let file = data.and_then(|(name, file)| self.expect(name, file, true));
        kept.mounted.extend(file.map(|_| owner));
        Some((subject.blob, LeftKind::Lazy { subject, file }))
    }

    /// What of the kept descriptors belongs to this directory.
    fn sort(&self, kept: Vec<Kept>) -> KeptHere {
        let place = Name::place_of(&self.root);
        let [group, journal] = self.prefill_names();
        let mut sorted = KeptHere::default();
        for Kept { name, fd } in kept {
            if name == group {
                sorted.prefill.group = Some(fd);
            } else if name == journal {
                sorted.prefill.journal = Some(fd);
            } else if name == self.requests.name() {
                sorted.requests = Some(fd);
            } else if let Some(name) = DataName::parse(&name).filter(|name| name.place == place) {
                sorted.data.insert(name.id, (name, fd.into()));
            } else if let Some(name) = Name::parse(&name).filter(|name| name.place == place) {
                sorted.fuse.insert(name.id, (name, fd));
            }
        }
        sorted
    }

    fn release(&self, name: &Name) {
        if let Some(keeper) = &self.keeper {
            release(keeper.as_ref(), name);
        }
    }

    fn left_data(&self) -> MutexGuard<'_, Vec<LeftData>> {
        self.left_data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn left_ones(&self) -> MutexGuard<'_, BTreeMap<Digest, Vec<Left>>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Descriptors that were kept for mounts of this directory, by id.
#[derive(Default)]
struct KeptHere {
    fuse: BTreeMap<u64, (Name, OwnedFd)>,
    data: BTreeMap<u64, (DataName, File)>,
    /// Those of `data` that are of what is mounted.
    mounted: BTreeSet<u64>,
    prefill: LeftPrefill,
    requests: Option<OwnedFd>,
}

fn release(keeper: &dyn Keeper, name: &Name) {
    if let Err(error) = keeper.release(&name.text()) {
        tracing::warn!(
            mount = name.id,
            error = error_chain(&error),
            "the descriptor of a mount that is gone stays kept"
        );
    }
}

fn mount_info() -> Result<Vec<info::Line>, Error> {
    let text = fs::read("/proc/self/mountinfo").map_err(|source| Error::Info { source })?;
    Ok(info::parse(&text).collect())
}

fn unmount_dead(path: &Path) -> Result<(), Error> {
    tracing::info!(path = %path.display(), "unmounting what an earlier process left");
    umount2(path, MntFlags::MNT_DETACH)
        .map_err(|errno| Error::Stale { path: path.to_owned(), source: errno.into() })
}

/// Removes empty directories with decimal names on which nothing is mounted, and records of mounts that are gone;
/// anything else was not made here.
fn remove_points(root: &Path) -> Result<(), Error> {
    let failed = |source| Error::Root { path: root.to_owned(), source };
    let entries = fs::read_dir(root).map_err(failed)?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    let paths = paths.map_err(failed)?;
    for path in paths.iter().filter(|path| left::id_of(root, path).is_some()) {
        match fs::remove_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::ResourceBusy => {
                return Err(Error::Point { path: path.clone(), source: error });
            }
            _ => {}
        }
    }
    // Last, when the directories tell which mounts there are.
    for path in paths.iter().filter(|path| left::recorded_id(root, path).is_some()) {
        if !path.with_extension("").exists() {
            lazy::remove_record(path);
        }
    }
    Ok(())
}
