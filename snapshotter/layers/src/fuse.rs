//! A layer as a read-only FUSE file system: names and attributes from the index's inodes, bytes
//! from the layer's data file.
//!
//! Owns: nothing but handles; every request is answered from the inodes and the [`Content`].
//! Does not own: how missing bytes come (see [`crate::fill`]), the mount (see [`crate::mount`]).
//!
//! Invariants:
//! - A thread that takes requests from the kernel never waits for bytes: a read that needs them is
//!   answered from the runtime.
//! - Opens are stateless: a successor of this process answers for handles that it never saw.
//! - What is taken from a kernel that wouldn't ask another process again is written down until it is answered.
//! - A layer never changes, so the kernel is told to remember every answer for good.

pub mod answer;
pub mod attr;
pub mod device;
pub mod journal;
pub mod read;
pub mod replay;
pub mod request;

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{
    Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyPoll, ReplyStatfs, ReplyXattr, Request,
};
use skimmer_index::erofs::{FileKind, Inode, Inodes};

use crate::config::FuseConfig;
use answer::{Answer, To};
use attr::Numbers;
use journal::{Entry, Recorder};
pub use read::{Content, Reader};
use request::Operation;

/// How long the kernel may keep an answer: in effect for ever.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// The unit in which [`Filesystem::statfs`] counts.
const BLOCK_BYTES: u32 = 4096;

/// The longest name in a directory.
const NAME_BYTES: u32 = 255;

/// What the kernel is asked for, where it offers it.
const WANTED: [InitFlags; 8] = [
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_NO_OPEN_SUPPORT,
    InitFlags::FUSE_NO_OPENDIR_SUPPORT,
    InitFlags::FUSE_ALLOW_IDMAP,
];

/// Of what the kernel may have in flight where requests are written down: all mounts share the journal's places.
const RECORDED: u16 = 64;

/// The file system of one layer.
pub struct LayerFs<C: Content> {
    reader: Arc<Reader<C>>,
    numbers: Numbers,
    max_background: u16,
    /// Whether any inode has an extended attribute; if not, the kernel stops asking.
    xattrs: bool,
    /// Whether the kernel does without open and opendir requests if told so.
    skips_open: bool,
    /// Whether the kernel may be asked to send again what a dead process left unanswered.
    resend: bool,
    agreed: Arc<AtomicU64>,
    recorder: Arc<OnceLock<Recorder>>,
}

impl<C: Content> LayerFs<C> {
    pub fn new(reader: Arc<Reader<C>>, config: &FuseConfig) -> Self {
        let inodes = reader.inodes();
        Self {
            numbers: Numbers::new(inodes.root()),
            max_background: config.max_background.max(1),
            xattrs: inodes.any_xattrs(),
            skips_open: false,
            resend: config.resend,
            agreed: Arc::default(),
            recorder: Arc::default(),
            reader,
        }
    }

    /// The bits of [`InitFlags`] that this file system asked for and got, once the kernel has greeted it.
    pub fn agreed(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.agreed)
    }

    /// Where to put what writes down its requests, if they are to be written down.
    pub fn recorder(&self) -> Arc<OnceLock<Recorder>> {
        Arc::clone(&self.recorder)
    }

    /// Another that answers alike, and writes nothing down.
    fn twin(&self) -> Self {
        Self {
            reader: Arc::clone(&self.reader),
            agreed: Arc::default(),
            recorder: Arc::default(),
            ..*self
        }
    }

    /// Answers a read that an earlier process took on `device`.
    fn read_again(&self, request: &request::Request, device: Arc<OwnedFd>, entry: Entry) {
        let Some((offset, size)) = request.read() else { return };
        let answer = self.reader.owed(To::Device(device, request.unique()), Some(entry));
        self.answer_read(INodeNo(request.node()), offset, size, answer);
    }

    fn answer_read(&self, ino: INodeNo, offset: u64, size: u32, answer: Answer) {
        match self.inode(ino) {
            Ok(inode) if inode.kind == FileKind::File => {
                self.reader.read(&inode, offset, size, answer)
            }
            Ok(_) => answer.error(Errno::EISDIR),
            Err(errno) => answer.error(errno),
        }
    }

    /// Writes down what was taken, until the entry is dropped.
    fn record(&self, request: &Request, ino: INodeNo, operation: &Operation<'_>) -> Option<Entry> {
        let recorder = self.met(request)?;
        let unique = request.unique().0;
        match request::Request::new(unique, ino.0, operation) {
            Some(request) => recorder.record(&request),
            None => {
                recorder.took(unique);
                None
            }
        }
    }

    /// Who writes requests down, if somebody does. `request` lies where the kernel wrote it, in this thread's buffer.
    fn met(&self, request: &Request) -> Option<&Recorder> {
        let recorder = self.recorder.get()?;
        recorder.meet(std::ptr::from_ref(request).cast());
        Some(recorder)
    }

    fn took(&self, request: &Request) {
        if let Some(recorder) = self.met(request) {
            recorder.took(request.unique().0);
        }
    }

    fn inodes(&self) -> &Inodes<C::Bytes> {
        self.reader.inodes()
    }

    fn inode(&self, number: INodeNo) -> Result<Inode, Errno> {
        self.inodes().inode(self.numbers.nid(number)).ok_or(Errno::ENOENT)
    }

    fn attributes(&self, inode: &Inode) -> fuser::FileAttr {
        attr::attributes(self.numbers.number(inode.nid), inode)
    }

    /// Answers an open; most kernels ask once and remember that they need not ask again.
    fn opened(&self, reply: ReplyOpen) {
        if self.skips_open {
            reply.error(Errno::ENOSYS);
        } else {
            let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
            reply.opened(FileHandle(0), flags);
        }
    }
}

