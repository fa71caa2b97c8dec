//! Containers in user namespaces own the files of their image: containerd changes owners in a copy, or, if
//! it was told of `remap-ids`, skimmer mounts the layers with the container's ids.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::{self, PATIENCE};
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::unique;
use skimmer_integration::mounts;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;
use skimmer_integration::skimmerd;

use crate::fixtures::{mount_point, small};

const FIRST: u32 = 200_000;
/// A file of the image, its owner, and that of a new one; then the namespace's ids.
const LOOK: &str = "stat -c %u:%g /data/users-mapped; echo x > /tmp/new; stat -c %u /tmp/new; \
                    echo y >> /etc/changed; cat /proc/self/uid_map";

#[test]
fn a_container_in_a_user_namespace_owns_its_files() {
    for (version, remap_ids) in
        [(Version::V1_7, false), (Version::V2, false), (Version::V1_7, true), (Version::V2, true)]
    {
        scenario(&format!("user-namespace-{version:?}-{remap_ids}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "users/mapped")?;
            let reference = registry.add(&image)?;
            let setup = Setup { remap_ids, ..Setup::default() };
            let node = Node::start_with(scenario, version, &setup)?;
            node.skimmerd.ask(&["pull", &reference, "--namespace", "default"])?;
            let mut call = mapped(&node, &["--rm"])?;
            call.args([&reference, &name(), "sh", "-c", LOOK]);
            check_inside(&command::output_of(&mut call, PATIENCE)?)?;
            none_left(&node, &reference)
        });
    }
}

/// The kernel maps; nothing is copied; who runs reads on when skimmerd is killed; a restart makes new mounts; removal
/// leaves none.
#[test]
fn mapped_layers_survive_a_restart_of_skimmerd() {
    for version in [Version::V1_7, Version::V2] {
        scenario(&format!("user-namespace-restart-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "users/mapped")?;
            let reference = registry.add(&image)?;
            let skimmerd = skimmerd::Setup { holder: true, ..skimmerd::Setup::default() };
            let setup = Setup { remap_ids: true, skimmerd, ..Setup::default() };
            let mut node = Node::start_with(scenario, version, &setup)?;
            node.skimmerd.ask(&["pull", &reference, "--namespace", "default"])?;

            let one = name();
            let mut call = mapped(&node, &["--detach", "--null-io"])?;
            call.args([&reference, &one, "sh", "-c", "echo x > /tmp/new; exec sleep 100000"]);
            command::output_of(&mut call, PATIENCE)?;
            let file = command::wait_for("the container writes", Duration::from_secs(30), || {
                written(&node.skimmerd.root(), "tmp/new")
            })?;
            let owner = std::fs::metadata(&file).map(|file| (file.uid(), file.gid()))?;
            anyhow::ensure!(owner == (FIRST, FIRST), "on the host, {file:?} belongs to {owner:?}");
            anyhow::ensure!(clones(&node).len() >= 2, "two layers: {:?}", clones(&node));

            let chain = image.chain_ids().last().cloned().context("no layers")?;
            let range = format!("0:{FIRST}:65536");
            let label =
                |name: &str, value: &str| (format!("containerd.io/{name}"), value.to_owned());
            let labels = [
                label("snapshot/uidmapping", &range),
                label("snapshot/gidmapping", &range),
                // No container refers to it.
                label("gc.root", "kept"),
            ];
            node.snapshots("skimmer")?.prepare("two", &chain, HashMap::from(labels))?;

            node.skimmerd.kill()?;
            let mut call = node.containerd.exec_command(&one, &["md5sum", "/data/users-mapped"])?;
            let reader = thread::spawn(move || command::output_of(&mut call, PATIENCE));
            node.skimmerd.run()?;
            node.wait_connected()?;
            let read = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;

            node.containerd.remove_container(&one)?;
            node.skimmerd.terminate()?;
            node.skimmerd.run()?;
            node.wait_connected()?;
            let target = mount_point(scenario, "two");
            let made = node.snapshots("skimmer")?.mounts("two")?;
            let [mount] = made.as_slice() else { anyhow::bail!("mounts: {made:?}") };
            let mounted = mounts::mount(&mount.r#type, &mount.source, &mount.options, &target)?;
            let path = mounted.path().join("data/users-mapped");
            let owner = std::fs::metadata(&path).map(|file| (file.uid(), file.gid()))?;
            anyhow::ensure!(owner == (FIRST, FIRST), "after the restart: {owner:?}");
            let bytes = std::fs::read(&path)?.len();
            anyhow::ensure!(bytes == 8 << 20, "{bytes} bytes");
            let same = command::run("md5sum", [&path])?.split(' ').next() == read.split(' ').next();
            anyhow::ensure!(same, "the container read something else: {read:?}");
            drop(mounted);

            let mut call = mapped(&node, &["--rm"])?;
            call.args([&reference, &name(), "sh", "-c", LOOK]);
            check_inside(&command::output_of(&mut call, PATIENCE)?)?;
            node.snapshots("skimmer")?.remove("two")?;
            none_left(&node, &reference)
        });
    }
}

/// A container's name that no other run of the tests uses: runc and cgroups may keep the state of all in one place.
fn name() -> String {
    format!("mapped-{}-{}", std::process::id(), unique())
}

/// `ctr run` in a user namespace.
fn mapped(node: &Node, options: &[&str]) -> anyhow::Result<Command> {
    let mut call = node.containerd.ctr()?;
    call.arg("run").args(options).args(["--snapshotter", "skimmer", "--runc-root"]);
    call.arg(node.containerd.runc_root());
    let range = format!("0:{FIRST}:65536");
    call.args(["--uidmap", &range, "--gidmap", &range, "--remap-labels"]);
    Ok(call)
}

/// What [`LOOK`] has to say.
fn check_inside(said: &str) -> anyhow::Result<()> {
    let lines: Vec<&str> = said.lines().map(str::trim).collect();
    anyhow::ensure!(lines[..2] == ["0:0", "0"], "inside, files belong to {lines:?}");
    let map = lines.get(2).context("no map")?.split_whitespace();
    anyhow::ensure!(map.eq(["0", &FIRST.to_string(), "65536"]), "not mapped: {lines:?}");
    Ok(())
}

/// The mapped mounts of layers.
fn clones(node: &Node) -> Vec<PathBuf> {
    let mut found = mounts::below(&node.skimmerd.root().join("snapshots"));
    found.retain(|path| path.parent().is_some_and(|folder| folder.ends_with("lower")));
    found
}

/// containerd removes snapshots when it collects garbage.
fn none_left(node: &Node, image: &str) -> anyhow::Result<()> {
    node.containerd.collect_garbage(image)?;
    command::wait_for("mapped mounts go with their snapshots", PATIENCE, || {
        clones(node).is_empty().then_some(())
    })
}

/// The file `name` in a snapshot's own content.
fn written(root: &Path, name: &str) -> Option<PathBuf> {
    let snapshots = std::fs::read_dir(root.join("snapshots")).ok()?;
    snapshots.flatten().map(|entry| entry.path().join("fs").join(name)).find(|file| file.exists())
}
