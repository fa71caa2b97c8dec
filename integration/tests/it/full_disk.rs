//! A disk that is full in the middle of a pull: an error that says so, and nothing else is lost.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::{self, PATIENCE, failure_of};
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, noise};
use skimmer_integration::mounts;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{self, MountMode};

use crate::fixtures::{blobs, busybox, data, mount_point, seed};
use crate::indexes;

const MIB: usize = 1 << 20;

fn image(scenario: &Scenario, name: &str, length: usize) -> anyhow::Result<Image> {
    let layers =
        vec![busybox(scenario, Format::Gzip)?, data(scenario, name, length, Format::Gzip)?];
    Plan::new(&format!("disk/{name}"), layers).build(&blobs(scenario))
}

/// tmpfs doesn't tell of reads before they happen: FUSE serves incomplete layers, whatever the run is about.
fn on_tmpfs() -> skimmerd::Setup {
    skimmerd::Setup { mounts: Some(MountMode::Auto), ..skimmerd::Setup::default() }
}

/// The image's file has its bytes.
fn check(
    scenario: &Scenario,
    node: &Node,
    image: &Image,
    name: &str,
    length: usize,
) -> anyhow::Result<()> {
    let view = node.view(image, &mount_point(scenario, name))?;
    let bytes = std::fs::read(view.path().join("data").join(name))?;
    anyhow::ensure!(bytes == noise(seed(name), length), "other bytes in {name}");
    Ok(())
}

#[test]
fn a_full_disk_fails_the_pull_that_fills_it_and_nothing_else() {
    scenario("full-disk", |scenario| {
        let registry = Registry::start(scenario)?;
        let (before, large, after) = (
            image(scenario, "before", 6 * MIB)?,
            image(scenario, "large", 80 * MIB)?,
            image(scenario, "after", 8 * MIB)?,
        );
        for image in [&before, &large, &after] {
            registry.add(image)?;
        }
        let root = scenario.path("skimmerd/root");
        let _disk = mounts::mount("tmpfs", "tmpfs", &["size=64m".to_owned()], &root)?;
        let setup = Setup { skimmerd: on_tmpfs(), ..Setup::default() };
        let mut node = Node::start_with(scenario, Version::V2, &setup)?;
        let digest = large.layers[1].blob.digest;
        // Whatever is said of it is part of what is tested, and that there is no room.
        node.skimmerd.expect_log(&digest.to_string());
        node.skimmerd.expect_log("over its quota");
        node.containerd.pull(&Pull::new(&registry.reference(&before), "skimmer"))?;

        let mut pull = node.skimmerd.skimmer(&["pull", &registry.reference(&large)])?;
        let said = failure_of(&mut pull, PATIENCE)?;
        for part in [&large.name, &digest.to_string(), "No space left on device"] {
            anyhow::ensure!(said.contains(part), "{part} is not in {said}");
        }
        // What is there is read.
        check(scenario, &node, &before, "before", 6 * MIB)?;

        // Left to itself, containerd fills the same disk, and takes away what it unpacked.
        node.skimmerd.expect_log("No space left on device");
        let said =
            node.containerd.pull_fails(&Pull::new(&registry.reference(&large), "skimmer"))?;
        anyhow::ensure!(said.to_lowercase().contains("no space left on device"), "{said}");

        command::wait_for("there is room again", Duration::from_secs(60), || {
            check(scenario, &node, &before, "before", 6 * MIB).ok()
        })?;

        // What fits is pulled.
        node.containerd.pull(&Pull::new(&registry.reference(&after), "skimmer"))?;
        check(scenario, &node, &after, "after", 8 * MIB)?;

        // With more room the large one fits, on what is left of its first attempt.
        command::run("mount", ["-o", "remount,size=400m", &root.display().to_string()])?;
        node.containerd.pull(&Pull::new(&registry.reference(&large), "skimmer"))?;
        check(scenario, &node, &large, "large", 80 * MIB)?;
        node.skimmerd.terminate()?;
        node.skimmerd.run()?;
        node.wait_connected()?;
        for (image, name, length) in
            [(&before, "before", 6), (&large, "large", 80), (&after, "after", 8)]
        {
            check(scenario, &node, image, name, length * MIB)?;
        }
        Ok(())
    });
}

