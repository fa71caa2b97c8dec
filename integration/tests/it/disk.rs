//! What the node takes of its disk: told truthfully, given up when asked, and checked.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::Value;
use skimmer_integration::command::{failure_of, output_of, wait_for};
use skimmer_integration::containerd::Version;
use skimmer_integration::cri::Cri;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::Image;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{self, MountMode};

use crate::fixtures::{md5sum, mount_point, pause, small};
use crate::indexes;
use crate::lifecycle::disk_usage;

const KIB: u64 = 1 << 10;

/// What images and containers take on disk: everything but the database, documents and what is mounted.
fn taken(node: &Node) -> u64 {
    let root = node.skimmerd.root();
    let mut sum: u64 =
        ["cache/blobs-v1", "cache/layers-v1"].map(|part| disk_usage(&root.join(part))).iter().sum();
    for entry in fs::read_dir(root.join("snapshots")).into_iter().flatten().flatten() {
        if entry.file_name() != "m" {
            sum += disk_usage(&entry.path());
        }
    }
    sum
}

/// Within the records and folders of so many snapshots.
fn is_about(told: u64, taken: u64, snapshots: u64) -> bool {
    told.abs_diff(taken) <= snapshots * 24 * KIB
}

#[test]
fn usage_is_what_du_says() {
    for version in [Version::V1_7, Version::V2] {
        scenario(&format!("usage-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "disk/usage")?;
            let reference = registry.add(&image)?;
            let pause_image = Some(registry.add(&pause(scenario)?)?);
            let setup = Setup { annotations: true, pause_image, ..Setup::default() };
            let node = Node::start_with(scenario, version, &setup)?;
            let mut cri = Cri::connect(&node.containerd.address())?;
            let pod = cri.run_pod("pod", &scenario.path("pods"))?;
            cri.pull(&reference, Some(&pod))?;
            let container = cri.start(&pod, &reference, &["sleep", "1000000"])?;
            cri.exec(&container, &["dd", "if=/dev/zero", "of=/tmp/big", "bs=1M", "count=5"])?;

            let mut snapshots = node.snapshots("skimmer")?;
            // Those of CRI are in a namespace of its own.
            let mut ours = skimmer_integration::snapshots::Snapshots::connect(
                &node.skimmerd.address(),
                "skimmer",
            )?;
            let (mut sum, mut count) = (0, 0);
            let mut committed = 0;
            for info in ours.list(&[])? {
                let usage = u64::try_from(ours.usage(&info.name)?.size)?;
                sum += usage;
                count += 1;
                committed += if info.kind == 3 { usage } else { 0 };
            }
            anyhow::ensure!(snapshots.list(&[])?.is_empty(), "CRI's snapshots are in k8s.io");
            let taken = taken(&node);
            anyhow::ensure!(sum > 13 << 20, "only {sum} bytes with 8 MiB of data and 5 written");
            anyhow::ensure!(is_about(sum, taken, count), "told {sum}, du says {taken}");
            anyhow::ensure!(committed + (5 << 20) <= sum, "{committed} of {sum} are layers");
            // containerd asks every ten seconds.
            let mut last = 0;
            wait_for("CRI tells the same", Duration::from_secs(40), || {
                last = cri.image_bytes().ok()?;
                is_about(last, taken, count).then_some(())
            })
            .with_context(|| format!("ImageFsInfo says {last}, du {taken}"))?;
            cri.remove_pod(&pod)
        });
    }
}

fn entries(shown: &Value) -> Vec<(String, u64, bool)> {
    let entries = shown["entries"].as_array().into_iter().flatten();
    entries
        .map(|entry| {
            let what = entry["what"].as_str().unwrap_or_default().to_owned();
            (what, entry["bytes"].as_u64().unwrap_or(0), entry["in_use"] == true)
        })
        .collect()
}

