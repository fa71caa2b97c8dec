//! The directories that a layer has only because something lies in them.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;

use skimmer_index::erofs::{FileKind, Inodes, Nid};

use super::{Cause, Failure, Layer};

/// Implicit directories of one layer that are told of. Beyond, the deepest keep made-up metadata.
const MAX_IMPLICIT: usize = 10_000;

/// Directories of one layer that are looked through.
const MAX_DIRS: usize = 250_000;

impl Layer {
    /// Paths, from the layer's root, of the directories that its tar has no entry for (see
    /// [`skimmer_index::tree::Inode::implicit`]), without the root itself: those near the root
    /// first, 10,000 at most. Waits until the layer is ready.
    pub async fn implicit_dirs(self: &Arc<Self>) -> Result<Vec<PathBuf>, Failure> {
        self.ready().await?;
        let open = self.opened().ok_or_else(|| self.failure(Cause::Released))?;
        let search = move || find(&open.inodes, MAX_IMPLICIT, MAX_DIRS);
        let found = tokio::task::spawn_blocking(search).await;
        let found = found.map_err(|_| self.failure(Cause::Interrupted))?;
        if !found.all {
            let spec = self.spec();
            tracing::info!(layer = %spec.blob.digest, image = spec.image, considered = found.paths.len(),
                "layer leaves out too many directories: those far down get default metadata");
        }
        Ok(found.paths)
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Found {
    paths: Vec<PathBuf>,
    /// Whether there are no others.
    all: bool,
}

/// A directory that was come across.
struct Seen<'a> {
    nid: Nid,
    name: &'a [u8],
    /// Place of its parent among those seen.
    parent: usize,
}

/// Looks level by level, so that what a bound cuts off is deepest.
fn find<B: AsRef<[u8]>>(inodes: &Inodes<B>, max_found: usize, max_seen: usize) -> Found {
    let mut seen = vec![Seen { nid: inodes.root(), name: b"", parent: 0 }];
    let mut paths = Vec::new();
    let mut parent = 0;
    while let Some(dir) = seen.get(parent) {
        let entries = inodes.entries(dir.nid, 0).filter(|entry| entry.kind == FileKind::Dir);
        for entry in entries.filter(|entry| !matches!(entry.name, b"." | b"..")) {
            let implicit = inodes.inode(entry.nid).is_some_and(|inode| inode.implicit);
            if seen.len() == max_seen || (implicit && paths.len() == max_found) {
                return Found { paths, all: false };
            }
            seen.push(Seen { nid: entry.nid, name: entry.name, parent });
            if implicit {
                paths.push(path(&seen, seen.len() - 1));
            }
        }
        parent += 1;
    }
    Found { paths, all: true }
}

fn path(seen: &[Seen<'_>], mut at: usize) -> PathBuf {
    let mut names = Vec::new();
    while at != 0 {
        let dir = &seen[at];
        names.push(OsString::from_vec(dir.name.to_vec()));
        at = dir.parent;
    }
    names.iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use skimmer_index::erofs::write;
    use skimmer_index::tar::{Entry, Kind, Limits};
    use skimmer_index::tree::TreeBuilder;

    fn check(entries: &[(&str, Kind)], bounds: (usize, usize), expected: (&[&str], bool)) {
        let mut tree = TreeBuilder::new(Limits::default());
        for (path, kind) in entries {
            let entry = Entry {
                path: path.as_bytes().to_vec(),
                kind: kind.clone(),
                mode: 0o755,
                uid: 0,
                gid: 0,
                mtime: (0, 0),
                xattrs: Vec::new(),
                size: 0,
                data: Vec::new(),
            };
            tree.insert(entry).unwrap();
        }
        let image = write(&tree.finish().unwrap(), 0).unwrap();
        let inodes = Inodes::open(&image.bytes, image.data_len).unwrap();
        let (paths, all) = expected;
        let paths = paths.iter().map(PathBuf::from).collect();
        assert_eq!(find(&inodes, bounds.0, bounds.1), Found { paths, all });
    }

    #[test]
    fn finds_what_has_no_entry_nearest_first() {
        let rows = [
            ("a/b/c/f", Kind::File),
            ("tmp/x", Kind::File),
            ("a/b", Kind::Dir),
            ("usr", Kind::Dir),
            ("usr/bin/sh", Kind::File),
        ];
        check(&[], (9, 9), (&[], true));
        check(&rows[3..4], (9, 9), (&[], true));
        let all = ["a", "tmp", "usr/bin", "a/b/c"];
        check(&rows, (9, 9), (&all, true));
        check(&rows, (4, 9), (&all, true));
        check(&rows, (3, 9), (&all[..3], false));
        // The root and three more.
        check(&rows, (9, 4), (&all[..2], false));
    }
}
