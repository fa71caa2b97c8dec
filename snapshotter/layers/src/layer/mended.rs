//! Files of which bytes in the data file were wrong, and are right now: the kernel may have cached them as they were.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use skimmer_index::erofs::{FileKind, Inodes, Nid};

use super::Layer;
use crate::mount::{error_chain, forget_cached};

impl Layer {
    /// Has the kernel read again the files with bytes in these parts of the data file, where it serves them. What this
    /// process serves stays cached as it was until memory lets go of it. Blocks.
    pub(crate) fn read_again(&self, mended: &[Range<u64>]) {
        let (open, mounts) = {
            let core = self.core();
            let Some(open) = core.open.clone() else { return };
            let mounts = core.mount.iter().chain(&core.former).filter(|mount| !mount.is_fuse());
            (open, mounts.map(|mount| mount.path().to_owned()).collect::<Vec<_>>())
        };
        if mounts.is_empty() {
            return;
        }
        for file in affected(&open.inodes, mended) {
            for mount in &mounts {
                if let Err(error) = forget_cached(mount, &file) {
                    tracing::warn!(layer = %self.digest(), file = %file.display(), error = error_chain(&error),
                        "the kernel may have cached bytes that were wrong on disk");
                }
            }
        }
    }
}

/// One path from the layer's root of each regular file with bytes in `parts` of the data file.
fn affected<B: AsRef<[u8]>>(inodes: &Inodes<B>, parts: &[Range<u64>]) -> Vec<PathBuf> {
    let mut seen = BTreeSet::from([inodes.root()]);
    let mut dirs = vec![(inodes.root(), PathBuf::new())];
    let mut found = Vec::new();
    while let Some((dir, path)) = dirs.pop() {
        let entries = inodes.entries(dir, 0);
        for entry in entries.filter(|entry| !matches!(entry.name, b"." | b"..")) {
            if !seen.insert(entry.nid) {
                continue;
            }
            let path = path.join(OsStr::from_bytes(entry.name));
            match entry.kind {
                FileKind::Dir => dirs.push((entry.nid, path)),
                FileKind::File if lies_in(inodes, entry.nid, parts) => found.push(path),
                _ => {}
            }
        }
    }
    found
}

fn lies_in<B: AsRef<[u8]>>(inodes: &Inodes<B>, nid: Nid, parts: &[Range<u64>]) -> bool {
    inodes.extents(nid, 0..u64::MAX).any(|extent| {
        let meets =
            |at: u64| parts.iter().any(|part| at < part.end && part.start < at + extent.len);
        extent.at.is_some_and(meets)
    })
}
