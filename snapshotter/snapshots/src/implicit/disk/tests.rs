//! Covers on a real disk, and below a real overlayfs. As root only.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::XattrFlags;

use super::{Error, OPAQUE, look, make};
use crate::implicit::{Attributes, Look, plan};

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn make_dir(path: &Path, mode: u32) {
    fs::create_dir_all(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn attributes(folder: &Path, path: &str) -> Attributes {
    match look(folder, path.as_ref()).unwrap() {
        Look::Dir { attributes, .. } => attributes,
        other => panic!("{path}: {other:?}"),
    }
}

/// A mount that ends with the test.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn looks_at_what_is_there() {
    if !is_root() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let at = |path: &str| root.path().join(path);
    make_dir(&at("tmp"), 0o1777);
    std::os::unix::fs::lchown(at("tmp"), Some(7), Some(8)).unwrap();
    set_xattr(&at("tmp"), "user.colour", b"blue");
    set_xattr(&at("tmp"), "trusted.secret", b"1");
    make_dir(&at("hides"), 0o755);
    set_xattr(&at("hides"), OPAQUE, b"y");
    make_dir(&at("marked"), 0o755);
    set_xattr(&at("marked"), OPAQUE, b"x");
    fs::write(at("file"), "").unwrap();
    symlink("tmp", at("link")).unwrap();
    let found = attributes(root.path(), "tmp");
    assert_eq!((found.mode, found.uid, found.gid), (0o1777, 7, 8));
    assert_eq!(found.xattrs, [("user.colour".into(), b"blue".to_vec())].into());
    let opaque = |path: &str| match look(root.path(), path.as_ref()).unwrap() {
        Look::Dir { attributes, opaque } => {
            assert!(attributes.xattrs.is_empty());
            opaque
        }
        other => panic!("{path}: {other:?}"),
    };
    assert!(opaque("hides") && !opaque("marked"));
    for (path, expected) in [("none", Look::Absent), ("file", Look::Other), ("link", Look::Other)] {
        assert_eq!(look(root.path(), path.as_ref()).unwrap(), expected, "{path}");
    }
    let refused = look(root.path(), Path::new("file/below"));
    assert!(matches!(refused, Err(Error::Look { .. })));
}

#[test]
fn makes_exactly_what_is_wanted() {
    if !is_root() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let wanted = |mode, id| Attributes {
        mode,
        uid: id,
        gid: id + 1,
        mtime: (1_000_000_000 + i64::from(id), 5),
        xattrs: [("user.colour".into(), vec![0, 255])].into(),
    };
    let cover = vec![
        (PathBuf::new(), wanted(0o750, 1)),
        (PathBuf::from("a"), wanted(0o2000, 2)),
        (PathBuf::from("a/b"), wanted(0o1777, 3)),
    ];
    make(&cover, root.path()).unwrap();
    for (path, wanted) in &cover {
        assert_eq!(attributes(root.path(), path.to_str().unwrap()), *wanted);
    }
    let again = make(&cover, root.path());
    assert!(matches!(again, Err(Error::Make { .. })), "not an empty folder");
}

#[test]
fn overlayfs_shows_the_metadata_from_below() {
    if !is_root() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let at = |path: &str| root.path().join(path);
    for folder in ["cover", "own", "low", "seen"] {
        make_dir(&at(folder), 0o755);
    }
    make_dir(&at("low/tmp"), 0o1777);
    make_dir(&at("low/etc/ssl"), 0o700);
    make_dir(&at("low/etc"), 0o711);
    fs::write(at("low/tmp/low"), "").unwrap();
    set_xattr(&at("low/tmp"), OPAQUE, b"y");
    make_dir(&at("own/tmp"), 0o755);
    make_dir(&at("own/etc/ssl"), 0o755);
    make_dir(&at("own/new"), 0o755);
    fs::write(at("own/tmp/own"), "").unwrap();
    let folders = [at("own"), at("low")];
    let implicit = ["etc/ssl", "new", "tmp"].map(PathBuf::from);
    let cover = plan(&implicit, folders.len(), &mut |n, path| look(&folders[n], path)).unwrap();
    make(&cover, &at("cover")).unwrap();

    let lower = ["cover", "own", "low"].map(|folder| at(folder).display().to_string()).join(":");
    let options = format!("lowerdir={lower},index=off");
    let seen = at("seen");
    mount(Some("overlay"), &seen, Some("overlay"), MsFlags::MS_RDONLY, Some(options.as_str()))
        .unwrap();
    let _mounted = Mounted(seen.clone());
    assert_eq!(attributes(&seen, "tmp"), attributes(&at("low"), "tmp"));
    assert_eq!(attributes(&seen, "tmp").mode, 0o1777);
    assert_eq!(attributes(&seen, "etc").mode, 0o755, "the layer has an entry for it");
    assert_eq!(attributes(&seen, "etc/ssl").mode, 0o700);
    assert_eq!(attributes(&seen, "new"), attributes(&at("own"), "new"));
    // Neither is hidden.
    assert!(seen.join("tmp/own").exists() && seen.join("tmp/low").exists());
}
