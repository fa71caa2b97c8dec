//! How much disk a folder takes: blocks, each inode once.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::Usage;

/// `st_blocks` counts these, whatever the file system's own block size.
const BLOCK: u64 = 512;

/// Blocks and inodes of the tree at `path`, itself included. What disappears meanwhile isn't
/// counted; other file systems mounted inside are not entered.
pub fn measure(path: &Path) -> io::Result<Usage> {
    let root = fs::symlink_metadata(path)?;
    let mut usage = Usage { bytes: root.blocks() * BLOCK, inodes: 1 };
    let mut linked = HashSet::new();
    let mut folders = vec![path.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let found = match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                found => found?,
            };
            if found.dev() != root.dev() {
                continue;
            }
            if found.is_dir() {
                folders.push(entry.path());
            } else if found.nlink() > 1 && !linked.insert(found.ino()) {
                continue;
            }
            usage.inodes += 1;
            usage.bytes += found.blocks() * BLOCK;
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_each_inode_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let empty = measure(path).unwrap();
        assert_eq!(empty.inodes, 1);
        fs::create_dir(path.join("a")).unwrap();
        fs::write(path.join("a/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(path.join("a/file"), path.join("b")).unwrap();
        std::os::unix::fs::symlink("/nowhere", path.join("c")).unwrap();
        let full = measure(path).unwrap();
        assert_eq!(full.inodes, 4);
        assert!((100_000..200_000).contains(&(full.bytes - empty.bytes)), "{full:?}");
        assert!(measure(&path.join("missing")).is_err());
    }
}
