//! Containers in user namespaces own the files of their image: containerd changes owners in a copy, or, if
//! it was told of `remap-ids`, skimmer mounts the layers with the container's ids.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::{self, PATIENCE};
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::{Ctr, MAPPED_ROOT, unique};
use skimmer_integration::image::Image;
use skimmer_integration::layer::noise;
use skimmer_integration::mounts;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{self, MountMode};

use crate::fixtures::{md5sum, mount_point, seed, small};
use crate::indexes;

/// The image's file, and its length.
const FILE: &str = "data/users-mapped";
const LEN: usize = 8 << 20;
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
            check_inside(&node.containerd, &reference)?;
            none_left(&node, &reference)
        });
    }
}

#[test]
fn mapped_layers_survive_a_restart_of_skimmerd() {
    for version in [Version::V1_7, Version::V2] {
        scenario(&format!("user-namespace-restart-{version:?}"), |scenario| {
            survive(scenario, version, None)
        });
    }
}

/// Whoever serves them while their bytes are missing: FUSE, and who does in this run.
#[test]
fn lazily_mounted_layers_are_mapped_and_survive_a_restart_of_skimmerd() {
    for mode in [MountMode::Fuse, MountMode::of_this_run()] {
        scenario(&format!("user-namespace-lazy-{}", mode.name()), |scenario| {
            survive(scenario, Version::V2, Some(mode))
        });
    }
}

/// Nothing is copied; who runs reads on when skimmerd is killed; a restart makes new mounts; removal leaves none.
fn survive(scenario: &Scenario, version: Version, lazily: Option<MountMode>) -> anyhow::Result<()> {
    let mut world = World::new(scenario, version, lazily)?;
    world.check_owners()?;
    if let Some(mode) = lazily {
        world.check_server(mode)?;
    }
    world.prepare("two")?;
    let read = world.read_through_a_death(lazily.is_some())?;
    let expected = md5sum(scenario, "users-mapped", LEN)?;
    anyhow::ensure!(read.trim() == expected.trim(), "the container read something else: {read:?}");

    world.node.containerd.remove_container(&world.container)?;
    world.node.skimmerd.terminate()?;
    world.node.skimmerd.run()?;
    world.node.wait_connected()?;
    world.check_mounts("two", &mount_point(scenario, "two"))?;

    check_inside(&world.node.containerd, &world.reference)?;
    world.node.snapshots("skimmer")?.remove("two")?;
    none_left(&world.node, &world.reference)
}

/// A container in a user namespace.
struct World {
    node: Node,
    // Lazily mounted layers need it.
    _registry: Registry,
    image: Image,
    reference: String,
    container: String,
}

