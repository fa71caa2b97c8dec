//! A disk that is full in the middle of a pull: an error that says so, and nothing else is lost.

use std::time::Duration;

use skimmer_integration::command::{self, PATIENCE, failure_of};
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, noise};
use skimmer_integration::mounts;
use skimmer_integration::node::Node;
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};

use crate::fixtures::{blobs, busybox, data, mount_point, seed};

const MIB: usize = 1 << 20;

fn image(scenario: &Scenario, name: &str, length: usize) -> anyhow::Result<Image> {
    let layers =
        vec![busybox(scenario, Format::Gzip)?, data(scenario, name, length, Format::Gzip)?];
    Plan::new(&format!("disk/{name}"), layers).build(&blobs(scenario))
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
        let mut node = Node::start(scenario, Version::V2)?;
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
