//! Images and containers over time: several at once, shared layers, removal, odd kinds.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::{self, PATIENCE, wait_for};
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::Plan;
use skimmer_integration::layer::{Format, Layer};
use skimmer_integration::mounts;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;
use skimmer_integration::skimmerd;
use skimmer_integration::tar::{Header, Tar};

use crate::fixtures::{blobs, busybox, data, mount_point, small};
use crate::indexes;

#[test]
fn two_containers_of_one_image_at_once() {
    scenario("two-containers", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "life/two")?;
        let reference = registry.add(&image)?;
        let mut node = Node::start(scenario, Version::V2)?;
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        node.containerd.start_image(&reference, "skimmer", "one", &["sleep", "100000"])?;
        node.containerd.start_image(&reference, "skimmer", "two", &["sleep", "100000"])?;
        let file = "/data/life-two";
        let (first, second) = std::thread::scope(|scope| {
            let read = |id| node.containerd.exec(id, &["md5sum", file]);
            let other = scope.spawn(move || read("one"));
            (read("two"), other.join())
        });
        let second = second.map_err(|_| anyhow::anyhow!("the reading thread panicked"))??;
        anyhow::ensure!(first? == second, "they read different bytes");
        // Writes stay with the container that made them.
        node.containerd.exec("one", &["sh", "-c", "echo mine > /tmp/file; rm /data/life-two"])?;
        node.containerd
            .exec("two", &["sh", "-c", "test ! -e /tmp/file && test -e /data/life-two"])?;
        let sent = registry.sent(&image.layers[1].blob.digest);
        let size = image.layers[1].blob.size;
        anyhow::ensure!(
            sent.bytes <= 2 * size + (1 << 20),
            "{sent:?} of {size}: indexed once, read once"
        );
        node.containerd.remove_container("one")?;
        node.containerd.remove_container("two")
    });
}

#[test]
fn images_that_share_layers_are_pulled_at_once() {
    scenario("shared-pulls", |scenario| {
        let registry = Registry::start(scenario)?;
        let base = busybox(scenario, Format::Gzip)?;
        let shared = data(scenario, "shared", 12 << 20, Format::Gzip)?;
        let plan = |name: &str, own: &str| -> anyhow::Result<_> {
            let layers =
                vec![base.clone(), shared.clone(), data(scenario, own, 1 << 20, Format::Gzip)?];
            Plan::new(name, layers).build(&blobs(scenario))
        };
        let (first, second) = (plan("life/first", "first")?, plan("life/second", "second")?);
        let references = [registry.add(&first)?, registry.add(&second)?];
        let node = Node::start(scenario, Version::V2)?;
        let results: Vec<_> = std::thread::scope(|scope| {
            let pull = |reference| node.containerd.pull(&Pull::new(reference, "skimmer"));
            let pulls: Vec<_> = references.iter().map(|r| scope.spawn(move || pull(r))).collect();
            pulls
                .into_iter()
                .map(|pull| pull.join().map_err(|_| anyhow::anyhow!("panicked")))
                .collect()
        });
        for result in results {
            result??;
        }
        for (number, reference) in references.iter().enumerate() {
            let id = format!("c{number}");
            node.containerd.run_image(reference, "skimmer", &id, &["md5sum", "/data/shared"])?;
        }
        let sent = registry.sent(&shared.blob.digest);
        anyhow::ensure!(
            sent.bytes == shared.blob.size,
            "{sent:?} of {}: fetched once for both",
            shared.blob.size
        );
        Ok(())
    });
}

