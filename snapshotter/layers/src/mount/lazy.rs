//! Mounts by the kernel of layers that are not complete (see [`super::prefill`]).
//!
//! Owns: the records of such mounts, `<mounts>/<id>.lazy` (see [`Record`]). A record is there before the mount, and as
//! long as the mount may have to ask for bytes.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use skimmer_keeper::Lasts;
use skimmer_proto::Digest;

use super::kernel::{self, Kernel};
use super::left::{self, DataName, Record};
use super::mounted::{Mount, Server};
use super::prefill::{self, FileId, Filler, LeftEvents, LeftPrefill, Prefill};
use super::{Error, Mounts, Subject};
use crate::config::MountMode;

/// Why the kernel can't serve layers before they are complete.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    #[error("mount.mode says so")]
    Mode,
    #[error("this kernel can't mount files as EROFS (Linux 6.13 can)")]
    Kernel,
    #[error("this kernel doesn't tell of reads before it reads")]
    Events { source: prefill::Error },
    #[error(
        "nobody keeps the descriptors of mounts: without them, what is missing would read as zeros once this process ends"
    )]
    NoKeeper,
    #[error(
        "systemd gives up the descriptors when the unit is stopped, and what is missing would read as zeros: \
         the unit needs FileDescriptorStorePreserve=yes (systemd 254)"
    )]
    Forgets,
    #[error(
        "the holder of descriptors is a process like others: set mount.mode to \"kernel\" to rely on it"
    )]
    Process,
}

/// What serves one such mount.
pub struct Lazy {
    prefill: Arc<Prefill>,
    file: FileId,
    record: PathBuf,
}

impl Lazy {
    /// `data` is complete: from now on the kernel is alone, if it reads that. Whether it does.
    pub fn finish(&self, data: &File) -> Result<bool, prefill::Error> {
        if !FileId::of(data.as_fd()).is_ok_and(|id| id == self.file) {
            return Ok(false);
        }
        self.prefill.finish(self.file)?;
        self.forget();
        Ok(true)
    }

    pub fn unmounted(&self) {
        self.prefill.unmounted(self.file);
        self.forget();
    }

    fn forget(&self) {
        remove_record(&self.record);
    }
}

/// The descriptor of a data file that was left, and what it was kept for.
pub struct LeftData {
    pub blob: Digest,
    pub file: File,
}

/// Whether layers may be mounted so; if not, why.
pub fn may(
    mode: MountMode,
    kernel: &Kernel,
    keeper: Option<Lasts>,
    root: &Path,
) -> Result<(), Reason> {
    if mode == MountMode::Fuse {
        return Err(Reason::Mode);
    }
    match (keeper.ok_or(Reason::NoKeeper)?, mode) {
        (Lasts::UntilStop, _) => return Err(Reason::Forgets),
        (Lasts::Process, MountMode::Auto) => return Err(Reason::Process),
        _ => {}
    }
    if !kernel.mounts_files() {
        return Err(Reason::Kernel);
    }
    Prefill::probe(root).map_err(|source| Reason::Events { source })
}

/// With the kernel's mode, what can't be done is an error.
pub fn insist(mode: MountMode, lazily: Result<(), Reason>) -> Result<Result<(), Reason>, Error> {
    match lazily {
        Err(source) if mode == MountMode::Kernel => Err(Error::NotLazy { source }),
        lazily => Ok(lazily),
    }
}

impl Mounts {
    /// Whether the kernel can serve layers before they are complete; if not, why.
    pub fn lazily(&self) -> Result<(), &Reason> {
        self.lazily.as_ref().copied()
    }

    /// Has the kernel serve a layer under the reserved `id`, whose bytes come by `filler`.
    pub fn lazy(
        &self,
        id: u64,
        subject: &Subject,
        inodes: &Path,
        filler: &Arc<dyn Filler>,
    ) -> Result<Mount, Error> {
        let prefill = self.prefill.as_ref().ok_or(Error::NotLazy { source: Reason::Mode })?;
        let path = self.point(id)?;
        let record = left::record_of(&path);
        let undo = |error| {
            self.give_up(&path);
            let _ = fs::remove_file(&record);
            error
        };
        let served = prefill.serve(filler, self.data_name(id, subject.blob));
        let (file, name) = served.map_err(|source| undo(Error::Prefill { source }))?;
        let undo = |error| {
            prefill.unmounted(file);
            undo(error)
        };
        let text = Record { subject: *subject, kept: kept_id(&name, id) }.text();
        fs::write(&record, text)
            .map_err(|source| undo(Error::Record { path: record.clone(), source }))?;
        // By the descriptor: whatever has the file's name by now, this one is marked.
        let data = PathBuf::from(format!("/proc/self/fd/{}", filler.file().as_raw_fd()));
        let bdi = Kernel::mount_gaps(inodes, &data, &path, &self.label)
            .map_err(|source| undo(Error::Kernel { source }))?;
        let lazy = Lazy { prefill: Arc::clone(prefill), file, record };
        Ok(self.mount(id, Server::Lazy(lazy)).reading_ahead_by(bdi))
    }

