//! Mapped clones on this machine's kernel, as root.

use std::os::unix::fs::MetadataExt;

use super::*;
use crate::idmap::Range;

fn mapping(host: u32) -> Mapping {
    let ranges = vec![Range { container: 0, host, count: 1000 }];
    Mapping { uids: ranges.clone(), gids: ranges }
}

#[test]
fn tells_kernels_apart() {
    for (release, expected) in [("6.12.1", true), ("6.11-arch", false), ("7.0", true), ("", false)]
    {
        assert_eq!(version(release) >= SINCE, expected, "{release}");
    }
}

#[test]
fn knows_its_own_mounts() {
    for (path, expected) in [
        ("/s/7/lower/m-1", true),
        ("/s/removed/7/lower/3-fs", true),
        ("/s/m/7", false),
        ("/s/m/lower/7", false),
        ("/s/7/fs/lower/mine", false),
        ("/s/7/lower", false),
        ("/other/7/lower/x", false),
    ] {
        assert_eq!(is_clone(Path::new("/s"), Path::new(path)), expected, "{path}");
    }
}

#[test]
fn files_belong_to_the_container_until_the_snapshot_goes() {
    if !nix::unistd::geteuid().is_root() || !supported() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let (lower, other) = (root.path().join("3/fs"), root.path().join("4/fs"));
    for folder in [&lower, &other] {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("file"), "bytes").unwrap();
        std::os::unix::fs::chown(folder.join("file"), Some(5), Some(0)).unwrap();
    }
    let remaps = Remaps::open(root.path()).unwrap();
    let file = remaps.place(9, &lower).join("file");
    let owner = || fs::metadata(&file).map(|found| (found.uid(), found.gid())).ok();

    remaps.make(9, &mapping(70_000), std::slice::from_ref(&lower)).unwrap();
    assert_eq!(owner(), Some((70_005, 70_000)));
    assert!(fs::write(&file, "others'").is_err());
    // More of them, and the same once more.
    remaps.make(9, &mapping(70_000), &[lower.clone(), other.clone()]).unwrap();
    assert!(remaps.place(9, &other).join("file").exists());
    // Another mapping replaces the first.
    remaps.make(9, &mapping(80_000), std::slice::from_ref(&lower)).unwrap();
    assert_eq!(owner(), Some((80_005, 80_000)));

    // A successor finds them, and none of its own.
    let next = Remaps::open(root.path()).unwrap();
    assert_eq!(owner(), None);
    assert!(!next.place(9, &lower).exists(), "nobody mounts an empty folder in its place");
    next.make(9, &mapping(80_000), std::slice::from_ref(&lower)).unwrap();
    assert_eq!(owner(), Some((80_005, 80_000)));
    next.clear(9).unwrap();
    assert_eq!(owner(), None);
    next.clear(9).unwrap();
    fs::remove_dir_all(root.path().join("9")).unwrap();
    assert_eq!(fs::read(lower.join("file")).unwrap(), b"bytes");
}