#[test]
fn removing_an_image_leaves_what_others_use() {
    scenario("remove-shared", |scenario| {
        let registry = Registry::start(scenario)?;
        let base = busybox(scenario, Format::Gzip)?;
        let shared = data(scenario, "shared", 2 << 20, Format::Gzip)?;
        let stays =
            Plan::new("life/stays", vec![base.clone(), shared.clone()]).build(&blobs(scenario))?;
        let own = data(scenario, "own", 2 << 20, Format::Gzip)?;
        let goes = Plan::new("life/goes", vec![base, shared, own]).build(&blobs(scenario))?;
        let (stays, goes) = (registry.add(&stays)?, registry.add(&goes)?);
        let node = Node::start(scenario, Version::V2)?;
        node.containerd.pull(&Pull::new(&goes, "skimmer"))?;
        node.containerd.pull(&Pull::new(&stays, "skimmer"))?;
        node.containerd.start_image(&stays, "skimmer", "user", &["sleep", "100000"])?;
        node.containerd.run_image(
            &goes,
            "skimmer",
            "gone",
            &["md5sum", "/data/own", "/data/shared"],
        )?;
        let before = node.snapshots("skimmer")?.list(&[])?.len();
        node.containerd.remove_image(&goes)?;
        wait_for("the removed image's own snapshot goes", Duration::from_secs(20), || {
            (node.snapshots("skimmer").ok()?.list(&[]).ok()?.len() == before - 1).then_some(())
        })?;
        node.containerd.exec("user", &["md5sum", "/data/shared"])?;
        node.containerd.run_image(&stays, "skimmer", "new", &["md5sum", "/data/shared"])?;
        node.containerd.remove_container("user")
    });
}

#[test]
fn removed_images_leave_the_disk() {
    scenario("remove-disk", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "life/disk")?;
        let reference = registry.add(&image)?;
        let quota_bytes = 2 << 20;
        let setup = Setup {
            skimmerd: skimmerd::Setup { quota_bytes, ..skimmerd::Setup::default() },
            ..Setup::default()
        };
        let node = Node::start_with(scenario, Version::V2, &setup)?;
        node.skimmerd.expect_log("over its quota, and everything in it is in use");
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        node.containerd.run_image(&reference, "skimmer", "once", &["md5sum", "/data/life-disk"])?;
        let full = disk_usage(&node.skimmerd.root());
        anyhow::ensure!(
            full > image.compressed_bytes(),
            "only {full} bytes on disk while the image is here"
        );
        node.containerd.remove_image(&reference)?;
        wait_for("mounts go", Duration::from_secs(30), || {
            mounts::below(&node.skimmerd.root()).is_empty().then_some(())
        })?;
        anyhow::ensure!(node.snapshots("skimmer")?.list(&[])?.is_empty(), "snapshots are left");
        // Metadata and its log stay: a few MiB of RocksDB.
        wait_for("the cache shrinks to its quota", Duration::from_secs(90), || {
            (disk_usage(&node.skimmerd.root()) < quota_bytes + (6 << 20)).then_some(())
        })
        .with_context(|| format!("{} bytes on disk", disk_usage(&node.skimmerd.root())))?;
        // It comes back whole.
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        node.containerd.run_image(
            &reference,
            "skimmer",
            "again",
            &["md5sum", "/data/life-disk"],
        )?;
        Ok(())
    });
}

/// Bytes on disk below `folder`, holes not counted.
pub fn disk_usage(folder: &Path) -> u64 {
    let mut sum = 0;
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(meta) = std::fs::symlink_metadata(entry.path()) else { continue };
        sum += meta.blocks() * 512;
        if meta.is_dir() {
            sum += disk_usage(&entry.path());
        }
    }
    sum
}