#[test]
fn prune_gives_up_what_no_snapshot_uses() {
    scenario("prune", |scenario| {
        let registry = Registry::start(scenario)?;
        let (stays, goes) = (small(scenario, "disk/stays")?, small(scenario, "disk/goes")?);
        let (kept, removed) = (registry.add(&stays)?, registry.add(&goes)?);
        let mut node = Node::start(scenario, Version::V2)?;
        for reference in [&kept, &removed] {
            node.containerd.pull(&Pull::new(reference, "skimmer"))?;
        }
        let before = node.skimmerd.ask(&["cache", "show", "--limit", "0"])?;
        let of_layers = |shown: &Value| -> u64 {
            entries(shown)
                .iter()
                .filter(|(what, ..)| what == "data")
                .map(|(_, bytes, _)| bytes)
                .sum()
        };
        anyhow::ensure!(of_layers(&before) > 16 << 20, "both layers' data: {before}");
        let idle: Vec<_> = entries(&before).into_iter().filter(|(_, _, used)| !used).collect();
        anyhow::ensure!(idle.is_empty(), "snapshots use everything: {idle:?}");

        // Its data goes with it, its blob stays.
        node.containerd.remove_image(&removed)?;
        let layer = &goes.layers[1].blob;
        let data =
            node.skimmerd.root().join("cache/layers-v1").join(layer.digest.hex()).join("data");
        wait_for("its data goes", Duration::from_secs(30), || (!data.exists()).then_some(()))?;
        let shown = node.skimmerd.ask(&["cache", "show"])?;
        let idle = shown["idle_bytes"].as_u64().context("no idle_bytes")?;
        anyhow::ensure!(idle >= layer.size, "{idle} of {} bytes: {shown}", layer.size);
        // A restart forgets which layers are open, and not which ones are in use.
        node.skimmerd.terminate()?;
        node.skimmerd.run()?;
        node.wait_connected()?;
        let pruned = node.skimmerd.ask(&["cache", "prune"])?;
        let freed = pruned["freed_bytes"].as_u64().context("no freed_bytes")?;
        anyhow::ensure!(freed >= layer.size, "freed {freed} of a blob of {} bytes", layer.size);
        let after = node.skimmerd.ask(&["cache", "show", "--limit", "0"])?;
        anyhow::ensure!(after["idle_bytes"] == 0, "{after}");
        let left = disk_usage(&node.skimmerd.root().join("cache"));
        let used = after["used_bytes"].as_u64().context("no used_bytes")?;
        anyhow::ensure!(is_about(used, left, 16), "shown {used}, du says {left}");
        anyhow::ensure!(
            node.skimmerd.ask(&["cache", "prune", "--all"])?["freed_bytes"].is_u64(),
            "prune --all"
        );

        // What is used needs nobody; what went comes again.
        let before = registry.sent(&stays.layers[1].blob.digest);
        node.containerd.run_image(&kept, "skimmer", "kept", &["md5sum", "/data/disk-stays"])?;
        anyhow::ensure!(registry.sent(&stays.layers[1].blob.digest) == before, "fetched again");
        node.containerd.pull(&Pull::new(&removed, "skimmer"))?;
        node.containerd.run_image(&removed, "skimmer", "again", &["md5sum", "/data/disk-goes"])?;
        Ok(())
    });
}

/// Overwrites a part of a file, as a bad disk does.
pub fn spoil(path: &Path) -> anyhow::Result<()> {
    let mode = fs::metadata(path)?.permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(&[0xa5; 3000], file.metadata()?.len() / 2)?;
    Ok(fs::set_permissions(path, mode)?)
}

fn view_is_right(
    scenario: &Scenario,
    node: &Node,
    image: &Image,
    name: &str,
) -> anyhow::Result<()> {
    let view = node.view(image, &mount_point(scenario, name))?;
    let bytes = fs::read(view.path().join("data").join(name))?;
    let expected = skimmer_integration::layer::noise(crate::fixtures::seed(name), 8 << 20);
    anyhow::ensure!(bytes == expected, "other bytes in {name}");
    Ok(())
}

