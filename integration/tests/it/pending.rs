//! Layers without an index behind a slow link: nothing waits for them under containerd's lock.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use containerd_client::types::Mount;
use skimmer_integration::containerd::{VERSIONS, Version};
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::Plan;
use skimmer_integration::layer::{Format, noise};
use skimmer_integration::mounts;
use skimmer_integration::network::Host;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::{Auth, Registry};
use skimmer_integration::scenario::scenario;
use skimmer_integration::skimmerd;

use crate::fixtures::{blobs, busybox, data, mount_point, seed};

const LENGTH: usize = 8 << 20;
/// Eight MiB take as many seconds.
const BITS_PER_SECOND: u64 = 8 << 20;

fn setup() -> Setup {
    let skimmerd = skimmerd::Setup {
        prepare_wait: Duration::from_secs(1),
        deadline: Duration::from_secs(60),
        ..skimmerd::Setup::default()
    };
    Setup { skimmerd, ..Setup::default() }
}

fn run(name: &str, version: Version) {
    scenario(name, |scenario| {
        let host = Host::new(Some(BITS_PER_SECOND))?;
        let registry = Registry::start_with(scenario, "registry", &Auth::Anyone, Some(&host))?;
        let layers =
            vec![busybox(scenario, Format::Gzip)?, data(scenario, "slow", LENGTH, Format::Gzip)?];
        let image = Plan::new("pending/slow", layers).build(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        let node = Node::start_with(scenario, version, &setup())?;
        let start = Instant::now();
        node.skimmerd.ask(&["pull", &reference])?;
        let pulled = start.elapsed();

        // A snapshot on it is made within the time that Prepare has, and mounting it early fails.
        let mut snapshots = node.snapshots("skimmer")?;
        let top = image.chain_ids().pop().unwrap_or_default();
        let asked = Instant::now();
        // containerd would collect it otherwise.
        let root = ("containerd.io/gc.root".to_owned(), "true".to_owned());
        let early = snapshots.prepare("early", &top, HashMap::from([root]))?;
        let (prepared, total) = (asked.elapsed(), start.elapsed());
        anyhow::ensure!(
            total < Duration::from_secs(6),
            "pull {pulled:?}, prepare {prepared:?}: they waited for the layer"
        );
        let target = mount_point(scenario, "early");
        let mounted = mounts::mount(&early[0].r#type, &early[0].source, &early[0].options, &target);
        anyhow::ensure!(mounted.is_err(), "mounted before the layer was there: {early:?}");

        // A container starts when the layer has come.
        let program = ["sh", "-c", "wc -c < /data/slow; md5sum /data/slow"];
        let said = node.containerd.run_image(&reference, "skimmer", "slow", &program)?;
        anyhow::ensure!(said.starts_with(&LENGTH.to_string()), "{said}");
        anyhow::ensure!(start.elapsed() > Duration::from_secs(6), "the link was not slow");

        // By now the early mounts are as good as what Mounts answers.
        let late = snapshots.mounts("early")?;
        for mounts in [early, late] {
            let Mount { r#type: kind, source, options, .. } = &mounts[0];
            let view = mounts::mount(kind, source, options, &target)?;
            let bytes = std::fs::read(view.path().join("data/slow"))?;
            anyhow::ensure!(bytes == noise(seed("slow"), LENGTH), "other bytes");
        }
        snapshots.remove("early")
    });
}

#[test]
fn containers_on_pending_layers_wait_outside_of_prepare() {
    for version in VERSIONS {
        run(&format!("pending-{version:?}"), version);
    }
}

#[test]
fn a_pending_layer_that_fails_fails_the_mounts() {
    scenario("pending-failure", |scenario| {
        let host = Host::new(Some(BITS_PER_SECOND))?;
        let registry = Registry::start_with(scenario, "registry", &Auth::Anyone, Some(&host))?;
        let bad = data(scenario, "bad", LENGTH, Format::Gzip)?;
        let digest = bad.blob.digest;
        let image = Plan::new("pending/bad", vec![busybox(scenario, Format::Gzip)?, bad])
            .build(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        registry.falsify(&digest, |bytes| bytes[LENGTH / 2] ^= 1)?;
        let node = Node::start_with(scenario, Version::V2, &setup())?;
        node.skimmerd.expect_log(&digest.to_string());
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let said = node.containerd.run_image(&reference, "skimmer", "bad", &["true"]);
        let said = said.map_or_else(|error| error.to_string(), |said| format!("ran: {said}"));
        for part in [&*digest.to_string(), "pending/bad", "digest"] {
            anyhow::ensure!(said.contains(part), "{part} is not in {said}");
        }
        Ok(())
    });
}
