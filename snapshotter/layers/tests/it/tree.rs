//! The tree under a mount is the tree that GNU tar unpacks.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use skimmer_layers::State;

use crate::folders::Folder;
use crate::node::{Node, noise};

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    mode: u32,
    owner: (u32, u32),
    time: (i64, i64),
    size: u64,
    links: u64,
    device: u64,
    target: Option<PathBuf>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    content: Option<Vec<u8>>,
}

/// Everything below `root`, by path.
fn walk(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let entry = Entry {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            time: (meta.mtime(), meta.mtime_nsec()),
            // What a directory's size is differs between file systems, its link count too.
            size: if meta.is_dir() { 0 } else { meta.size() },
            links: if meta.is_dir() { 0 } else { meta.nlink() },
            device: meta.rdev(),
            target: meta.is_symlink().then(|| fs::read_link(&path).unwrap()),
            xattrs: xattrs(&path),
            content: meta.is_file().then(|| fs::read(&path).unwrap()),
        };
        let name = path.strip_prefix(root).unwrap().to_owned();
        if name != Path::new("") {
            found.insert(name, entry);
        }
    }
    found
}

#[expect(unsafe_code, reason = "neither std nor nix reads extended attributes")]
fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut names = vec![0u8; 4096];
    // SAFETY: the path ends in a NUL, the buffer is as long as it is said to be.
    let len = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let Ok(len) = usize::try_from(len) else { return BTreeMap::new() };
    let names = names[..len].split_inclusive(|b| *b == 0);
    let value = |name: &[u8]| {
        let name = CStr::from_bytes_with_nul(name).unwrap();
        let mut value = vec![0u8; 4096];
        // SAFETY: as above, for the name too.
        let len = unsafe {
            libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        value.truncate(usize::try_from(len).unwrap());
        (name.to_bytes().to_vec(), value)
    };
    names.map(value).collect()
}

#[expect(unsafe_code, reason = "neither std nor nix sets extended attributes")]
fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let name = CString::new(name).unwrap();
    // SAFETY: both strings end in a NUL, the value is as long as it is said to be.
    let done = unsafe {
        libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

fn run(program: &str, arguments: &[&str]) {
    let done = Command::new(program).args(arguments).status().unwrap();
    assert!(done.success(), "{program} {arguments:?}");
}

/// One of each kind of file.
fn populate(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::create_dir_all(at("etc/deep/er")).unwrap();
    fs::create_dir(at("empty")).unwrap();
    fs::create_dir(at("many")).unwrap();
    for n in 0..1500 {
        fs::write(at(&format!("many/file-with-a-longish-name-{n}")), format!("{n}\n")).unwrap();
    }
    fs::write(at("etc/nothing"), b"").unwrap();
    fs::write(at("etc/short"), b"short\n").unwrap();
    fs::write(at("etc/large"), noise(5_000_001, 1)).unwrap();
    fs::write(at("etc/zeros"), vec![0; 3_000_000]).unwrap();
    fs::hard_link(at("etc/short"), at("etc/deep/link")).unwrap();
    symlink("../short", at("etc/deep/er/symlink")).unwrap();
    symlink("x".repeat(200), at("etc/dangling")).unwrap();
    let text = "\u{e9}\u{2603} with spaces";
    fs::write(at(text), text).unwrap();
    let name = std::ffi::OsStr::from_bytes(b"not-utf8-\xff");
    fs::write(root.join(name), b"x").unwrap();
    for (name, mode) in [("suid", 0o4755), ("secret", 0o600), ("sticky", 0o1666)] {
        fs::write(at(name), name).unwrap();
        fs::set_permissions(at(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    std::os::unix::fs::lchown(at("secret"), Some(1234), Some(70_000)).unwrap();
    let all = Mode::from_bits_truncate(0o640);
    mknod(&at("fifo"), SFlag::S_IFIFO, all, 0).unwrap();
    mknod(&at("null"), SFlag::S_IFCHR, all, makedev(1, 3)).unwrap();
    mknod(&at("block"), SFlag::S_IFBLK, all, makedev(259, 300)).unwrap();
    set_xattr(&at("etc/short"), "user.colour", b"blue");
    set_xattr(&at("empty"), "trusted.secret", b"\0\xff");
    // cap_net_raw+ep, version 2.
    set_xattr(
        &at("suid"),
        "security.capability",
        &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    run("touch", &["-h", "-d", "1969-12-31T23:59:58.25Z", at("etc/nothing").to_str().unwrap()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mounted_layer_is_what_tar_unpacks() {
    let node = Node::new();
    let work = Folder::new();
    let [from, to, file] = ["from", "to", "layer.tar"].map(|name| work.path().join(name));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&to).unwrap();
    populate(&from);
    let [from, to, file] = [&from, &to, &file].map(|path| path.to_str().unwrap());
    let xattrs = ["--xattrs", "--xattrs-include=*"];
    run("tar", &[&["--format=pax", "-C", from, "-cf", file][..], &xattrs, &["."]].concat());
    run("tar", &[&["-C", to, "-xpf", file][..], &xattrs].concat());
    let spec = node.layer(&fs::read(file).unwrap());
    let layer = node.layers.begin(spec);
    layer.ready().await.unwrap();
    assert!(matches!(layer.state(), State::Local));
    let mounted = layer.mount().await.unwrap();
    assert_eq!(mounted.path, node.mounts().canonicalize().unwrap().join(mounted.id.to_string()));
    let expected = walk(Path::new(to));
    let compare = move || {
        let found = walk(&mounted.path);
        let names = |tree: &BTreeMap<PathBuf, Entry>| tree.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&found), names(&expected));
        for (path, entry) in &expected {
            assert_eq!(&found[path], entry, "{}", path.display());
        }
        assert!(fs::symlink_metadata(mounted.path.join("absent")).is_err());
        assert!(fs::write(mounted.path.join("new"), b"").is_err());
        run("cmp", &[mounted.path.join("null").to_str().unwrap(), "/dev/null"]);
        let statfs = nix::sys::statvfs::statvfs(&mounted.path).unwrap();
        assert_eq!(statfs.blocks_free(), 0);
        assert!(statfs.files() > 1500 && statfs.blocks() * 4096 > 8_000_000);
    };
    tokio::task::spawn_blocking(compare).await.unwrap();
}
