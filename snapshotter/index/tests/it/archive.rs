//! The archives that the tools get to see, made by GNU tar in its several formats.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::run;

/// Archives by name.
pub fn all() -> Vec<(&'static str, Vec<u8>)> {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::create_dir(&source).unwrap();
    populate(&source);
    let tar = |options: &[&str]| {
        let mut tar = Command::new("tar");
        tar.args(["--create", "--file", "-", "--numeric-owner", "--sort=name"]).args(options);
        let output = tar.arg("-C").arg(&source).arg(".").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    vec![
        ("pax", tar(&["--format=pax", "--xattrs", "--xattrs-include=*"])),
        ("pax, sparse 1.0", tar(&["--format=pax", "--sparse", "--sparse-version=1.0"])),
        ("pax, sparse 0.1", tar(&["--format=pax", "--sparse", "--sparse-version=0.1"])),
        ("pax, sparse 0.0", tar(&["--format=pax", "--sparse", "--sparse-version=0.0"])),
        ("gnu, sparse", tar(&["--format=gnu", "--sparse"])),
        ("only a root", {
            let mut tar = Command::new("tar");
            tar.args(["--create", "--file", "-", "--no-recursion", "-C"]).arg(&source).arg(".");
            tar.output().unwrap().stdout
        }),
    ]
}

/// Extracts with GNU tar; the folder.
pub fn extract(dir: &Path, tar: &[u8]) -> PathBuf {
    let (file, target) = (dir.join("layer.tar"), dir.join("extracted"));
    std::fs::write(&file, tar).unwrap();
    std::fs::create_dir(&target).unwrap();
    let mut command = Command::new("tar");
    command.args(["--extract", "--same-permissions", "--same-owner", "--numeric-owner"]);
    command.args(["--xattrs", "--xattrs-include=*", "--acls", "--file"]).arg(&file);
    run(command.arg("-C").arg(&target));
    target
}

/// Every kind of file that a layer may have, as far as GNU tar archives it.
fn populate(root: &Path) {
    let bytes = |len: usize| (0..=250_u8).cycle().step_by(7).take(len).collect::<Vec<_>>();
    for len in [0, 1, 511, 512, 513, 4095, 4096, 5000, 3 << 20] {
        std::fs::write(root.join(format!("file-{len}")), bytes(len)).unwrap();
    }
    let many = root.join("many");
    std::fs::create_dir(&many).unwrap();
    for i in 0..2000 {
        std::fs::write(many.join(format!("{i:0width$}", width = 4 + i % 90)), bytes(i)).unwrap();
    }
    // Directories whose last block has every length around those that fit behind an inode.
    for len in 380..=500 {
        let dir = root.join(format!("dirs/{len}"));
        std::fs::create_dir_all(&dir).unwrap();
        for name in ["a".repeat(200), "b".repeat(len - 200 - 63)] {
            std::fs::write(dir.join(name), "x").unwrap();
        }
    }
    let mut deep = root.join("deep");
    for i in 0..100 {
        deep = deep.join(format!("{i:030}"));
    }
    std::fs::create_dir_all(&deep).unwrap();
    std::fs::write(deep.join("file"), "deep").unwrap();
    let odd = root.join("odd");
    std::fs::create_dir(&odd).unwrap();
    for name in [&b"\xff\xfe"[..], b"!before dots", b"-", b" ", b"line\nfeed", &[b'n'; 255]] {
        std::fs::write(odd.join(OsStr::from_bytes(name)), name).unwrap();
    }
    for len in [1, 100, 440, 447, 448, 449, 500, 511, 512, 513, 1024, 4000] {
        symlink("t".repeat(len), root.join(format!("link-{len}"))).unwrap();
    }
    std::fs::hard_link(root.join("file-5000"), root.join("hard")).unwrap();
    std::fs::hard_link(root.join("file-5000"), odd.join("hard")).unwrap();
    std::fs::hard_link(root.join("link-100"), root.join("hard-symlink")).unwrap();
    let device = |name, kind, number| {
        mknod(&root.join(name), kind, Mode::from_bits_truncate(0o640), number).unwrap();
    };
    device("char", SFlag::S_IFCHR, makedev(1, 3));
    device("block", SFlag::S_IFBLK, makedev(259, 70000));
    device("whiteout", SFlag::S_IFCHR, makedev(0, 0));
    device("fifo", SFlag::S_IFIFO, 0);
    sparse(&root.join("sparse"), 40 << 20, &[(0, 4096), (1 << 20, 300_000), (39 << 20, 8192)]);
    sparse(&root.join("sparse-hole"), 10 << 20, &[]);
    sparse(&root.join("sparse-tail"), (5 << 20) + 77, &[(5 << 20, 77)]);
    let many: Vec<_> = (0..200).map(|i| (i * 65_536, 4096)).collect();
    sparse(&root.join("sparse-many"), 200 << 16, &many);
    xattrs(root);
    let file = std::fs::File::open(root.join("file-1")).unwrap();
    file.set_modified(UNIX_EPOCH + Duration::new(1_600_000_000, 123_456_789)).unwrap();
    let file = std::fs::File::open(root.join("file-511")).unwrap();
    file.set_modified(UNIX_EPOCH - Duration::new(86_400, 250_000_000)).unwrap();
    nix::unistd::chown(&root.join("file-512"), Some(1000.into()), Some(4_000_000_000.into()))
        .unwrap();
    let mode = |name, mode| {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(root.join(name), permissions).unwrap();
    };
    mode("file-513", 0o6755);
    mode("odd", 0o1777);
    mode("dirs", 0o2700);
}

fn sparse(path: &Path, len: u64, runs: &[(u64, usize)]) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(len).unwrap();
    for (at, len) in runs {
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![7; *len], *at).unwrap();
    }
}

/// user::rw-, user:1000:rwx, group::r--, mask::rwx, other::r--
const ACL: &str =
    "0x0200000001000600ffffffff02000700e803000004000400ffffffff10000700ffffffff20000400ffffffff";

fn set(file: &Path, name: &str, value: &str) {
    run(Command::new("setfattr").args(["-h", "-n", name, "-v", value]).arg(file));
}

/// GNU tar archives an access list among the attributes, as container engines do, but extracts it
/// from a record of its own only.
pub fn restore_acl(root: &Path) {
    set(&root.join("file-5000"), "system.posix_acl_access", ACL);
}

fn xattrs(root: &Path) {
    for (file, name, value) in [
        ("file-4095", "user.comment", "some text"),
        ("file-4095", "user.empty", ""),
        ("file-4095", "trusted.secret", "0x0001ff"),
        ("file-4096", "security.capability", "0x0100000200200000000000000000000000000000"),
        ("file-4096", "user.long", &"v".repeat(2000)),
        ("odd", "user.dir", "d"),
        ("link-440", "trusted.link", "l"),
        ("fifo", "trusted.fifo", "f"),
        ("file-5000", "system.posix_acl_access", ACL),
    ] {
        set(&root.join(file), name, value);
    }
}
