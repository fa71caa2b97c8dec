//! Mounts of a test: made through mount(8), found in mountinfo, and taken away in the right order.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::mount::{MntFlags, umount2};

use crate::command;

/// A mount made by [`mount`]; unmounted when dropped.
pub struct Mounted {
    path: PathBuf,
}

impl Mounted {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Whatever is left is found again, and reported, at the end of the scenario.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

/// Mounts what containerd describes as `kind`, `source` and `options` at `target`, which is created.
pub fn mount(
    kind: &str,
    source: &str,
    options: &[String],
    target: &Path,
) -> anyhow::Result<Mounted> {
    std::fs::create_dir_all(target).with_context(|| format!("create {}", target.display()))?;
    let target_text = target.to_str().context("mount point is not UTF-8")?;
    let joined = options.join(",");
    let mut arguments = vec!["-t", kind, source, target_text];
    if !joined.is_empty() {
        arguments.extend(["-o", &joined]);
    }
    command::run("mount", arguments).with_context(|| format!("mount {kind} at {target_text}"))?;
    Ok(Mounted { path: target.to_owned() })
}

/// The mount points below `folder`, in the order in which they were mounted.
pub fn below(folder: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| PathBuf::from(unescape(path)))
        .filter(|path| path.starts_with(folder))
        .collect()
}

/// Unmounts everything below `folder`, the last mount first.
///
/// Detached mounts vanish from here even while a process still uses them.
pub fn unmount_below(folder: &Path) {
    for path in below(folder).iter().rev() {
        let _ = umount2(path, MntFlags::MNT_DETACH);
    }
}

/// Undoes mountinfo's octal escapes of blank, tab, newline and backslash.
fn unescape(path: &str) -> String {
    path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}
