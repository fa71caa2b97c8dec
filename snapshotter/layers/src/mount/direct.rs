//! Reads past the data file's own page cache: of what EROFS reads from a file, the page cache holds two copies, one as
//! the container's file and one as the data file's, and the first is copied from the second. With `directio`
//! (Documentation/filesystems/erofs.rst), or of a loop device with direct I/O, it reads from the disk into the first.
//!
//! Worth it only when the second is gone: what has just been written is better read from memory. And `directio` only
//! with kernels that don't crash of it (CVE-2026-23224).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use rustix::fs::{AtFlags, StatxFlags, statx};

use super::kernel::{self, Kernel, loops};

/// What reads are multiples of: EROFS has blocks of 512 bytes here, as the tar has.
const BLOCK_BYTES: u32 = 512;

/// The unit of the page cache's figures.
const PAGE_BYTES: u64 = 4096;

/// Number of cachestat(2) (Linux 6.5), which is the same on every architecture.
const CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of the kernel's `linux/mman.h`; length 0 is the whole file.
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

/// `struct cachestat` of the same: numbers of pages.
#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Whether the disk can take the reads of `file`, and most of it isn't in memory.
pub fn suits(file: &File) -> io::Result<bool> {
    let len = file.metadata()?.len();
    Ok(takes_blocks(file)? && is_mostly_gone(cached_pages(file)?, len))
}

/// Whether EROFS over files does it safely with the running kernel.
fn is_safe() -> bool {
    nix::sys::utsname::uname().is_ok_and(|name| fixed(&name.release().to_string_lossy()))
}

/// Whether a kernel of this release has the fix: 7.0 and later, and what 6.18 and 6.19 were given.
fn fixed(release: &str) -> bool {
    let version = kernel::version(release);
    let patch =
        release.split(['.', '-']).nth(2).and_then(|patch| patch.parse::<u32>().ok()).unwrap_or(0);
    match version {
        (6, 18) => patch >= 11,
        (6, 19) => patch >= 1,
        version => version >= (7, 0),
    }
}

/// Whether what `kernel` mounts can read so.
pub fn is_possible(kernel: &Kernel) -> bool {
    kernel.can() && (is_safe() || !kernel.mounts_files())
}

/// Has the EROFS at `path` read `data` from the disk from now on: by its loop device or, if it has none, by itself.
/// Whether it does.
pub fn turn_on(path: &Path, data: &File) -> io::Result<bool> {
    if loops::read_directly(data)? > 0 {
        return Ok(true);
    }
    if !is_safe() {
        return Ok(false);
    }
    let none = None::<&str>;
    mount(none, path, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, Some("directio"))?;
    Ok(true)
}

/// Whether its file system says that it reads such blocks directly.
pub fn takes_blocks(file: &File) -> io::Result<bool> {
    let known = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let fits = |align: u32| align > 0 && BLOCK_BYTES.is_multiple_of(align);
    Ok(known.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        && fits(known.stx_dio_mem_align)
        && fits(known.stx_dio_offset_align))
}

const fn is_mostly_gone(cached_pages: u64, len: u64) -> bool {
    cached_pages < len.div_ceil(PAGE_BYTES).div_ceil(2)
}

#[expect(unsafe_code, reason = "there is no safe wrapper of this system call")]
fn cached_pages(file: &File) -> io::Result<u64> {
    let (all, mut found) = (Range { offset: 0, len: 0 }, CacheStat::default());
    // SAFETY: both structs have the kernel's layout and live until the call returns; it reads the first and writes
    // the second.
    let done =
        unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const all, &raw mut found, 0) };
    if done == 0 { Ok(found.cached) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

    use super::*;

    #[test]
    fn kernels_that_crash_are_left_alone() {
        for release in ["6.18.11", "6.18.44-fc-v669", "6.19.1", "7.0.0", "7.0.0-rc1", "8.1.2-arch1"]
        {
            assert!(fixed(release), "{release}");
        }
        for release in
            ["6.13.2", "6.17.9-1-default", "6.18.0", "6.18.10-200.fc43", "6.18", "6.19.0-rc3", "?"]
        {
            assert!(!fixed(release), "{release}");
        }
    }

    #[test]
    fn half_of_the_file_decides() {
        assert!(is_mostly_gone(0, 1));
        assert!(!is_mostly_gone(1, 1));
        assert!(is_mostly_gone(1, 3 * PAGE_BYTES));
        assert!(!is_mostly_gone(2, 3 * PAGE_BYTES));
        assert!(!is_mostly_gone(0, 0));
    }

    #[test]
    fn what_was_written_is_in_memory_until_it_is_dropped() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all_at(&[7; 1 << 20], 0).unwrap();
        let Ok(cached) = cached_pages(&file) else { return };
        assert_eq!(cached, 256);
        assert!(!suits(&file).unwrap());
        file.sync_all().unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        assert_eq!(cached_pages(&file).unwrap(), 0);
        assert_eq!(suits(&file).unwrap(), takes_blocks(&file).unwrap());
    }
}
