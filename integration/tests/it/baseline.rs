//! The harness itself, with containerd's own overlayfs: whatever fails here is no fault of skimmer.

use std::time::{Duration, Instant};

use skimmer_integration::containerd::{Containerd, Setup, VERSIONS, Version};
use skimmer_integration::cri::Cri;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::Plan;
use skimmer_integration::layer::Format;
use skimmer_integration::network::Host;
use skimmer_integration::registry::{Auth, Registry};
use skimmer_integration::scenario::scenario;
use skimmer_integration::snapshots::Snapshots;
use skimmer_integration::tree;

use crate::fixtures::{blobs, busybox, data, mount_point, small};

#[test]
fn every_containerd_pulls_and_runs() {
    scenario("baseline-run", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "baseline/run")?;
        let reference = registry.add(&image)?;
        for (number, version) in VERSIONS.into_iter().enumerate() {
            let containerd = Containerd::start_with(
                scenario,
                &format!("c{number}"),
                version,
                &Setup::default(),
            )?;
            containerd.pull(&Pull::new(&reference, "overlayfs"))?;
            let output =
                containerd.run_image(&reference, "overlayfs", "hello", &["echo", "hello"])?;
            assert_eq!(output, "hello\n", "{version:?}");
            let expected = image.compressed_bytes() * (number as u64 + 1);
            assert_eq!(
                registry.sent_of(&image).bytes,
                expected,
                "{version:?} fetches everything once"
            );
        }
        Ok(())
    });
}

#[test]
fn overlayfs_shows_what_umoci_unpacks() {
    scenario("baseline-tree", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "baseline/tree")?;
        let reference = registry.add(&image)?;
        let expected = tree::read(&image.unpack(&scenario.path("umoci"))?)?;
        let containerd = Containerd::start(scenario, Version::V2)?;
        containerd.pull(&Pull::new(&reference, "overlayfs"))?;
        let chains = image.chain_ids();
        let snapshots = Snapshots::connect(&containerd.address(), "overlayfs")?;
        let view = snapshots
            .view(chains.last().map_or("", String::as_str), &mount_point(scenario, "view"))?;
        let mut actual = tree::read(view.path())?;
        // The root has no entry in the layers.
        actual.insert(Vec::new(), expected[&Vec::new()].clone());
        assert_eq!(tree::differences(&expected, &actual), Vec::<String>::new());
        Ok(())
    });
}

#[test]
fn every_containerd_pulls_and_runs_a_pod_through_cri() {
    scenario("baseline-cri", |scenario| {
        let registry = Registry::start(scenario)?;
        let reference = registry.add(&small(scenario, "baseline/cri")?)?;
        let pause = registry.add(&crate::fixtures::pause(scenario)?)?;
        for (number, version) in VERSIONS.into_iter().enumerate() {
            let setup = Setup { pause_image: Some(pause.clone()), ..Setup::default() };
            let containerd =
                Containerd::start_with(scenario, &format!("c{number}"), version, &setup)?;
            let mut cri = Cri::connect(&containerd.address())?;
            cri.pull(&reference, None)?;
            let pod = cri.run_pod("baseline", &scenario.path("pods"))?;
            let container = cri.start(&pod, &reference, &["sleep", "1000"])?;
            assert_eq!(cri.exec(&container, &["echo", "hello"])?, "hello\n", "{version:?}");
            cri.remove_pod(&pod)?;
            cri.remove_image(&reference)?;
        }
        Ok(())
    });
}

#[test]
fn registries_ask_for_credentials() {
    scenario("baseline-auth", |scenario| {
        let (user, password) = ("tester", "secret");
        let lifetime = Duration::from_secs(60);
        let image = small(scenario, "private/image")?;
        let containerd = Containerd::start(scenario, Version::V2)?;
        for (name, auth) in [
            ("basic", Auth::Basic { user, password }),
            ("token", Auth::Token { user, password, lifetime }),
        ] {
            let registry = Registry::start_with(scenario, name, &auth, None)?;
            let reference = registry.add(&image)?;
            containerd.pull_fails(&Pull::new(&reference, "overlayfs"))?;
            containerd.pull(&Pull {
                user: Some("tester:secret"),
                ..Pull::new(&reference, "overlayfs")
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_shaped_link_is_slow() {
    scenario("baseline-link", |scenario| {
        let host = Host::new(Some(40_000_000))?;
        let registry = Registry::start_with(scenario, "registry", &Auth::Anyone, Some(&host))?;
        let layers = vec![
            busybox(scenario, Format::Plain)?,
            data(scenario, "blob", 5_000_000, Format::Plain)?,
        ];
        let reference = registry.add(&Plan::new("far/away", layers).build(&blobs(scenario))?)?;
        let containerd = Containerd::start(scenario, Version::V2)?;
        let start = Instant::now();
        containerd.pull(&Pull::new(&reference, "overlayfs"))?;
        // 7 MB at 5 MB/s
        assert!(start.elapsed() > Duration::from_millis(1000), "took {:?}", start.elapsed());
        Ok(())
    });
}