#[test]
fn bit_rot_is_found_and_mended() {
    scenario("bit-rot", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "disk/rot")?;
        let reference = registry.add(&image)?;
        let node = Node::start(scenario, Version::V2)?;
        node.skimmerd.expect_log("cached bytes had changed on disk");
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let verified = node.skimmerd.ask(&["cache", "verify"])?;
        anyhow::ensure!(
            verified["done"] == true && verified["found"] == Value::Array(Vec::new()),
            "{verified}"
        );
        let checked = verified["checked_bytes"].as_u64().context("no checked_bytes")?;
        anyhow::ensure!(checked > image.compressed_bytes(), "{verified}");

        let blob = image.layers[1].blob.digest;
        let cached = |part: &str| {
            node.skimmerd.root().join("cache").join(part).join(blob.hex()).join("data")
        };
        // The data file alone is set right from the blob, without the registry.
        let sent = registry.sent(&blob);
        spoil(&cached("layers-v1"))?;
        let said =
            failure_of(&mut node.skimmerd.skimmer(&["cache", "verify"])?, Duration::from_secs(60))?;
        anyhow::ensure!(said.contains(&blob.to_string()), "{said}");
        view_is_right(scenario, &node, &image, "disk-rot")?;
        anyhow::ensure!(registry.sent(&blob) == sent, "fetched although the blob is here");
        // Both: what is wrong of the blob comes again.
        spoil(&cached("layers-v1"))?;
        spoil(&cached("blobs-v1"))?;
        failure_of(&mut node.skimmerd.skimmer(&["cache", "verify"])?, Duration::from_secs(60))?;
        view_is_right(scenario, &node, &image, "disk-rot")?;
        anyhow::ensure!(registry.sent(&blob) != sent, "nothing was fetched");
        wait_for("all is right again", Duration::from_secs(30), || {
            output_of(
                &mut node.skimmerd.skimmer(&["cache", "verify"]).ok()?,
                Duration::from_secs(60),
            )
            .ok()
        })?;
        Ok(())
    });
}

#[test]
fn containers_read_what_is_right_again_where_skimmerd_serves_it() {
    let setup = || skimmerd::Setup { mounts: Some(MountMode::Fuse), ..skimmerd::Setup::default() };
    scenario("bit-rot-in-use-fuse", |scenario| in_use(scenario, setup(), false));
    scenario("bit-rot-in-use-fuse-filled", |scenario| in_use(scenario, setup(), true));
}

#[test]
fn containers_read_what_is_right_again_where_the_kernel_serves_it() {
    let setup = skimmerd::Setup::default;
    scenario("bit-rot-in-use-kernel", |scenario| in_use(scenario, setup(), false));
    if MountMode::of_this_run() == MountMode::Kernel {
        scenario("bit-rot-in-use-kernel-filled", |scenario| in_use(scenario, setup(), true));
    }
}

/// The data file of a layer rots under a container that has read of it, also what is wrong; `lazily`: it was mounted
/// before its bytes had come.
fn in_use(scenario: &Scenario, skimmerd: skimmerd::Setup, lazily: bool) -> anyhow::Result<()> {
    let registry = Registry::start(scenario)?;
    let image = small(scenario, "disk/used")?;
    let reference = registry.add(&image)?;
    let served_by_fuse = skimmerd.mounts == Some(MountMode::Fuse);
    let setup = Setup { skimmerd, ..Setup::default() };
    let mut node = Node::start_with(scenario, Version::V2, &setup)?;
    node.skimmerd.expect_log("cached bytes had changed on disk");
    if lazily {
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
    }
    node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
    node.containerd.start_image(&reference, "skimmer", "user", &["sleep", "100000"])?;
    let expected = md5sum(scenario, "disk-used", 8 << 20)?;
    let is_right = |node: &Node| -> anyhow::Result<bool> {
        let said = node.containerd.exec("user", &["md5sum", "/data/disk-used"])?;
        Ok(said.trim() == expected.trim())
    };
    anyhow::ensure!(is_right(&node)?, "other bytes before anything was wrong");
    let view = node.view(&image, &mount_point(scenario, "used"))?;
    let file = File::open(view.path().join("data/disk-used"))?;

    let blob = image.layers[1].blob.digest;
    let cache = node.skimmerd.root().join("cache");
    let [data, source] =
        ["layers-v1", "blobs-v1"].map(|part| cache.join(part).join(blob.hex()).join("data"));
    for both in [false, true] {
        spoil(&data)?;
        if both {
            spoil(&source)?;
        }
        let let_go = || posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        // What the container has read before is in memory, and right.
        let_go()?;
        anyhow::ensure!(!is_right(&node)?, "what is wrong on disk is not read");
        let said =
            failure_of(&mut node.skimmerd.skimmer(&["cache", "verify"])?, Duration::from_secs(60))?;
        anyhow::ensure!(said.contains(&blob.to_string()), "{said}");
        wait_for("the container reads what is right", Duration::from_secs(30), || {
            if served_by_fuse {
                // It stays cached until memory lets go of it.
                let_go().ok()?;
            }
            is_right(&node).ok()?.then_some(())
        })?;
    }
    drop((file, view));
    node.containerd.remove_container("user")
}
