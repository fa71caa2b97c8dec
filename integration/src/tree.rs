//! What a directory tree looks like to `lstat`, `readlink`, `getxattr` and `read`, and how two trees differ.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, OsStr};
use std::fmt;
use std::fs::File;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use anyhow::Context as _;
use skimmer_proto::Digest;

use crate::layer::digest_of;

/// A tree's entries by their path below its root, the root itself as the empty path.
pub type Tree = BTreeMap<Vec<u8>, Entry>;

/// Everything about one path; its `Debug` is short enough for a list of differences. Sizes of directories and link counts of directories are left out: they depend
/// on the file system and mean nothing to a reader.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    pub kind: Kind,
    pub mode: u32,
    pub owner: (u32, u32),
    /// Seconds and nanoseconds.
    pub time: (i64, i64),
    /// 0 for directories.
    pub links: u64,
    /// The first path with the same inode, if that is another.
    pub same_as: Option<Vec<u8>>,
    pub attributes: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File { size: u64, content: Digest },
    Symlink { target: Vec<u8> },
    CharDevice { number: u64 },
    BlockDevice { number: u64 },
    Fifo,
    Socket,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, mode, owner: (uid, gid), time: (seconds, nanos), links, .. } = self;
        write!(f, "{kind:?} {mode:o} {uid}:{gid} at {seconds}.{nanos:09} x{links}")?;
        if let Some(first) = &self.same_as {
            write!(f, " = {}", first.escape_ascii())?;
        }
        for (name, value) in &self.attributes {
            let start = &value[..value.len().min(24)];
            write!(f, " {}={}({})", name.escape_ascii(), start.escape_ascii(), value.len())?;
        }
        Ok(())
    }
}

/// Reads the tree at `root`, every byte of it.
pub fn read(root: &Path) -> anyhow::Result<Tree> {
    let mut tree = Tree::new();
    let mut seen = HashMap::new();
    visit(root, Vec::new(), &mut tree, &mut seen)?;
    Ok(tree)
}

fn visit(
    root: &Path,
    path: Vec<u8>,
    tree: &mut Tree,
    seen: &mut HashMap<(u64, u64), Vec<u8>>,
) -> anyhow::Result<()> {
    let full = root.join(OsStr::from_bytes(&path));
    let entry = entry(&full, &path, seen).with_context(|| format!("look at {}", full.display()))?;
    let is_directory = entry.kind == Kind::Directory;
    tree.insert(path.clone(), entry);
    if !is_directory {
        return Ok(());
    }
    let mut names = Vec::new();
    for child in std::fs::read_dir(&full).with_context(|| format!("list {}", full.display()))? {
        names.push(
            child.with_context(|| format!("list {}", full.display()))?.file_name().into_vec(),
        );
    }
    names.sort();
    for name in names {
        let child = if path.is_empty() { name } else { [&path, &b"/"[..], &name].concat() };
        visit(root, child, tree, seen)?;
    }
    Ok(())
}

fn entry(
    full: &Path,
    path: &[u8],
    seen: &mut HashMap<(u64, u64), Vec<u8>>,
) -> anyhow::Result<Entry> {
    let meta = std::fs::symlink_metadata(full)?;
    let kind = meta.file_type();
    let kind = if kind.is_dir() {
        Kind::Directory
    } else if kind.is_symlink() {
        Kind::Symlink { target: std::fs::read_link(full)?.into_os_string().into_vec() }
    } else if kind.is_char_device() {
        Kind::CharDevice { number: meta.rdev() }
    } else if kind.is_block_device() {
        Kind::BlockDevice { number: meta.rdev() }
    } else if kind.is_fifo() {
        Kind::Fifo
    } else if kind.is_socket() {
        Kind::Socket
    } else {
        let (content, length) = digest_of(&mut File::open(full)?)?;
        anyhow::ensure!(length == meta.len(), "{length} bytes read of {}", meta.len());
        Kind::File { size: meta.len(), content }
    };
    let directory = kind == Kind::Directory;
    let same_as = if directory {
        None
    } else {
        let first = seen.entry((meta.dev(), meta.ino())).or_insert_with(|| path.to_vec());
        (first != path).then(|| first.clone())
    };
    Ok(Entry {
        kind,
        mode: meta.mode() & 0o7777,
        owner: (meta.uid(), meta.gid()),
        time: (meta.mtime(), meta.mtime_nsec()),
        links: if directory { 0 } else { meta.nlink() },
        same_as,
        attributes: attributes(full)?,
    })
}

/// The differences between two trees, a line each; none if they are equal.
pub fn differences(expected: &Tree, actual: &Tree) -> Vec<String> {
    let mut found = Vec::new();
    for (path, entry) in expected {
        let name = String::from_utf8_lossy(path);
        match actual.get(path) {
            None => found.push(format!("{name}: missing, expected {entry:?}")),
            Some(other) if other != entry => {
                found.push(format!("{name}: {other:?}\n    expected: {entry:?}"))
            }
            Some(_) => {}
        }
    }
    for (path, entry) in actual {
        if !expected.contains_key(path) {
            found.push(format!("{}: unexpected {entry:?}", String::from_utf8_lossy(path)));
        }
    }
    found
}

/// All extended attributes of `path` itself, also those that only root sees.
fn attributes(path: &Path) -> anyhow::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let file = CString::new(path.as_os_str().as_bytes())?;
    let names = sized(|buffer, room| {
        #[expect(unsafe_code, reason = "libc has no safe llistxattr")]
        // SAFETY: `file` is NUL-terminated; at most `room` bytes are written to `buffer`, which has them.
        unsafe {
            libc::llistxattr(file.as_ptr(), buffer.cast(), room)
        }
    })?;
    let mut found = BTreeMap::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let text = CString::new(name)?;
        let value = sized(|buffer, room| {
            #[expect(unsafe_code, reason = "libc has no safe lgetxattr")]
            // SAFETY: as above, and `text` is NUL-terminated.
            unsafe {
                libc::lgetxattr(file.as_ptr(), text.as_ptr(), buffer.cast(), room)
            }
        })?;
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}

/// Calls `fill` with a buffer that is large enough for any attribute (64 KiB, as xattr(7) bounds both).
fn sized(fill: impl FnOnce(*mut u8, usize) -> isize) -> anyhow::Result<Vec<u8>> {
    let mut buffer = vec![0; 1 << 16];
    let length = fill(buffer.as_mut_ptr(), buffer.len());
    match usize::try_from(length) {
        Ok(length) => {
            buffer.truncate(length);
            Ok(buffer)
        }
        Err(_) => {
            let error = std::io::Error::last_os_error();
            // A file system without attributes has none.
            if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
                Ok(Vec::new())
            } else {
                Err(error.into())
            }
        }
    }
}