#[test]
fn an_image_of_128_layers_runs() {
    scenario("128-layers", |scenario| {
        let registry = Registry::start(scenario)?;
        let mut layers = vec![busybox(scenario, Format::Gzip)?];
        for number in 1..128 {
            let tar =
                Tar::new().dir("l/").file(format!("l/{number}"), number.to_string().as_bytes());
            layers.push(Layer::of(
                &tar.file("top", number.to_string().as_bytes()).end(),
                Format::Gzip,
                &blobs(scenario),
            )?);
        }
        let image = Plan::new("life/many", layers).build(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        for (name, version) in [("a-", Version::V2), ("b-", Version::V1_6)] {
            let node = Node::start_with(
                scenario,
                version,
                &Setup { name: name.into(), ..Setup::default() },
            )?;
            node.skimmerd.ask(&["pull", &reference, "--namespace", "default"])?;
            let count = node.containerd.run_image(
                &reference,
                "skimmer",
                "many",
                &["sh", "-c", "cat /top; ls /l | wc -l"],
            )?;
            anyhow::ensure!(
                count.replace('\n', " ").trim() == "127127",
                "{version:?} shows {count:?}"
            );
        }
        Ok(())
    });
}

#[test]
fn setuid_programs_and_device_nodes_work_in_a_view() {
    scenario("setuid-devices", |scenario| {
        let registry = Registry::start(scenario)?;
        let source = scenario.path("whoami.c");
        std::fs::write(
            &source,
            "#include <unistd.h>\n#include <stdio.h>\nint main(void) { printf(\"%d %d\\n\", getuid(), geteuid()); }\n",
        )?;
        let program = scenario.path("whoami");
        command::run(
            "cc",
            ["-static".as_ref(), "-o".as_ref(), program.as_os_str(), source.as_os_str()],
        )?;
        let tar = Tar::new()
            .entry(
                Header { mode: 0o4755, ..Header::new("whoami", b'0') },
                &std::fs::read(&program)?,
            )
            .device("zero", b'3', 1, 5)
            .device("null", b'3', 1, 3);
        let image =
            Plan::new("life/setuid", vec![Layer::of(&tar.end(), Format::Gzip, &blobs(scenario))?])
                .build(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        let mut node = Node::start(scenario, Version::V2)?;
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let view = node.view(&image, &mount_point(scenario, "view"))?;
        let whoami = view.path().join("whoami");
        let said = command::run(
            "setpriv",
            [
                "--reuid=1234".as_ref(),
                "--regid=1234".as_ref(),
                "--clear-groups".as_ref(),
                whoami.as_os_str(),
            ],
        )?;
        anyhow::ensure!(said == "1234 0\n", "whoami said {said:?}");
        let mut zeros = [1; 16];
        std::io::Read::read_exact(&mut std::fs::File::open(view.path().join("zero"))?, &mut zeros)?;
        anyhow::ensure!(zeros == [0; 16], "/zero gave {zeros:?}");
        let write = std::fs::OpenOptions::new().write(true).open(view.path().join("whoami"));
        anyhow::ensure!(write.is_err(), "a view must be read-only");
        Ok(())
    });
}

#[test]
fn docker_media_types_and_indexes_are_understood() {
    scenario("media-types", |scenario| {
        let registry = Registry::start(scenario)?;
        let node = Node::start(scenario, Version::V2)?;
        for (name, oci, index) in [
            ("life/oci", true, true),
            ("life/docker", false, false),
            ("life/docker-list", false, true),
        ] {
            let layers = vec![
                busybox(scenario, Format::Gzip)?,
                data(scenario, &name.replace('/', "-"), 100_000, Format::Gzip)?,
            ];
            let mut plan = Plan::new(name, layers);
            (plan.oci, plan.index) = (oci, index);
            let reference = registry.add(&plan.build(&blobs(scenario))?)?;
            node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
            node.containerd.run_image(&reference, "skimmer", &name.replace('/', "-"), &["true"])?;
        }
        Ok(())
    });
}

#[test]
fn a_container_may_be_committed_and_run() {
    scenario("commit", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "life/commit")?;
        let reference = registry.add(&image)?;
        let node = Node::start(scenario, Version::V2)?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        // A snapshot on top, written to by hand, committed, and one more on top of that.
        let chains = image.chain_ids();
        let top = chains.last().context("no layers")?;
        let ctr = |arguments: &[&str]| -> anyhow::Result<String> {
            let mut call = node.containerd.ctr()?;
            command::output_of(
                call.args(["snapshots", "--snapshotter", "skimmer"]).args(arguments),
                PATIENCE,
            )
        };
        let target = mount_point(scenario, "work");
        ctr(&["prepare", "work", top])?;
        let parts = node.snapshots("skimmer")?.mounts("work")?;
        let part = parts.first().context("no mounts")?;
        {
            let mounted = mounts::mount(&part.r#type, &part.source, &part.options, &target)?;
            std::fs::write(mounted.path().join("added"), "by hand")?;
            std::fs::remove_file(mounted.path().join("data/life-commit"))?;
        }
        ctr(&["commit", "result", "work"])?;
        let usage = node.snapshots("skimmer")?.usage("result")?;
        anyhow::ensure!(
            usage.size > 0 && usage.inodes > 0,
            "usage of a written snapshot: {usage:?}"
        );
        let view = node.snapshots("skimmer")?.view("result", &target)?;
        anyhow::ensure!(
            std::fs::read(view.path().join("added"))? == b"by hand",
            "the write is lost"
        );
        anyhow::ensure!(!view.path().join("data/life-commit").exists(), "the removal is lost");
        drop(view);
        ctr(&["remove", "result"])?;
        Ok(())
    });
}
