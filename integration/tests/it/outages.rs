//! Crashes, restarts and outages: what is lost, and what comes back.

use std::collections::HashMap;
use std::process::Command;
use std::time::Duration;

use skimmer_integration::command::{self, PATIENCE, wait_for};
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::layer::noise;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;
use skimmer_integration::skimmerd::{self, Skimmerd};

use crate::fixtures::{mount_point, seed, small};
use crate::indexes;

#[test]
fn after_a_crash_new_containers_start() {
    scenario("crash", |scenario| {
        let registry = Registry::start(scenario)?;
        let (first, second) = (small(scenario, "life/crash")?, small(scenario, "life/other")?);
        let (reference, other) = (registry.add(&first)?, registry.add(&second)?);
        let mut node = Node::start(scenario, Version::V2)?;
        indexes::learn(scenario, &mut node, &[(&first, &reference), (&second, &other)])?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let expected = node.containerd.run_image(
            &reference,
            "skimmer",
            "before",
            &["md5sum", "/data/life-crash"],
        )?;
        let snapshots = node.snapshots("skimmer")?.list(&[])?;
        for round in 0..3 {
            node.skimmerd.kill()?;
            node.skimmerd.run()?;
            node.wait_connected()?;
            let id = format!("after-{round}");
            let output = node.containerd.run_image(
                &reference,
                "skimmer",
                &id,
                &["md5sum", "/data/life-crash"],
            )?;
            anyhow::ensure!(output == expected, "{output:?} instead of {expected:?}");
        }
        let names = |all: &[containerd_client::services::v1::snapshots::Info]| {
            let mut names: Vec<String> = all.iter().map(|info| info.name.clone()).collect();
            names.sort();
            names
        };
        anyhow::ensure!(
            names(&snapshots) == names(&node.snapshots("skimmer")?.list(&[])?),
            "snapshots changed"
        );
        // Killed in the middle of a pull, the next one succeeds.
        let containerd = &node.containerd;
        std::thread::scope(|scope| {
            let pulling = scope.spawn(|| containerd.pull(&Pull::new(&other, "skimmer")));
            let killed = node.skimmerd.kill().and_then(|()| node.skimmerd.run());
            // Whether that pull failed is a matter of timing.
            let _ = pulling.join();
            killed
        })?;
        node.wait_connected()?;
        let containerd = &node.containerd;
        containerd.pull(&Pull::new(&other, "skimmer"))?;
        containerd.run_image(&other, "skimmer", "other", &["md5sum", "/data/life-other"])?;
        Ok(())
    });
}

#[test]
fn a_drained_daemon_comes_back() {
    scenario("drain", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "life/drain")?;
        let reference = registry.add(&image)?;
        let mut node = Node::start(scenario, Version::V1_7)?;
        node.skimmerd.ask(&["pull", &reference, "--namespace", "default"])?;
        node.skimmerd.terminate()?;
        node.skimmerd.run()?;
        node.wait_connected()?;
        node.containerd.run_image(
            &reference,
            "skimmer",
            "after",
            &["md5sum", "/data/life-drain"],
        )?;
        Ok(())
    });
}

#[test]
fn the_daemon_starts_with_nothing_around_it() {
    scenario("alone", |scenario| {
        let nowhere = scenario.path("no-containerd.sock");
        let mut daemon =
            Skimmerd::start(scenario, "skimmerd", &nowhere, &skimmerd::Setup::default())?;
        let mut snapshots =
            skimmer_integration::snapshots::Snapshots::connect(&daemon.address(), "skimmer")?;
        anyhow::ensure!(snapshots.list(&[])?.is_empty(), "it has snapshots from nowhere");
        // An ordinary snapshot needs nobody.
        let mounts = snapshots.prepare("default/1/key", "", HashMap::new())?;
        anyhow::ensure!(!mounts.is_empty(), "no mounts");
        drop(snapshots);
        daemon.terminate()
    });
}

#[test]
fn readers_get_an_error_in_an_outage_and_bytes_after_it() {
    scenario("outage", |scenario| {
        let mut registry = Registry::start(scenario)?;
        let image = small(scenario, "life/outage")?;
        let reference = registry.add(&image)?;
        let deadline = Duration::from_secs(3);
        let setup = Setup {
            skimmerd: skimmerd::Setup { deadline, ..Default::default() },
            ..Setup::default()
        };
        let mut node = Node::start_with(scenario, Version::V2, &setup)?;
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let view = node.view(&image, &mount_point(scenario, "view"))?;
        let file = view.path().join("data/life-outage");
        node.skimmerd.expect_log("life/outage");
        node.skimmerd.expect_log(&image.layers[1].blob.digest.to_string());
        registry.stop()?;
        let mut reader = Command::new("cat");
        let said =
            command::failure_of(reader.arg(&file).stdout(std::process::Stdio::null()), PATIENCE)?;
        anyhow::ensure!(said.contains("Input/output error"), "the reader was told {said:?}");
        registry.resume()?;
        // A reader may still join what was asked for during the outage, and fail with it.
        let read = || std::fs::read(&file).ok();
        let bytes = wait_for("the file is read after the outage", PATIENCE, read)?;
        anyhow::ensure!(
            bytes == noise(seed("life-outage"), 8 << 20),
            "other bytes after the outage"
        );
        Ok(())
    });
}
