//! `/dev/fuse`: mounting by hand and serving a descriptor.
//!
//! Mounting by hand (mount(2) with the descriptor's number) and not through a library leaves the
//! descriptor in our keeping: whoever holds it holds the mount, whatever happens to this process.
//!
//! A mount that a dead process left is [resumed](Device::resume) by its descriptor. The kernel greets a server only
//! once, so that the successor is greeted over a socket in its place, with what was agreed on then; the descriptor
//! then takes the socket's number, and the kernel is asked to send again what was never answered
//! (`FUSE_NOTIFY_RESEND`, Linux 6.9). What a kernel that can't was not answered is [found elsewhere](super::replay).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread;

use fuser::{Filesystem, INodeNo, InitFlags, Session, SessionACL};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::dup3_raw;

use crate::config::FuseConfig;

/// The type that the mounts have in mountinfo.
pub const FILE_SYSTEM: &str = "fuse.skimmer";

/// The largest read that the kernel asks for at once.
pub const MAX_READ: u32 = 1 << 20;

/// `struct fuse_in_header` and `struct fuse_init_in` of the kernel's `linux/fuse.h`.
const INIT_LEN: u32 = 40 + 64;
const FUSE_INIT: u32 = 26;
const MAJOR: u32 = 7;
/// Whatever the kernel speaks by now, all that is said to it exists since then.
const MINOR: u32 = 40;
const FUSE_NOTIFY_INVAL_INODE: u32 = 2;
const FUSE_NOTIFY_RESEND: u32 = 7;

/// The joining thread does nothing but wait.
const STACK_BYTES: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("open /dev/fuse (is the fuse module loaded?)")]
    Open { source: io::Error },
    #[error("mount {} (needs CAP_SYS_ADMIN)", path.display())]
    Mount { path: PathBuf, source: io::Error },
    #[error("greet the kernel on /dev/fuse")]
    Handshake { source: io::Error },
    #[error("take over a mount from an earlier process")]
    TakeOver { source: io::Error },
    #[error("start a thread")]
    Thread { source: io::Error },
}

/// From this size on, memory is taken from the kernel and given back to it, always.
const MAPPED_BYTES: libc::c_int = 4 << 20;

/// Tells the allocator to map and unmap large buffers. Each thread that takes requests has one of 16
/// MiB, of which the kernel touches a few pages. glibc maps such buffers too, until the first is
/// freed; then it takes them from its heaps, zeroes them by hand, and every idle mount holds 16 MiB.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "no safe wrapper of mallopt(3) is at hand")]
pub fn bound_idle_memory() {
    // SAFETY: mallopt sets a parameter of the allocator under the allocator's own lock.
    if unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES) } != 1 {
        tracing::warn!("the allocator can't be tuned: idle mounts will take more memory");
    }
}

#[cfg(not(target_env = "gnu"))]
pub fn bound_idle_memory() {}

/// An open `/dev/fuse` that is mounted somewhere.
#[derive(Debug)]
pub struct Device {
    file: Arc<File>,
}

impl Device {
    /// Opens the device and mounts it at `path`: read-only, with set-user-id programs and device
    /// nodes in force, permissions checked by the kernel, for all users. `source` is what mountinfo says of it.
    pub fn mount(path: &Path, source: &str) -> Result<Self, Error> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .map_err(|source| Error::Open { source })?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={MAX_READ}",
            file.as_raw_fd()
        );
        mount(Some(source), path, Some(FILE_SYSTEM), MsFlags::MS_RDONLY, Some(options.as_str()))
            .map_err(|errno| Error::Mount { path: path.to_owned(), source: errno.into() })?;
        Ok(Self { file: Arc::new(file) })
    }

    /// The device behind a mount that an earlier process left.
    pub fn left(descriptor: OwnedFd) -> Self {
        Self { file: Arc::new(descriptor.into()) }
    }

    /// By which the kernel can be told something, for as long as it is served.
    pub fn link(&self) -> Weak<File> {
        Arc::downgrade(&self.file)
    }

    /// Answers the kernel from threads of its own until the file system is unmounted and unused. `greeted` is called
    /// when it is known what the kernel agrees on, and before it asks for anything.
    pub fn serve<F: Filesystem>(
        &self,
        file_system: F,
        config: &FuseConfig,
        greeted: impl FnOnce(),
    ) -> Result<thread::JoinHandle<()>, Error> {
        let descriptor = self.duplicate().map_err(|source| Error::Handshake { source })?;
        let session = Session::from_fd(file_system, descriptor, SessionACL::All, settings(config))
            .map_err(|source| Error::Handshake { source })?;
        greeted();
        run(session, Arc::clone(&self.file))
    }

    /// The same for a mount whose kernel agreed on `flags` with an earlier process, which is gone.
    pub fn resume<F: Filesystem>(
        &self,
        file_system: F,
        flags: InitFlags,
        config: &FuseConfig,
    ) -> Result<thread::JoinHandle<()>, Error> {
        let failed = |source| Error::TakeOver { source };
        let (_kernel, session) = greet_over_socket(file_system, flags, config).map_err(failed)?;
        self.replace(session.as_fd().as_raw_fd()).map_err(failed)?;
        if flags.contains(InitFlags::FUSE_HAS_RESEND) {
            nix::unistd::write(&*self.file, &resend()).map_err(|errno| failed(errno.into()))?;
        }
        run(session, Arc::clone(&self.file))
    }

    fn duplicate(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Has descriptor `number`, a session's, mean this device.
    #[expect(unsafe_code, reason = "the session has no way to be given another descriptor")]
    fn replace(&self, number: i32) -> io::Result<()> {
        // SAFETY: the number is the session's, which lives and owns it before as after; the socket that it meant is
        // closed by the call, and by nobody else.
        let new = unsafe { dup3_raw(&*self.file, number, OFlag::O_CLOEXEC) }?;
        // It is the session's to close.
        let _ = new.into_raw_fd();
        Ok(())
    }
}

