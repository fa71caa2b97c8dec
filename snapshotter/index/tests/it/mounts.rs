//! EROFS mounts that end with the test.

use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The kernel reads the two files itself: Linux 6.12.
    Files,
    /// Through loop devices.
    Loop,
}

/// A mount; dropping it unmounts and detaches.
pub struct Mount {
    target: PathBuf,
    devices: Vec<Loop>,
}

/// A loop device; dropping it detaches.
struct Loop(String);

/// Mounts an image over its data file; `None` if the kernel can't mount files.
pub fn erofs(how: How, image: &Path, data: &Path, target: &Path) -> Option<Mount> {
    let devices: Vec<Loop> = match how {
        How::Files => Vec::new(),
        How::Loop => [image, data].map(attach).into_iter().collect(),
    };
    let (source, device) = match &devices[..] {
        [image, data] => (image.0.clone(), data.0.clone()),
        _ => (image.display().to_string(), data.display().to_string()),
    };
    let options = format!("device={device}");
    let flags = MsFlags::MS_RDONLY;
    match mount(Some(source.as_str()), target, Some("erofs"), flags, Some(options.as_str())) {
        Ok(()) => Some(Mount { target: target.to_owned(), devices }),
        Err(nix::Error::ENOTBLK) if how == How::Files => None,
        Err(error) => panic!("mount erofs ({how:?}): {error}"),
    }
}

fn attach(file: &Path) -> Loop {
    let mut losetup = Command::new("losetup");
    losetup.args(["--show", "--find", "--read-only"]).arg(file);
    Loop(super::run(&mut losetup).trim().to_owned())
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.target, MntFlags::empty()) {
            eprintln!("unmount {}: {error}", self.target.display());
            let _ = umount2(&self.target, MntFlags::MNT_DETACH);
        }
        self.devices.clear();
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}
