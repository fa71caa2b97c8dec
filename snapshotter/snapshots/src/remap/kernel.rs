//! What the kernel does for [`super::Remaps`]: user namespaces, and mounts mapped through them
//! (mount_setattr(2), user_namespaces(7)).

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::idmap::{Mapping, Range};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make a process in a user namespace (is user.max_user_namespaces 0?)")]
    Process(#[source] io::Error),
    #[error("write {path}")]
    Map { path: String, source: io::Error },
    #[error("open {path}")]
    Open { path: String, source: io::Error },
    #[error("clone the mount")]
    Clone(#[source] io::Error),
    #[error("map the ids of the mount; its file system may not be able to")]
    Ids(#[source] io::Error),
    #[error("put the mount in its place")]
    Move(#[source] io::Error),
}

/// A user namespace with these ids. It lives as long as the descriptor, and as mounts that use it.
pub fn user_namespace(mapping: &Mapping) -> Result<OwnedFd, Error> {
    let (reader, writer) = io::pipe().map_err(Error::Process)?;
    let child = wait_in_user_namespace(&reader, &writer).map_err(Error::Process)?;
    let namespace = describe(child, mapping);
    // The child reads the end of the pipe, and is gone.
    drop(writer);
    // It can't be anybody else's child; that it ended well doesn't matter any more.
    let _ = waitpid(child, None);
    namespace
}

/// Maps the ids of the new process's user namespace, and opens that.
fn describe(child: Pid, mapping: &Mapping) -> Result<OwnedFd, Error> {
    for (file, ranges) in [("uid_map", &mapping.uids), ("gid_map", &mapping.gids)] {
        let path = format!("/proc/{child}/{file}");
        let line = |range: &Range| format!("{} {} {}\n", range.container, range.host, range.count);
        let text: String = ranges.iter().map(line).collect();
        fs::write(&path, text).map_err(|source| Error::Map { path, source })?;
    }
    let path = format!("/proc/{child}/ns/user");
    File::open(&path).map(OwnedFd::from).map_err(|source| Error::Open { path, source })
}

/// A child process in a user namespace of its own, which ends when all writers of the pipe are closed.
#[expect(
    unsafe_code,
    reason = "a namespace needs a process, and a process with threads can't fork safely"
)]
fn wait_in_user_namespace(reader: &PipeReader, writer: &PipeWriter) -> io::Result<Pid> {
    let (reader, writer) = (reader.as_raw_fd(), writer.as_raw_fd());
    let flags = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
    let none: libc::c_long = 0;
    // SAFETY: without CLONE_VM and without a stack this is fork(2): the child goes on here, in a copy
    // of the memory. Other threads may have held any lock, so that it makes system calls only, which
    // take none, and never returns.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    if child == 0 {
        wait_for_end(reader, writer);
    }
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Pid::from_raw(i32::try_from(child).map_err(io::Error::other)?))
}

/// What the child does: system calls only.
#[expect(unsafe_code, reason = "std's close, read and exit may take locks")]
fn wait_for_end(reader: RawFd, writer: RawFd) -> ! {
    // SAFETY: these are system calls on descriptors that this process has and nobody else in it uses.
    unsafe {
        libc::close(writer);
        let mut byte = 0u8;
        let at = (&raw mut byte).cast();
        while libc::read(reader, at, 1) < 0 && *libc::__errno_location() == libc::EINTR {}
        libc::_exit(0)
    }
}

/// Mounts the tree at `from` at `to` too, read-only, its files' ids mapped as in `users`.
pub fn mount_mapped(from: &Path, to: &Path, users: &OwnedFd) -> Result<(), Error> {
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
    let tree = open_tree(&text(from).map_err(Error::Clone)?).map_err(Error::Clone)?;
    set_ids(tree.as_fd(), users.as_fd()).map_err(Error::Ids)?;
    move_mount(tree.as_fd(), &text(to).map_err(Error::Move)?).map_err(Error::Move)
}

/// A clone of the mount that `path` is in, from `path` on, attached nowhere.
#[expect(unsafe_code, reason = "neither std nor nix has open_tree(2)")]
fn open_tree(path: &CString) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path is a C string that outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[expect(unsafe_code, reason = "neither std nor nix has mount_setattr(2)")]
fn set_ids(tree: BorrowedFd<'_>, users: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: u64::try_from(users.as_raw_fd()).map_err(io::Error::other)?,
    };
    // SAFETY: the empty path is a C string, and the struct is as large as the call says.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[expect(unsafe_code, reason = "neither std nor nix has move_mount(2)")]
fn move_mount(tree: BorrowedFd<'_>, to: &CString) -> io::Result<()> {
    // SAFETY: both paths are C strings that outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
