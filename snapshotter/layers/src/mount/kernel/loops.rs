//! Loop devices (loop(4)): a file as a block device, read-only, gone with its last user.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// From the kernel's `linux/loop.h`.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_SET_DIRECT_IO: libc::Ioctl = 0x4C08;
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;

/// Others look for a free device at the same time.
const ATTEMPTS: usize = 16;

/// `struct loop_info64`, of which only the flags are set.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// An attached device. Dropping it leaves the device to who mounted it, or else frees it.
pub struct Device {
    path: PathBuf,
    _file: File,
}

impl Device {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Attaches the file at `path` to a free device.
pub fn attach(path: &Path) -> io::Result<Device> {
    let file = File::open(path)?;
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    let mut taken = io::Error::from(io::ErrorKind::ResourceBusy);
    for _ in 0..ATTEMPTS {
        let path = PathBuf::from(format!("/dev/loop{}", free(&control)?));
        let device = OpenOptions::new().read(true).write(true).open(&path)?;
        match configure(&device, &file) {
            Ok(()) => return Ok(Device { path, _file: device }),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => taken = error,
            Err(error) => return Err(error),
        }
    }
    Err(taken)
}

/// Has every device that `file` is attached to read it past the page cache, and says how many there are. A device whose
/// file system can't do it is an error.
pub fn read_directly(file: &File) -> io::Result<usize> {
    let own = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let mut found = 0;
    for entry in fs::read_dir("/sys/block")? {
        let name = entry?.file_name();
        let attached = Path::new("/sys/block").join(&name).join("loop/backing_file");
        // No loop device, or a free one.
        let Ok(attached) = fs::read_to_string(attached) else { continue };
        if Path::new(attached.trim_end_matches('\n')) == own {
            set_direct(&OpenOptions::new().read(true).open(Path::new("/dev").join(name))?)?;
            found += 1;
        }
    }
    Ok(found)
}

#[expect(unsafe_code, reason = "nix has no loop devices")]
fn set_direct(device: &File) -> io::Result<()> {
    let on: libc::c_ulong = 1;
    // SAFETY: the call takes a number; the descriptor is open for as long as it lasts.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_DIRECT_IO, on) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[expect(unsafe_code, reason = "nix has no loop devices")]
fn free(control: &File) -> io::Result<i32> {
    // SAFETY: the call takes no argument; the descriptor is open for as long as it lasts.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    if number < 0 { Err(io::Error::last_os_error()) } else { Ok(number) }
}

#[expect(unsafe_code, reason = "nix has no loop devices")]
fn configure(device: &File, file: &File) -> io::Result<()> {
    let info = Info {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: READ_ONLY | AUTOCLEAR,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let fd = u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?;
    let config = Config { fd, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: `config` has the layout of the kernel's struct, which the call only reads.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::mount::direct::takes_blocks;

    /// What the device at `path` reads, past what is cached of the device itself.
    fn read(path: &Path, len: usize) -> Vec<u8> {
        let device = File::open(path).unwrap();
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&device, 0, 0, advice).unwrap();
        let mut bytes = vec![0; len];
        device.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_device_reads_the_same_past_the_page_cache_and_only_that_of_the_file() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let bytes: Vec<u8> = (0..300_032_u32).map(|n| (n % 251) as u8).collect();
        let file = || {
            let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            file.write_all(&bytes).unwrap();
            file
        };
        let (ours, other) = (file(), file());
        let (device, bystander) = (attach(ours.path()).unwrap(), attach(other.path()).unwrap());
        let is_direct = |device: &Device| {
            let name = Path::new("/sys/block").join(device.path().file_name().unwrap());
            fs::read_to_string(name.join("loop/dio")).unwrap() == "1\n"
        };
        assert_eq!((is_direct(&device), is_direct(&bystander)), (false, false));
        assert_eq!(read(device.path(), bytes.len()), bytes);
        // Where the file system can't, the error is told and the device stays as it is.
        let can = takes_blocks(ours.as_file()).unwrap();
        assert_eq!(read_directly(ours.as_file()).ok(), can.then_some(1));
        assert_eq!(is_direct(&device), can);
        assert!(!is_direct(&bystander));
        assert_eq!(read(device.path(), bytes.len()), bytes);
    }
}
