//! Images by digest while the registry is down: manifests and configurations are swarm content too.

use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::wait_for;
use skimmer_integration::ctr::Pull;
use skimmer_integration::fleet::{Fleet, Machine, Setup, Spec};
use skimmer_integration::image::Plan;
use skimmer_integration::layer::Format;
use skimmer_integration::scenario::scenario;

use crate::fixtures::{blobs, busybox, data};

/// For what happens meanwhile, on a busy machine.
const NOTICE: Duration = Duration::from_secs(60);

#[test]
fn an_image_is_pulled_by_digest_while_the_registry_is_down() {
    served_by("swarm-documents", |machine, reference| {
        machine.skimmerd.ask(&["pull", reference, "--namespace", "default"]).map(drop)
    });
}

#[test]
fn what_containerd_pulled_is_there_for_other_nodes_as_well() {
    served_by("swarm-documents-containerd", |machine, reference| {
        let containerd = machine.containerd.as_ref().context("the machine has no containerd")?;
        containerd.pull(&Pull::new(reference, "skimmer")).map(drop)
    });
}

/// The first node pulls an image, the registry goes, the second pulls it by digest.
fn served_by(name: &str, pull: impl Fn(&Machine, &str) -> anyhow::Result<()>) {
    scenario(name, |scenario| {
        let mut fleet = Fleet::start(scenario, Setup::default())?;
        for _ in 0..2 {
            fleet.add(&Spec { containerd: true, ..Spec::default() })?;
        }
        fleet.wait_attending()?;
        let layers = vec![
            busybox(scenario, Format::Gzip)?,
            data(scenario, "documents", 5 << 20, Format::Gzip)?,
        ];
        let mut plan = Plan::new("documents/app", layers);
        plan.index = true;
        let image = plan.build(&blobs(scenario))?;
        let reference = fleet.registry.add(&image)?;
        pull(&fleet.machines[0], &reference)?;

        let (top, _) = image.top();
        let offered: Vec<String> = [top.digest, image.manifest.digest, image.config.digest]
            .into_iter()
            .chain(image.layers.iter().map(|layer| layer.blob.digest))
            .map(|digest| digest.to_string())
            .collect();
        wait_for("documents and layers are offered", NOTICE, || {
            let tasks = fleet.control.ask(&["task", "list"]).ok()?;
            let tasks = tasks.as_array()?;
            let of = |digest: &String| {
                tasks.iter().any(|task| task["digest"] == **digest && task["complete"] != 0)
            };
            offered.iter().all(of).then_some(())
        })?;
        fleet.registry.stop()?;

        let machine = &fleet.machines[1];
        let wanted = format!("{}/documents/app@{}", fleet.registry.address(), top.digest);
        let pulled = machine.skimmerd.ask(&["pull", &wanted, "--namespace", "default"])?;
        let pulled = &pulled["image"];
        assert_eq!(
            (&pulled["origin_bytes"], pulled["swarm_bytes"].as_u64()),
            (&0.into(), Some(image.compressed_bytes()))
        );
        fleet.check_blobs(&image, &[1])?;
        let status = machine.skimmerd.ask(&["status", &wanted])?;
        let layers = status[0]["layers"].as_array().context("no layers are shown")?;
        for layer in layers {
            assert_eq!(layer["fetched"]["origin"], 0, "{layer}");
            assert_eq!(layer["fetched"]["swarm"], layer["size"], "{layer}");
        }
        Ok(())
    });
}
