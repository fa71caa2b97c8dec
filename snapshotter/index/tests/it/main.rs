//! Images against the tools that must understand them: `fsck.erofs` accepts them, and the kernel
//! mounts them over the data file with the tree that GNU tar extracts.
//!
//! Needs root, GNU tar, getfattr, and the programs of `integration/tools/erofs-utils`, in PATH or in
//! `SKIMMER_EROFS_UTILS`. What is missing is said and skipped, unless `SKIMMER_REQUIRE_TOOLS=1`.

#![expect(clippy::unwrap_used, reason = "a test that can't go on ends")]

mod archive;
mod bounds;
mod listing;
mod mounts;

use std::path::{Path, PathBuf};
use std::process::Command;

use skimmer_index::erofs::{Image, Inodes, write};
use skimmer_index::tar::{Limits, TarWalk};
use skimmer_index::tree::TreeBuilder;

/// An image and its data file, on disk.
struct Layer {
    image: PathBuf,
    data: PathBuf,
}

/// Makes a layer of a tar, as the node would: the data file is the tar, and the copies behind it.
fn layer(dir: &Path, tar: &[u8]) -> Layer {
    let image = image(tar);
    Inodes::open(&image.bytes, image.data_len).expect("our own reader accepts the image");
    let mut data = tar.to_vec();
    data.resize(usize::try_from(image.data_len).unwrap(), 0);
    for copy in &image.copies {
        let [from, to, len] = [copy.from, copy.to, copy.len].map(|n| usize::try_from(n).unwrap());
        data.copy_within(from..from + len, to);
    }
    let layer = Layer { image: dir.join("image"), data: dir.join("data") };
    std::fs::write(&layer.image, image.bytes).unwrap();
    std::fs::write(&layer.data, data).unwrap();
    layer
}

fn image(tar: &[u8]) -> Image {
    let mut tree = TreeBuilder::new(Limits::default());
    let mut walk = TarWalk::new(Limits::default());
    walk.push(tar, &mut |entry| tree.insert(entry).map_err(Into::into)).unwrap();
    let tar_len = walk.finish().unwrap();
    write(&tree.finish().unwrap(), tar_len).unwrap()
}

/// Runs a command; its output if it succeeded.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{command:?}: {text}");
    text
}

/// Whether everything that a test needs is there; says what isn't.
fn have(needs: &[&str]) -> bool {
    let lacks = |need: &&&str| match **need {
        "root" => !nix::unistd::geteuid().is_root(),
        "erofs" => !std::fs::read_to_string("/proc/filesystems").unwrap().contains("erofs"),
        program => Command::new(program).arg("--version").output().is_err(),
    };
    let Some(missing) = needs.iter().find(lacks) else { return true };
    let must = std::env::var("SKIMMER_REQUIRE_TOOLS").is_ok_and(|value| value == "1");
    assert!(!must, "{missing} is missing, and SKIMMER_REQUIRE_TOOLS=1");
    eprintln!("skipped: {missing} is missing");
    false
}

/// The folder of erofs-utils' programs, or nothing for PATH.
fn erofs_tool(name: &str) -> String {
    match std::env::var("SKIMMER_EROFS_UTILS") {
        Ok(dir) => format!("{dir}/{name}"),
        Err(_) => name.to_owned(),
    }
}

#[test]
fn fsck_accepts_the_image() {
    let fsck = erofs_tool("fsck.erofs");
    if !have(&[&fsck]) {
        return;
    }
    for (name, tar) in archive::all() {
        let dir = tempfile::tempdir().unwrap();
        let layer = layer(dir.path(), &tar);
        let device = format!("--device={}", layer.data.display());
        let output = run(Command::new(&fsck).arg(device).arg("--extract").arg(&layer.image));
        assert!(!output.contains("<W>") && !output.contains("<E>"), "{name}: {output}");
    }
}

#[test]
fn the_kernel_mounts_what_tar_extracts() {
    if !have(&["root", "erofs", "tar", "getfattr", "losetup"]) {
        return;
    }
    for (name, tar) in archive::all() {
        let dir = tempfile::tempdir().unwrap();
        let layer = layer(dir.path(), &tar);
        let extracted = archive::extract(dir.path(), &tar);
        if name == "pax" {
            archive::restore_acl(&extracted);
        }
        let wanted = listing::of(&extracted);
        let target = dir.path().join("mounted");
        std::fs::create_dir(&target).unwrap();
        for how in [mounts::How::Files, mounts::How::Loop] {
            let mount = mounts::erofs(how, &layer.image, &layer.data, &target);
            let Some(mount) = mount else {
                assert!(!have(&["file-backed mounts"]), "unreachable");
                continue;
            };
            listing::assert_equal(&format!("{name}, {how:?}"), &wanted, &listing::of(&target));
            drop(mount);
        }
    }
}
