//! Complete layers, served by the kernel: EROFS over the inodes and the data file as they lie in the cache.
//!
//! Owns: which way this kernel can do it, found out by doing it.
//! Does not own: whether a layer may be mounted so: all its bytes have to be there, and proved.
//!
//! Such a mount needs no process: it stays when this one ends.

pub mod loops;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::read_ahead::Bdi;
use crate::label::Label;

/// The type that the mounts have in mountinfo.
pub const FILE_SYSTEM: &str = "erofs";

/// Blocks of 512 bytes, less than a page, can be mounted from this version of Linux on.
const SMALL_BLOCKS: (u32, u32) = (6, 4);

/// Files can be mounted without a block device from 6.12 on, but the first of its releases crash on small blocks
/// (CVE-2024-56750), which their number alone doesn't tell: so, from the next on.
const FILES: (u32, u32) = (6, 13);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("attach {} to a loop device", path.display())]
    Loop { path: PathBuf, source: io::Error },
    #[error("mount {} over {} at {}", inodes.display(), data.display(), at.display())]
    Mount { inodes: PathBuf, data: PathBuf, at: PathBuf, source: io::Error },
}

impl Error {
    /// Whether it is this kernel that can't do it, whatever the layer.
    fn is_inability(&self) -> bool {
        let (Self::Loop { source, .. } | Self::Mount { source, .. }) = self;
        let errno = Errno::from_raw(source.raw_os_error().unwrap_or(0));
        match self {
            Self::Loop { .. } => true,
            Self::Mount { .. } => {
                matches!(errno, Errno::ENODEV | Errno::ENOTBLK | Errno::EOPNOTSUPP | Errno::EPERM)
            }
        }
    }
}

/// A way to mount a layer's two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Files,
    Loops,
}

/// What this kernel can do.
#[derive(Debug)]
pub struct Kernel {
    /// Best first; those that turned out not to work are gone.
    ways: Mutex<Vec<Way>>,
}

impl Kernel {
    /// What the running kernel should be able to do; nothing, if it isn't `wanted`.
    pub fn new(wanted: bool) -> Self {
        let version = nix::sys::utsname::uname()
            .map_or((0, 0), |name| version(&name.release().to_string_lossy()));
        Self { ways: Mutex::new(if wanted { ways(version) } else { Vec::new() }) }
    }

