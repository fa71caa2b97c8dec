//! Everything that can be seen of a tree, for comparison.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

/// Lines by path.
pub type Listing = BTreeMap<String, String>;

pub fn of(root: &Path) -> Listing {
    let mut out = Listing::new();
    let mut groups: BTreeMap<u64, String> = BTreeMap::new();
    walk(root, root, &mut out, &mut groups);
    let mut getfattr = Command::new("getfattr");
    getfattr.args(["-R", "-P", "-h", "-d", "-m", "-", "-e", "hex", "."]).current_dir(root);
    for block in super::run(&mut getfattr).split("\n\n").filter(|block| !block.is_empty()) {
        let (file, values) = block.split_once('\n').unwrap();
        let mut values: Vec<_> =
            values.lines().filter(|l| !l.starts_with("security.selinux")).collect();
        values.sort_unstable();
        out.insert(format!("xattrs of {file}"), values.join(" "));
    }
    out
}

fn walk(root: &Path, path: &Path, out: &mut Listing, groups: &mut BTreeMap<u64, String>) {
    let meta = std::fs::symlink_metadata(path).unwrap();
    let kind = meta.file_type();
    let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().escape_ascii().to_string();
    let content = if kind.is_dir() {
        "dir".to_owned()
    } else if kind.is_symlink() {
        format!("-> {:?}", std::fs::read_link(path).unwrap())
    } else if kind.is_file() {
        let bytes = std::fs::read(path).unwrap();
        let mut hasher = DefaultHasher::new();
        hasher.write(&bytes);
        format!("file {} {:x}", bytes.len(), hasher.finish())
    } else if kind.is_char_device() || kind.is_block_device() {
        format!("device {}", meta.rdev())
    } else {
        format!("fifo {}", kind.is_fifo())
    };
    // Names of one inode are told by the first of them.
    let group = match kind.is_dir() {
        true => name.clone(),
        false => groups.entry(meta.ino()).or_insert_with(|| name.clone()).clone(),
    };
    let (mode, links, uid, gid) = (meta.mode(), meta.nlink(), meta.uid(), meta.gid());
    let time = format!("{}.{:09}", meta.mtime(), meta.mtime_nsec());
    let line =
        format!("{content} mode {mode:o} owner {uid}:{gid} time {time} links {links} of {group}");
    out.insert(name, line);
    if kind.is_dir() {
        let mut children: Vec<_> =
            std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        children.sort();
        for child in children {
            walk(root, &child, out, groups);
        }
    }
}

/// Says each line that differs.
pub fn assert_equal(what: &str, wanted: &Listing, found: &Listing) {
    let mut differences = Vec::new();
    for (name, line) in wanted {
        match found.get(name) {
            Some(other) if other == line => {}
            other => differences.push(format!("{name}\n  wanted {line}\n  found  {other:?}")),
        }
    }
    for name in found.keys().filter(|name| !wanted.contains_key(*name)) {
        differences.push(format!("{name}: only found"));
    }
    differences.truncate(20);
    assert!(differences.is_empty(), "{what}:\n{}", differences.join("\n"));
    assert!(!wanted.is_empty(), "{what}: nothing was compared");
}