impl World {
    /// Without a mode the layers are pulled through; with one they are mounted lazily, and nothing of [`FILE`] is read.
    fn new(
        scenario: &Scenario,
        version: Version,
        lazily: Option<MountMode>,
    ) -> anyhow::Result<Self> {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "users/mapped")?;
        let reference = registry.add(&image)?;
        let skimmerd =
            skimmerd::Setup { holder: true, mounts: lazily, ..skimmerd::Setup::default() };
        let setup = Setup { remap_ids: true, skimmerd, ..Setup::default() };
        let mut node = Node::start_with(scenario, version, &setup)?;
        if lazily.is_some() {
            indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        }
        node.skimmerd.ask(&["pull", &reference, "--namespace", "default"])?;
        let container = name();
        let mut call = node.containerd.mapped_command(&["--detach", "--null-io"])?;
        call.args([&reference, &container, "sh", "-c", "echo x > /tmp/new; exec sleep 100000"]);
        command::output_of(&mut call, PATIENCE)?;
        Ok(Self { node, _registry: registry, image, reference, container })
    }

    /// The container's files and those of its image are its own: on the host they belong to its ids.
    fn check_owners(&self) -> anyhow::Result<()> {
        let new = command::wait_for("the container writes", Duration::from_secs(30), || {
            written(&self.node.skimmerd.root(), "tmp/new")
        })?;
        let clones = clones(&self.node);
        anyhow::ensure!(clones.len() >= 2, "two layers: {clones:?}");
        let mut files: Vec<PathBuf> = clones.iter().map(|path| path.join(FILE)).collect();
        files.retain(|file| file.exists());
        anyhow::ensure!(!files.is_empty(), "no layer has {FILE}: {clones:?}");
        files.push(new);
        files.iter().try_for_each(|file| check_owner(file))?;
        let look = ["stat", "-c", "%u:%g", &format!("/{FILE}")];
        let inside = self.node.containerd.exec(&self.container, &look)?;
        anyhow::ensure!(inside.trim() == "0:0", "inside, {FILE} belongs to {inside}");
        Ok(())
    }

    /// The data layer's bytes are missing, and who serves it is who is to.
    fn check_server(&self, mode: MountMode) -> anyhow::Result<()> {
        let server = if mode == MountMode::Kernel { "kernel" } else { "fuse" };
        let images = self.node.skimmerd.ask(&["status", &self.reference])?;
        let layer = &images[0]["layers"][1];
        let is_lazy = layer["mode"] == "lazy" && layer["server"] == server;
        anyhow::ensure!(is_lazy, "the layer is not lazily served by {server}: {images}");
        Ok(())
    }

    /// A snapshot on the image, of the same ids, to which no container refers.
    fn prepare(&self, key: &str) -> anyhow::Result<()> {
        let chain = self.image.chain_ids().last().cloned().context("no layers")?;
        let range = format!("0:{MAPPED_ROOT}:65536");
        let labels = [
            ("containerd.io/snapshot/uidmapping", range.as_str()),
            ("containerd.io/snapshot/gidmapping", range.as_str()),
            ("containerd.io/gc.root", "kept"),
        ];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned()));
        self.node.snapshots("skimmer")?.prepare(key, &chain, HashMap::from(labels))?;
        Ok(())
    }

    /// What `md5sum` says that was begun while skimmerd was dead: it waits for the next one for what is `missing`.
    fn read_through_a_death(&mut self, missing: bool) -> anyhow::Result<String> {
        self.node.skimmerd.kill()?;
        let sum = ["md5sum", &format!("/{FILE}")];
        let mut call = self.node.containerd.exec_command(&self.container, &sum)?;
        let reader = thread::spawn(move || command::output_of(&mut call, PATIENCE));
        if missing {
            // There is nothing to see of somebody who waits.
            thread::sleep(Duration::from_secs(1));
            anyhow::ensure!(!reader.is_finished(), "nobody could have answered it");
        }
        self.node.skimmerd.run()?;
        self.node.wait_connected()?;
        reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?
    }

    /// The snapshot's mounts, made at `target`, show the image's file with the right owner and bytes.
    fn check_mounts(&self, key: &str, target: &Path) -> anyhow::Result<()> {
        let made = self.node.snapshots("skimmer")?.mounts(key)?;
        let [mount] = made.as_slice() else { anyhow::bail!("mounts: {made:?}") };
        let mounted = mounts::mount(&mount.r#type, &mount.source, &mount.options, target)?;
        let file = mounted.path().join(FILE);
        check_owner(&file)?;
        let bytes = std::fs::read(&file)?;
        anyhow::ensure!(bytes == noise(seed("users-mapped"), LEN), "other bytes");
        Ok(())
    }
}

/// On the host, `file` belongs to the container's root.
fn check_owner(file: &Path) -> anyhow::Result<()> {
    let owner = std::fs::metadata(file).map(|file| (file.uid(), file.gid()))?;
    let expected = (MAPPED_ROOT, MAPPED_ROOT);
    anyhow::ensure!(owner == expected, "on the host, {file:?} belongs to {owner:?}");
    Ok(())
}

/// A container's name that no other run of the tests uses: runc and cgroups may keep the state of all in one place.
fn name() -> String {
    format!("mapped-{}-{}", std::process::id(), unique())
}

/// What [`LOOK`] has to say in a container of its own.
fn check_inside(containerd: &Ctr, reference: &str) -> anyhow::Result<()> {
    let said = containerd.run_mapped(reference, &name(), &["sh", "-c", LOOK])?;
    let lines: Vec<&str> = said.lines().map(str::trim).collect();
    anyhow::ensure!(lines[..2] == ["0:0", "0"], "inside, files belong to {lines:?}");
    let map = lines.get(2).context("no map")?.split_whitespace();
    anyhow::ensure!(map.eq(["0", &MAPPED_ROOT.to_string(), "65536"]), "not mapped: {lines:?}");
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