impl<C: Content> Filesystem for LayerFs<C> {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let acl = self.xattrs.then_some(InitFlags::FUSE_POSIX_ACL);
        let resend = self.resend.then_some(InitFlags::FUSE_HAS_RESEND);
        let wanted = WANTED.into_iter().chain(acl).chain(resend).collect::<InitFlags>();
        // A kernel that lacks one works without.
        let agreed = wanted & config.capabilities();
        let _ = config.add_capabilities(agreed);
        self.agreed.store(agreed.bits(), Ordering::Release);
        let skipping = InitFlags::FUSE_NO_OPEN_SUPPORT | InitFlags::FUSE_NO_OPENDIR_SUPPORT;
        self.skips_open = config.capabilities().contains(skipping);
        // Both refuse nothing but 0 and what exceeds the reader's buffer.
        config.set_max_write(device::MAX_READ).map_err(|_| io::ErrorKind::InvalidInput)?;
        let most = if agreed.contains(InitFlags::FUSE_HAS_RESEND) { u16::MAX } else { RECORDED };
        let most = self.max_background.min(most);
        config.set_max_background(most).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _taken = self.record(request, parent, &Operation::Lookup { name: name.as_bytes() });
        let inodes = self.inodes();
        let found = inodes.lookup(self.numbers.nid(parent), name.as_bytes());
        match found.and_then(|nid| inodes.inode(nid)) {
            Some(inode) => reply.entry(&FOREVER, &self.attributes(&inode), Generation(0)),
            // Number 0 means: there is no such name, and there will not be.
            None => reply.entry(&FOREVER, &attr::NONE, Generation(0)),
        }
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let _taken = self.record(request, ino, &Operation::GetAttr);
        match self.inode(ino) {
            Ok(inode) => reply.attr(&FOREVER, &self.attributes(&inode)),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let _taken = self.record(request, ino, &Operation::ReadLink);
        match self.inodes().symlink(self.numbers.nid(ino)) {
            Some(target) => reply.data(target),
            None => reply.error(Errno::EINVAL),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let _taken = self.record(request, ino, &Operation::Open);
        self.opened(reply);
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let _taken = self.record(request, ino, &Operation::OpenDir);
        self.opened(reply);
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let taken = self.record(request, ino, &Operation::Read { offset, size });
        self.answer_read(ino, offset, size, self.reader.owed(To::Session(reply), taken));
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let _taken = self.record(request, ino, &Operation::ReadDir { offset });
        for entry in self.inodes().entries(self.numbers.nid(ino), offset) {
            let number = self.numbers.number(entry.nid);
            let name = OsStr::from_bytes(entry.name);
            if reply.add(number, entry.next, attr::file_type(entry.kind), name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let _taken = self.record(request, ino, &Operation::ReadDirPlus { offset });
        for entry in self.inodes().entries(self.numbers.nid(ino), offset) {
            let Some(inode) = self.inodes().inode(entry.nid) else {
                return reply.error(Errno::EIO);
            };
            let attributes = self.attributes(&inode);
            let name = OsStr::from_bytes(entry.name);
            let number = attributes.ino;
            if reply.add(number, entry.next, name, &FOREVER, &attributes, Generation(0)) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let _taken = self.record(request, ino, &Operation::StatFs);
        let blocks = self.reader.content().data_len().div_ceil(u64::from(BLOCK_BYTES));
        let files = self.inodes().inode_count();
        reply.statfs(blocks, 0, 0, files, 0, BLOCK_BYTES, NAME_BYTES, BLOCK_BYTES);
    }

    fn getxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let taken = Operation::GetXattr { name: name.as_bytes(), size };
        let _taken = self.record(request, ino, &taken);
        if !self.xattrs {
            return reply.error(Errno::ENOSYS);
        }
        match self.inodes().xattr(self.numbers.nid(ino), name.as_bytes()) {
            Some(value) => sized(value, size, reply),
            None => reply.error(Errno::NO_XATTR),
        }
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _taken = self.record(request, ino, &Operation::ListXattr { size });
        if !self.xattrs {
            return reply.error(Errno::ENOSYS);
        }
        let mut names = Vec::new();
        for attribute in self.inodes().xattrs(self.numbers.nid(ino)) {
            names.extend_from_slice(attribute.prefix);
            names.extend_from_slice(attribute.suffix);
            names.push(0);
        }
        sized(&names, size, reply);
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let _taken = self.record(request, ino, &Operation::Release);
        reply.ok();
    }

    fn releasedir(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let _taken = self.record(request, ino, &Operation::ReleaseDir);
        reply.ok();
    }

    // What follows is refused in the way that makes the kernel do it by itself, or stop asking.

    fn flush(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: LockOwner,
        reply: ReplyEmpty,
    ) {
        let _taken = self.record(request, ino, &Operation::Flush);
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, request: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let _taken = self.record(request, ino, &Operation::FSync);
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(&self, request: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let _taken = self.record(request, ino, &Operation::FSyncDir);
        reply.error(Errno::ENOSYS);
    }

    fn lseek(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: i64,
        _: i32,
        reply: ReplyLseek,
    ) {
        let _taken = self.record(request, ino, &Operation::LSeek);
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        let _taken = self.record(request, ino, &Operation::IoCtl);
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        request: &Request,
        ino: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        let _taken = self.record(request, ino, &Operation::Poll);
        reply.error(Errno::ENOSYS);
    }

    // What the kernel wants no answer to has a number too.

    fn forget(&self, request: &Request, _: INodeNo, _: u64) {
        self.took(request);
    }
}

/// Answers a request for a value: its size if `size` is 0, else the value if it fits.
fn sized(value: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}