/// What takes all the room there is.
pub struct Ballast(std::path::PathBuf);

impl Ballast {
    pub fn fill(disk: &Path) -> anyhow::Result<Self> {
        let path = disk.join("ballast");
        let full = std::fs::write(&path, vec![0; 1 << 30]);
        anyhow::ensure!(full.is_err(), "there was room for 1 GiB");
        Ok(Self(path))
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn a_full_disk_stops_what_needs_room_and_everything_goes_on_after_it() {
    scenario("full-disk-all", |scenario| {
        let registry = Registry::start(scenario)?;
        let (lazy, other) =
            (image(scenario, "lazy", 12 * MIB)?, image(scenario, "other", 2 * MIB)?);
        let (reference, other_reference) = (registry.add(&lazy)?, registry.add(&other)?);
        let files = {
            let setup = Setup { name: "a-".into(), ..Setup::default() };
            let first = Node::start_with(scenario, Version::V2, &setup)?;
            first.skimmerd.ask(&["index", "build", &reference])?;
            indexes::export(scenario, &first, &lazy)?
        };
        let root = scenario.path("skimmerd/root");
        let _disk = mounts::mount("tmpfs", "tmpfs", &["size=96m".to_owned()], &root)?;
        let skimmerd = skimmerd::Setup { deadline: Duration::from_secs(90), ..on_tmpfs() };
        let setup = Setup { skimmerd, ..Setup::default() };
        let mut node = Node::start_with(scenario, Version::V2, &setup)?;
        indexes::import(&node, &files)?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        node.containerd.start_image(&reference, "skimmer", "stays", &["sleep", "1000000"])?;
        node.containerd.exec("stays", &["md5sum", "/bin/busybox"])?;
        let mut snapshots = node.snapshots("skimmer")?;
        let before = snapshots.list(&[])?;
        for part in [
            "No space left on device",
            "over its quota",
            "checkpoint not written",
            // Its cause is in the line of the layer that failed.
            "containerd unpacks the layer",
        ] {
            node.skimmerd.expect_log(part);
        }

        let ballast = Ballast::fill(&root)?;
        std::thread::scope(|scope| {
            // The bytes come, and there is no place for them: it waits.
            let reader = scope.spawn(|| node.containerd.exec("stays", &["md5sum", "/data/lazy"]));
            for reference in [&reference, &other_reference] {
                let pulled = node.containerd.pull(&Pull::new(reference, "skimmer"));
                let run = || node.containerd.run_image(reference, "skimmer", "new", &["true"]);
                let said = match pulled.and_then(|_| run()) {
                    Ok(_) => anyhow::bail!("a container started on a full disk"),
                    Err(error) => format!("{error:#}").to_lowercase(),
                };
                anyhow::ensure!(said.contains("no space left on device"), "{said}");
            }
            // What needs no room works.
            anyhow::ensure!(snapshots.list(&[])? == before, "other snapshots");
            node.containerd.exec("stays", &["echo", "hello"])?;
            anyhow::ensure!(!reader.is_finished(), "the reader got what has no place");
            drop(ballast);
            let read = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
            read.context("read when there was room again")
        })?;
        command::wait_for("a container starts again", Duration::from_secs(40), || {
            node.containerd.run_image(&reference, "skimmer", "new", &["true"]).ok()
        })?;
        node.containerd.pull(&Pull::new(&other_reference, "skimmer"))?;
        check(scenario, &node, &other, "other", 2 * MIB)?;
        check(scenario, &node, &lazy, "lazy", 12 * MIB)?;
        node.containerd.remove_container("stays")?;
        // Nothing of it is only in memory.
        node.skimmerd.kill()?;
        node.skimmerd.run()?;
        node.wait_connected()?;
        check(scenario, &node, &other, "other", 2 * MIB)?;
        check(scenario, &node, &lazy, "lazy", 12 * MIB)
    });
}