    /// Serves a mount that an earlier process served, whose bytes come by `filler`. `file`: what it is known to be
    /// mounted over; nobody kept its descriptor if there is none.
    pub fn resume_lazy(
        &self,
        (id, subject): (u64, &Subject),
        file: Option<FileId>,
        filler: &Arc<dyn Filler>,
    ) -> Result<Mount, Error> {
        let failed = |source| Error::Prefill { source };
        let prefill = self.prefill.as_ref().ok_or(Error::NotLazy { source: Reason::Mode })?;
        let lazy = |file| {
            let record = left::record_of(&self.path(id));
            self.mount(id, Server::Lazy(Lazy { prefill: Arc::clone(prefill), file, record }))
        };
        if let Some(file) = file {
            // If it comes to nothing, it is unmounted and its readers are told.
            let mount = lazy(file);
            prefill.resume(file, filler).map_err(failed)?;
            return Ok(mount);
        }
        tracing::error!(layer = %subject.blob, mount = id,
            "nobody kept a mount that the kernel serves before it is complete: what was read of it since may be zeros, start its containers anew");
        let served = prefill.serve(filler, self.data_name(id, subject.blob));
        let (file, name) = served.map_err(failed)?;
        let record = Record { subject: *subject, kept: kept_id(&name, id) };
        let path = left::record_of(&self.path(id));
        fs::write(&path, record.text()).map_err(|source| Error::Record { path, source })?;
        Ok(lazy(file))
    }

    /// What is left of the mount `id` to be unmounted.
    pub(super) fn lazy_server(&self, id: u64, file: Option<FileId>) -> Server {
        let record = left::record_of(&self.path(id));
        match (&self.prefill, file) {
            (Some(prefill), Some(file)) => {
                Server::Lazy(Lazy { prefill: Arc::clone(prefill), file, record })
            }
            _ => {
                remove_record(&record);
                Server::Kernel
            }
        }
    }

    /// What an earlier process left of data files, by which they have to be opened: once.
    pub fn take_left_data(&self) -> Vec<LeftData> {
        std::mem::take(&mut self.left_data())
    }

    /// Whether nobody uses any more what was unmounted before it was complete.
    pub fn is_settled(&self) -> bool {
        self.prefill.as_ref().is_none_or(|prefill| prefill.is_settled())
    }

    /// Releases what is kept for all mounts together: there are none, and this process takes no more.
    pub fn forget_all(&self) -> Result<(), skimmer_keeper::Error> {
        let Some(keeper) = &self.keeper else { return Ok(()) };
        let [group, journal] = self.prefill_names();
        [&group, &journal, self.requests.name()]
            .into_iter()
            .try_for_each(|name| keeper.release(name))
    }

    /// From now on no reader is told anything: what is unanswered is the next process's.
    pub fn begin_leaving(&self) {
        if let Some(prefill) = &self.prefill {
            prefill.leave();
        }
    }

    fn data_name(&self, id: u64, blob: Digest) -> String {
        DataName { place: left::Name::place_of(&self.root), id, blob }.text()
    }

    /// Takes over the events of an earlier process, if there are to be any.
    pub(super) fn open_prefill(
        &mut self,
        left: LeftPrefill,
    ) -> Result<Option<LeftEvents>, prefill::Error> {
        let needed = left.group.is_some() || self.has_recorded();
        if !needed && self.lazily.is_err() {
            return Ok(None);
        }
        let [group, journal] = self.prefill_names();
        match Prefill::open(left, self.keeper.clone(), [&group, &journal]) {
            Ok((prefill, events)) => {
                self.prefill = Some(Arc::new(prefill));
                Ok(Some(events))
            }
            Err(source) if !needed => {
                self.lazily = Err(Reason::Events { source });
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn prefill_names(&self) -> [String; 2] {
        left::prefill_names(left::Name::place_of(&self.root), prefill::VERSION)
    }

    /// Whether something is mounted that may have to ask for bytes. The record of what isn't mounted means nothing.
    fn has_recorded(&self) -> bool {
        let lines = super::mount_info().unwrap_or_default();
        let mut ours = lines.iter().filter(|line| {
            line.file_system == kernel::FILE_SYSTEM
                && left::id_of(&self.root, &line.mount_point).is_some()
        });
        ours.any(|line| left::record_of(&line.mount_point).exists())
    }

    /// The data file, kept under `name`, of something that is mounted or, if not `mounted`, still used.
    pub(super) fn expect(&self, name: &DataName, file: &File, mounted: bool) -> Option<FileId> {
        let prefill = self.prefill.as_ref()?;
        let expected = file.try_clone().and_then(|same| prefill.expect(same, name.text(), mounted));
        expected
            .inspect_err(|error| {
                tracing::error!(layer = %name.blob, mount = name.id, %error, "the kept descriptor of a data file is of no use");
            })
            .ok()
    }

    /// By `file`, which was kept, the data file of `blob` is to be opened.
    pub(super) fn lend_later(&self, blob: Digest, file: File) {
        self.left_data().push(LeftData { blob, file });
    }
}

/// For which mount the descriptor was kept that has this `name`: `id` itself, or an earlier one of the same file.
fn kept_id(name: &str, id: u64) -> u64 {
    DataName::parse(name).map_or(id, |name| name.id)
}

/// What is mounted as `id` at `path`, if it is a mount that may have to ask for bytes.
pub fn recorded(path: &Path, id: u64) -> Option<Record> {
    let text = fs::read_to_string(left::record_of(path)).ok()?;
    Record::parse(&text, id)
}

/// Removes the record at `path`, whose mount is gone or complete.
pub fn remove_record(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(record = %path.display(), %error, "the record of a mount stays");
        }
        _ => {}
    }
}
