//! The buffer of a thread that takes requests, as far as a journal has to see into it.
//!
//! A thread that is killed while it waits for a request takes the one that is there all the same, and never gets to
//! writing it down. So the kernel itself has to write it where the next process looks: the page with which the buffer
//! begins is replaced by one of the journal's file. fuser's buffers can't be had in any other way.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// What is seen of a buffer.
pub const PAGE_BYTES: usize = 4096;

/// Where in its page a buffer of its own mapping begins: behind what glibc keeps there.
pub const BEGIN: usize = 16;

/// In the word before a buffer: it is a mapping of its own (glibc's `IS_MMAPPED`).
const IS_MAPPING: usize = 2;

/// Has the memory at `buffer`, into which this thread takes its requests, be that at `offset` of `file`.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "fuser has no way to be given a buffer")]
pub fn lend(file: &File, offset: u64, buffer: *const u8) -> io::Result<()> {
    let unlike = || io::Error::other("the buffer isn't a mapping of its own");
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?;
    if buffer.addr() % PAGE_BYTES != BEGIN || size != Some(PAGE_BYTES as i64) {
        return Err(unlike());
    }
    let start = buffer.cast_mut().wrapping_sub(BEGIN);
    // SAFETY: the page is mapped, as the buffer begins in it. Before the buffer, only the allocator's header is in it.
    let header = unsafe { start.add(size_of::<usize>()).cast::<usize>().read() };
    if header & IS_MAPPING == 0 {
        return Err(unlike());
    }
    let mut bytes = [0; PAGE_BYTES];
    // SAFETY: the page is mapped, and this thread's: a mapping of its own, of many pages, is nobody else's memory, and
    // the allocator looks at its header when it is freed.
    unsafe { start.copy_to_nonoverlapping(bytes.as_mut_ptr(), PAGE_BYTES) };
    file.write_all_at(&bytes, offset)?;
    let (read_write, shared) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE,
    );
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: the page is replaced by one with the same bytes, while nobody else uses it. It goes with the buffer, which
    // the allocator unmaps when it is freed.
    let mapped = unsafe {
        libc::mmap(start.cast(), PAGE_BYTES, read_write, shared, file.as_raw_fd(), offset)
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // The kernel fails a request that it can't write at once. It may be forbidden: then that is rarer.
    // SAFETY: the page has just been mapped.
    let _ = unsafe { libc::mlock(start.cast(), PAGE_BYTES) };
    Ok(())
}

#[cfg(not(target_env = "gnu"))]
pub fn lend(_: &File, _: u64, _: *const u8) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