/// A session that was greeted as by a kernel which agrees on `flags`, and the other end of its socket, in which its
/// answer lies.
pub fn greet_over_socket<F: Filesystem>(
    file_system: F,
    flags: InitFlags,
    config: &FuseConfig,
) -> io::Result<(OwnedFd, Session<F>)> {
    let (kernel, server) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    nix::unistd::write(&kernel, &greeting(flags))?;
    let session = Session::from_fd(file_system, server, SessionACL::All, settings(config))?;
    Ok((kernel, session))
}

fn settings(config: &FuseConfig) -> fuser::Config {
    let mut settings = fuser::Config::default();
    settings.n_threads = Some(config.threads.max(1));
    // A clone's closing would abort the requests that it took.
    settings.clone_fd = false;
    settings
}

/// Serves until the end; what [`Device::link`] gives works until then.
fn run<F: Filesystem>(
    session: Session<F>,
    linked: Arc<File>,
) -> Result<thread::JoinHandle<()>, Error> {
    thread::Builder::new()
        .name("fuse-session".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            if let Err(error) = session.run() {
                tracing::error!(%error, "stopped serving a mount: its readers now fail");
            }
            drop(linked);
        })
        .map_err(|source| Error::Thread { source })
}

/// A `FUSE_INIT` request as the kernel sends it, offering `flags`.
fn greeting(flags: InitFlags) -> Vec<u8> {
    let flags = (flags | InitFlags::FUSE_INIT_EXT).bits();
    let (low, high) = (flags & u64::from(u32::MAX), flags >> 32);
    let unique = 1u64;
    let mut message = Vec::new();
    message.extend(INIT_LEN.to_ne_bytes());
    message.extend(FUSE_INIT.to_ne_bytes());
    message.extend(unique.to_ne_bytes());
    // Inode, user, group, process, length of extensions.
    message.extend([0; 8 + 4 + 4 + 4 + 4]);
    for word in [u64::from(MAJOR), u64::from(MINOR), u64::from(MAX_READ), low, high] {
        message.extend(u32::try_from(word).unwrap_or(0).to_ne_bytes());
    }
    message.resize(INIT_LEN as usize, 0);
    message
}

/// The notification that asks for everything that was taken and not answered.
fn resend() -> Vec<u8> {
    let (len, unique) = (16u32, 0u64);
    [&len.to_ne_bytes()[..], &FUSE_NOTIFY_RESEND.to_ne_bytes(), &unique.to_ne_bytes()].concat()
}

/// Has the kernel forget what it has cached of the file with this inode number. Waits for reads of it to be answered.
pub fn forget_cached(device: &File, inode: INodeNo) -> io::Result<()> {
    match nix::unistd::write(device, &invalidation(inode)) {
        // It doesn't know the file.
        Ok(_) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The notification that the whole file has changed: `struct fuse_out_header`, then
/// `struct fuse_notify_inval_inode_out` (inode, offset, length; 0 is all).
fn invalidation(inode: INodeNo) -> Vec<u8> {
    let (len, unique) = (16u32 + 24, 0u64);
    let mut message = len.to_ne_bytes().to_vec();
    message.extend(FUSE_NOTIFY_INVAL_INODE.to_ne_bytes());
    for word in [unique, inode.0, 0, 0] {
        message.extend(word.to_ne_bytes());
    }
    message
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
