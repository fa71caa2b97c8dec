//! The daemon dies, stops or is started anew under running containers: their readers wait, and get their bytes.

use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use skimmer_integration::command::{self, PATIENCE, wait_for};
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::Plan;
use skimmer_integration::layer::Format;
use skimmer_integration::mounts;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{self, MountMode};

use crate::fixtures::{blobs, busybox, data, md5sum};
use crate::indexes;

const LEN: usize = 24 << 20;

/// A container of an image, and the image's file of [`LEN`] bytes.
struct World {
    registry: Registry,
    node: Node,
    reference: String,
    file: String,
}

const READER: &str = "reader";

impl World {
    /// The image is lazily mounted and nothing of its file has been read.
    fn new(scenario: &Scenario, name: &str) -> anyhow::Result<Self> {
        Self::with(scenario, name, true)
    }

    /// The same, on a kernel that sends again what is unanswered, or on one that doesn't.
    fn with(scenario: &Scenario, name: &str, resend: bool) -> anyhow::Result<Self> {
        let registry = Registry::start(scenario)?;
        let layers =
            vec![busybox(scenario, Format::Gzip)?, data(scenario, name, LEN, Format::Gzip)?];
        let image = Plan::new(&format!("takeover/{name}"), layers).build(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        let skimmerd = skimmerd::Setup {
            holder: true,
            deadline: Duration::from_secs(60),
            resend,
            ..skimmerd::Setup::default()
        };
        let setup = Setup { skimmerd, ..Setup::default() };
        let mut node = Node::start_with(scenario, Version::V2, &setup)?;
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        node.containerd.start_image(&reference, "skimmer", READER, &["sleep", "100000"])?;
        let in_kernel = MountMode::of_this_run() == MountMode::Kernel;
        let expected = if in_kernel { "kernel" } else { "fuse" };
        let images = node.skimmerd.ask(&["status", &reference])?;
        let server = &images[0]["layers"][1]["server"];
        anyhow::ensure!(server == expected, "{server} serves the layer, not {expected}: {images}");
        Ok(Self { registry, node, reference, file: format!("/data/{name}") })
    }

    /// A reader of the whole file, which may have to wait.
    fn begin_reading(&self) -> anyhow::Result<JoinHandle<anyhow::Result<String>>> {
        let mut reader = self.node.containerd.ctr()?;
        reader.args(["task", "exec", "--exec-id", "waits", READER, "md5sum", &self.file]);
        Ok(thread::spawn(move || command::output_of(&mut reader, PATIENCE)))
    }

    fn sum(&self) -> anyhow::Result<String> {
        self.node.containerd.exec(READER, &["md5sum", &self.file])
    }
}

/// Waits for the reader, and fails if it got other bytes.
fn finish_reading(
    reader: JoinHandle<anyhow::Result<String>>,
    expected: &str,
) -> anyhow::Result<()> {
    let said = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    anyhow::ensure!(said.trim() == expected.trim(), "{said:?} instead of {expected:?}");
    Ok(())
}

#[test]
fn readers_wait_for_the_next_daemon() {
    scenario("takeover-dead", |scenario| {
        let mut world = World::new(scenario, "dead")?;
        let expected = md5sum(scenario, "dead", LEN)?;
        world.node.skimmerd.kill()?;
        let waiting = world.begin_reading()?;
        thread::sleep(Duration::from_secs(1));
        anyhow::ensure!(!waiting.is_finished(), "nobody could have answered it");
        world.node.skimmerd.run()?;
        finish_reading(waiting, &expected)?;
        world.node.containerd.remove_container(READER)
    });
}

#[test]
fn what_was_in_flight_is_answered_by_the_next_daemon() {
    in_flight("flight", true);
}

#[test]
fn what_was_in_flight_is_answered_where_the_kernel_does_not_send_it_again() {
    in_flight("recorded", false);
}

fn in_flight(name: &'static str, resend: bool) {
    scenario(&format!("takeover-{name}"), |scenario| {
        let mut world = World::with(scenario, name, resend)?;
        let expected = md5sum(scenario, name, LEN)?;
        world.registry.stop()?;
        let waiting = world.begin_reading()?;
        // The daemon has taken the read and asks a registry that isn't there.
        thread::sleep(Duration::from_secs(2));
        world.node.skimmerd.kill()?;
        world.registry.resume()?;
        world.node.skimmerd.run()?;
        finish_reading(waiting, &expected)?;
        world.node.containerd.remove_container(READER)
    });
}

#[test]
fn open_files_and_inode_numbers_stay_through_many_deaths() {
    scenario("takeover-many", |scenario| {
        let mut world = World::new(scenario, "many")?;
        let expected = md5sum(scenario, "many", LEN)?;
        let inode =
            |world: &World| world.node.containerd.exec(READER, &["stat", "-c", "%i", &world.file]);
        let before = inode(&world)?;
        // One file open all along, read a block at a time.
        let script = format!(
            "for i in $(seq 24); do dd bs=1M count=1 2>/dev/null; sleep 0.1; done < {} | md5sum",
            world.file
        );
        let mut slow = world.node.containerd.ctr()?;
        slow.args(["task", "exec", "--exec-id", "slow", READER, "sh", "-c", &script]);
        let slow = thread::spawn(move || command::output_of(&mut slow, PATIENCE));
        for round in 0..6u64 {
            // At different moments of the reader's loop.
            thread::sleep(Duration::from_millis(150 + 67 * round));
            if round % 3 == 2 {
                world.node.skimmerd.terminate()?;
            } else {
                world.node.skimmerd.kill()?;
            }
            world.node.skimmerd.run()?;
        }
        let sum = |said: &str| said.split(' ').next().unwrap_or_default().to_owned();
        let said = slow.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        anyhow::ensure!(sum(&said) == sum(&expected), "{said:?} instead of {expected:?}");
        anyhow::ensure!(world.sum()?.trim() == expected.trim(), "other bytes afterwards");
        anyhow::ensure!(inode(&world)? == before, "another inode number");
        world.node.containerd.remove_container(READER)
    });
}

#[test]
fn a_holder_that_died_is_given_everything_again() {
    scenario("takeover-holder", |scenario| {
        let mut world = World::new(scenario, "holder")?;
        let expected = md5sum(scenario, "holder", LEN)?;
        doctor_says(&world.node, "ok", "the holder at")?;
        world.node.skimmerd.expect_log("the holder of descriptors is gone");
        world.node.skimmerd.kill_holder()?;
        wait_for("the daemon misses its holder", PATIENCE, || {
            world.node.skimmerd.log().contains("the holder of descriptors is gone").then_some(())
        })?;
        doctor_says(&world.node, "warning", "which is gone")?;
        world.node.skimmerd.hold()?;
        wait_for("the daemon finds its new holder", PATIENCE, || {
            world.node.skimmerd.log().contains("is there again").then_some(())
        })?;
        doctor_says(&world.node, "ok", "the holder at")?;
        world.node.skimmerd.kill()?;
        world.node.skimmerd.run()?;
        anyhow::ensure!(world.sum()?.trim() == expected.trim(), "other bytes");
        world.node.containerd.remove_container(READER)
    });
}

#[test]
fn containers_whose_mounts_died_with_daemon_and_holder_are_named() {
    scenario("takeover-both", |scenario| {
        let mut world = World::new(scenario, "both")?;
        let expected = md5sum(scenario, "both", LEN)?;
        world.node.skimmerd.expect_log("nobody kept the mounts of its layers");
        world.node.skimmerd.expect_log("nobody kept a mount");
        world.node.skimmerd.kill()?;
        world.node.skimmerd.kill_holder()?;
        world.node.skimmerd.hold()?;
        world.node.skimmerd.run()?;
        world.node.wait_connected()?;
        let lost = |world: &World| -> anyhow::Result<Vec<String>> {
            let images = world.node.skimmerd.ask(&["status", &world.reference])?;
            let names = images[0]["layers"][1]["lost"].as_array().cloned().unwrap_or_default();
            Ok(names.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect())
        };
        let named = lost(&world)?;
        let [name] = &named[..] else { anyhow::bail!("one container was running: {named:?}") };
        anyhow::ensure!(name.ends_with(&format!("/{READER}")), "{name} is not {READER:?}");
        let log = world.node.skimmerd.log();
        let tells = |line: &str| line.contains("start it anew") && line.contains(name.as_str());
        anyhow::ensure!(log.lines().any(tells), "the log doesn't say that of {name}");
        // Another container of the image has its files.
        world.node.containerd.start_image(
            &world.reference,
            "skimmer",
            "next",
            &["sleep", "1000"],
        )?;
        let said = world.node.containerd.exec("next", &["md5sum", &world.file])?;
        anyhow::ensure!(said.trim() == expected.trim(), "{said:?} instead of {expected:?}");
        anyhow::ensure!(lost(&world)?.len() == 1, "the new container is named too");
        world.node.containerd.remove_container("next")?;
        world.node.containerd.remove_container(READER)?;
        // Until then its snapshot may stay.
        world.node.containerd.collect_garbage(&world.reference)?;
        wait_for("nobody is named", PATIENCE, || lost(&world).ok()?.is_empty().then_some(()))
    });
}

#[test]
fn drained_mounts_are_gone_and_their_readers_are_told() {
    scenario("takeover-drain", |scenario| {
        let mut world = World::new(scenario, "drained")?;
        let mounted = |world: &World| below(&world.node.skimmerd.root());
        anyhow::ensure!(mounted(&world) > 0, "nothing is mounted");
        world.node.skimmerd.terminate()?;
        anyhow::ensure!(mounted(&world) > 0, "a stop unmounted what containers use");
        let mut reader = world.node.containerd.ctr()?;
        reader.args(["task", "exec", "--exec-id", "told", READER, "cat", &world.file]);
        let waiting = thread::spawn(move || command::failure_of(&mut reader, PATIENCE));
        thread::sleep(Duration::from_secs(1));
        anyhow::ensure!(!waiting.is_finished(), "nobody could have answered it");
        let mut drain: Command = world.node.skimmerd.command();
        command::output_of(drain.args(["drain", "--unmount"]), PATIENCE)?;
        anyhow::ensure!(mounted(&world) == 0, "something is still mounted");
        waiting.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        world.node.skimmerd.run()?;
        world.node.wait_connected()?;
        // The container may have died of what was taken from it.
        let _ = world.node.containerd.remove_container(READER);
        Ok(())
    });
}

#[test]
fn the_kernel_serves_nothing_incomplete_where_nobody_keeps_its_descriptors() {
    scenario("takeover-nobody", |scenario| {
        let mut node = Node::start(scenario, Version::V2)?;
        node.skimmerd.terminate()?;
        node.skimmerd.configure("mode", "'kernel'")?;
        node.skimmerd.configure("keeper", "'none'")?;
        let said = command::failure_of(&mut node.skimmerd.command(), PATIENCE)?;
        for part in ["mount.mode", "nobody keeps the descriptors"] {
            anyhow::ensure!(said.contains(part), "{said:?} doesn't say {part:?}");
        }
        node.skimmerd.configure("mode", "'auto'")?;
        node.skimmerd.run()?;
        doctor_says(&node, "warning", "nobody")
    });
}

#[test]
fn what_is_in_flight_stays_recorded_through_many_deaths() {
    scenario("takeover-stays", |scenario| {
        let mut world = World::with(scenario, "stays", false)?;
        let expected = md5sum(scenario, "stays", LEN)?;
        world.registry.stop()?;
        let waiting = world.begin_reading()?;
        thread::sleep(Duration::from_secs(2));
        // None of them gets at the bytes, whether it is killed or goes by itself.
        for deaths in 1..=4 {
            if deaths % 2 == 0 {
                world.node.skimmerd.terminate()?;
            } else {
                world.node.skimmerd.kill()?;
            }
            world.node.skimmerd.run()?;
            wait_for("what was left is begun anew", PATIENCE, || {
                let log = world.node.skimmerd.log();
                (log.matches("what an earlier process began").count() >= deaths).then_some(())
            })?;
            // Before it serves, nothing tells it to stop in order.
            world.node.wait_connected()?;
            anyhow::ensure!(!waiting.is_finished(), "nobody could have answered it");
        }
        world.node.skimmerd.kill()?;
        world.registry.resume()?;
        world.node.skimmerd.run()?;
        finish_reading(waiting, &expected)?;
        world.node.containerd.remove_container(READER)
    });
}

#[test]
fn nobody_hangs_who_looks_names_up_while_daemons_die() {
    scenario("takeover-names", |scenario| {
        let mut world = World::with(scenario, "names", false)?;
        let expected = md5sum(scenario, "names", LEN)?;
        // A name that nobody has looked up is asked of every layer.
        let looks = format!(
            "i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); \
             [ -e /data/no-$i ] && echo found $i; [ -e {} ] || echo lost $i; done; echo end $i",
            world.file
        );
        // Another block of the file every time.
        let reads = format!(
            "for i in $(seq 96); do dd bs=256k count=1 2>/dev/null; sleep 0.2; done < {} | md5sum",
            world.file
        );
        let start = |id: &str, script: &str| -> anyhow::Result<_> {
            let mut exec = world.node.containerd.ctr()?;
            exec.args(["task", "exec", "--exec-id", id, READER, "sh", "-c", script]);
            Ok(thread::spawn(move || command::output_of(&mut exec, PATIENCE)))
        };
        let (looking, reading) = (start("looks", &looks)?, start("reads", &reads)?);
        for round in 0..24u64 {
            thread::sleep(Duration::from_millis(200 + 37 * (round % 7)));
            world.node.skimmerd.kill()?;
            world.node.skimmerd.run()?;
        }
        world.node.containerd.exec(READER, &["sh", "-c", "echo >/tmp/stop"])?;
        let joined = |thread: JoinHandle<_>| {
            thread.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?
        };
        let said: String = joined(looking)?;
        let looked: Option<u64> =
            said.trim().strip_prefix("end ").and_then(|count| count.parse().ok());
        anyhow::ensure!(looked.is_some_and(|count| count > 10_000), "{said:?}");
        let sum = |said: &str| said.split(' ').next().unwrap_or_default().to_owned();
        let said = joined(reading)?;
        anyhow::ensure!(sum(&said) == sum(&expected), "{said:?} instead of {expected:?}");
        world.node.containerd.remove_container(READER)
    });
}

/// `skimmer doctor` finds nothing that fails, and says `words` of who keeps the descriptors of mounts.
fn doctor_says(node: &Node, verdict: &str, words: &str) -> anyhow::Result<()> {
    let containerd = node.containerd.address().display().to_string();
    let findings = node.skimmerd.ask(&["doctor", "--containerd", &containerd])?;
    let said = findings.as_array().into_iter().flatten().any(|finding| {
        let detail = finding["detail"].as_str().unwrap_or_default();
        finding["check"] == "descriptors of mounts"
            && finding["verdict"] == verdict
            && detail.contains(words)
    });
    anyhow::ensure!(said, "no {verdict} that says {words:?}: {findings}");
    Ok(())
}

fn below(root: &Path) -> usize {
    mounts::below(&root.join("snapshots/m")).len()
}