    /// Whether it is worth trying.
    pub fn can(&self) -> bool {
        !self.ways.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Mounts a layer at `at`, read-only, with set-user-id programs and device nodes in force. `None`: this
    /// kernel can't.
    pub fn mount(
        &self,
        inodes: &Path,
        data: &Path,
        at: &Path,
        label: &Label,
    ) -> Result<Option<Bdi>, Error> {
        loop {
            let Some(way) = self.best() else { return Ok(None) };
            match way.mount(inodes, data, at, label) {
                Ok(bdi) => return Ok(Some(bdi)),
                Err(error) if error.is_inability() => {
                    tracing::info!(
                        ?way,
                        error = super::error_chain(&error),
                        "this kernel can't serve layers this way"
                    );
                    let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
                    ways.retain(|known| *known != way);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Mounts a layer whose data file may have gaps: the kernel has to read it as a file, as only such reads can be
    /// waited for.
    pub fn mount_gaps(inodes: &Path, data: &Path, at: &Path, label: &Label) -> Result<Bdi, Error> {
        erofs(inodes, data, at, label)
    }

    /// Whether files can be mounted without a block device.
    pub fn mounts_files(&self) -> bool {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner).contains(&Way::Files)
    }

    fn best(&self) -> Option<Way> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner).first().copied()
    }
}

impl Way {
    fn mount(self, inodes: &Path, data: &Path, at: &Path, label: &Label) -> Result<Bdi, Error> {
        if self == Self::Files {
            return erofs(inodes, data, at, label);
        }
        let attach = |path: &Path| {
            loops::attach(path).map_err(|source| Error::Loop { path: path.to_owned(), source })
        };
        // Each is detached when its last user is gone: this function, or the mount.
        let (inodes, data) = (attach(inodes)?, attach(data)?);
        erofs(inodes.path(), data.path(), at, label)
    }
}

fn erofs(inodes: &Path, data: &Path, at: &Path, label: &Label) -> Result<Bdi, Error> {
    let options = label.with(format!("device={}", data.display()));
    let flags = MsFlags::MS_RDONLY;
    let call = || mount(Some(inodes), at, Some(FILE_SYSTEM), flags, Some(options.as_str()));
    Bdi::of_new(call).map_err(|errno| {
        let (inodes, data, at) = (inodes.to_owned(), data.to_owned(), at.to_owned());
        Error::Mount { inodes, data, at, source: errno.into() }
    })
}

/// The inodes' file behind a mount whose source is `source`, as it was called when it was mounted.
pub fn inodes_of(source: &Path) -> Option<PathBuf> {
    if !source.starts_with("/dev") {
        return Some(source.to_owned());
    }
    let name = source.file_name()?.to_str()?;
    let text = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?;
    Some(PathBuf::from(text.trim_end().trim_end_matches(" (deleted)")))
}

fn ways(version: (u32, u32)) -> Vec<Way> {
    [(Way::Files, FILES), (Way::Loops, SMALL_BLOCKS)]
        .into_iter()
        .filter(|(_, since)| version >= *since)
        .map(|(way, _)| way)
        .collect()
}

/// `6.18.44-amd64` is version (6, 18).
pub fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use nix::mount::{MntFlags, umount2};
    use skimmer_index::erofs::write;
    use skimmer_index::tar::{Limits, TarWalk};
    use skimmer_index::tree::TreeBuilder;

    use super::*;
    use crate::mount::mount_info;

    /// The files of a layer with one file, as they lie in the cache: inodes and data.
    fn layer(folder: &Path, content: &[u8]) -> (PathBuf, PathBuf) {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_data(&mut header, "file", content).unwrap();
        let mut data = builder.into_inner().unwrap();

        let mut tree = TreeBuilder::new(Limits::default());
        let mut walk = TarWalk::new(Limits::default());
        walk.push(&data, &mut |entry| tree.insert(entry).map_err(Into::into)).unwrap();
        let image = write(&tree.finish().unwrap(), walk.finish().unwrap()).unwrap();
        data.resize(usize::try_from(image.data_len).unwrap(), 0);
        for copy in &image.copies {
            let numbers = [copy.from, copy.to, copy.len];
            let [from, to, len] = numbers.map(|number| usize::try_from(number).unwrap());
            data.copy_within(from..from + len, to);
        }
        let paths = (folder.join("inodes"), folder.join("data"));
        fs::write(&paths.0, image.bytes).unwrap();
        fs::write(&paths.1, data).unwrap();
        paths
    }

    /// What below `folder` is attached to loop devices.
    fn attached(folder: &Path) -> Vec<PathBuf> {
        let devices = fs::read_dir("/sys/block").unwrap().flatten();
        let files = devices.map(|device| device.path().join("loop/backing_file"));
        let files = files.filter_map(|file| fs::read_to_string(file).ok());
        let files = files.map(|file| PathBuf::from(file.trim_end()));
        let mut files: Vec<_> = files.filter(|file| file.starts_with(folder)).collect();
        files.sort();
        files
    }

    /// As before Linux 6.13.
    #[test]
    fn a_layer_on_loop_devices_reads_right_and_takes_them_with_it() {
        let running = nix::sys::utsname::uname().unwrap();
        let running = version(&running.release().to_string_lossy());
        if !nix::unistd::geteuid().is_root() || running < SMALL_BLOCKS {
            return;
        }
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().canonicalize().unwrap();
        let content: Vec<u8> = (0..3_000_077_u32).map(|n| (n % 251) as u8).collect();
        let (inodes, data) = layer(&folder, &content);
        let at = folder.join("at");
        fs::create_dir(&at).unwrap();
        let kernel = Kernel { ways: Mutex::new(vec![Way::Loops]) };
        let mounted = kernel.mount(&inodes, &data, &at, &Label::default()).unwrap();
        assert!(mounted.is_some(), "this kernel has no loop devices, or no EROFS");

        let (read, devices) = (fs::read(at.join("file")), attached(&folder));
        let line = mount_info().unwrap().into_iter().rfind(|line| line.mount_point == at);
        let source = line.and_then(|line| inodes_of(&line.source));
        umount2(&at, MntFlags::MNT_DETACH).unwrap();
        assert!(read.unwrap() == content);
        assert_eq!(source.as_ref(), Some(&inodes), "the next process knows whose mount it is");
        assert_eq!(devices, [data, inodes]);
        // Whoever looks at new devices may have them open for a moment.
        for _ in 0..500 {
            if attached(&folder).is_empty() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("still attached: {:?}", attached(&folder));
    }

    #[test]
    fn each_kernel_gets_what_it_can_do() {
        for (release, expected) in [
            ("6.1.0-44-amd64", &[][..]),
            ("6.4.0", &[Way::Loops]),
            ("6.12.57+deb13-amd64", &[Way::Loops]),
            ("6.13.0-rc1", &[Way::Files, Way::Loops]),
            ("6.18.44", &[Way::Files, Way::Loops]),
            ("nonsense", &[]),
        ] {
            assert_eq!(ways(version(release)), expected, "{release}");
        }
    }
}
