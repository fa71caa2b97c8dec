//! Getting the whole of an image: in the background, by `skimmer fetch`, with credentials.

use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::{self, wait_for};
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::docker_config;
use skimmer_integration::image::Plan;
use skimmer_integration::layer::Format;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::{Auth, Registry};
use skimmer_integration::scenario::scenario;
use skimmer_integration::skimmerd;
use skimmer_integration::world::drop_caches;

use crate::fixtures::{blobs, busybox, data, md5sum, small};
use crate::indexes;

const LEN: usize = 24 << 20;

/// How often the daemon looks what memory has let go of, and a little.
const LOOK: Duration = Duration::from_secs(11);

/// The image's layers as `skimmer status` reports them.
fn layers(node: &Node, reference: &str) -> anyhow::Result<Vec<serde_json::Value>> {
    let status = node.skimmerd.ask(&["status", reference])?;
    let image = if status.is_array() { status[0].clone() } else { status };
    image["layers"].as_array().cloned().with_context(|| format!("no layers in {image}"))
}

fn modes(node: &Node, reference: &str) -> anyhow::Result<Vec<String>> {
    Ok(layers(node, reference)?
        .iter()
        .map(|l| l["mode"].as_str().unwrap_or_default().to_owned())
        .collect())
}

#[test]
fn lazy_layers_are_completed_in_the_background() {
    scenario("background", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "life/background")?;
        let reference = registry.add(&image)?;
        let background = Some(Duration::from_millis(100));
        let setup = Setup {
            skimmerd: skimmerd::Setup { background, ..Default::default() },
            ..Setup::default()
        };
        let mut node = Node::start_with(scenario, Version::V2, &setup)?;
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        node.containerd.start_image(&reference, "skimmer", "long", &["sleep", "100000"])?;
        wait_for("every layer is local", Duration::from_secs(60), || {
            modes(&node, &reference).ok()?.iter().all(|mode| mode == "local").then_some(())
        })
        .with_context(|| format!("{:?}", layers(&node, &reference)))?;
        node.containerd.remove_container("long")
    });
}

#[test]
fn what_memory_let_go_of_is_cached_once() {
    scenario("direct", |scenario| {
        let registry = Registry::start(scenario)?;
        let layers =
            vec![busybox(scenario, Format::Gzip)?, data(scenario, "direct", LEN, Format::Gzip)?];
        let image = Plan::new("life/direct", layers).build(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        let node = Node::start(scenario, Version::V2)?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        node.containerd.start_image(&reference, "skimmer", "long", &["sleep", "100000"])?;
        let sum = || node.containerd.exec("long", &["md5sum", "/data/direct"]);
        let expected = md5sum(scenario, "direct", LEN)?;
        // Just written: it is read from memory.
        anyhow::ensure!(sum()?.trim() == expected.trim(), "other bytes");
        // Earlier kernels crash of it, or can't.
        if node.skimmerd.log().contains("without a second copy in memory") {
            let digest = image.layers[1].blob.digest.to_string();
            let folder = digest.trim_start_matches("sha256:");
            let file = node.skimmerd.root().join("cache/layers-v1").join(folder).join("data");
            let cached = || -> anyhow::Result<usize> {
                let said = command::run(
                    "fincore",
                    ["-b", "-n", "-o", "RES", &file.display().to_string()],
                )?;
                Ok(said.trim().parse()?)
            };
            wait_for("the kernel reads the data file directly", 4 * LOOK, || {
                drop_caches().ok()?;
                // Whoever looks has to find it gone.
                thread::sleep(LOOK);
                sum().ok()?;
                (cached().ok()? < LEN / 4).then_some(())
            })?;
        }
        anyhow::ensure!(sum()?.trim() == expected.trim(), "other bytes than before");
        node.containerd.remove_container("long")
    });
}

#[test]
fn fetch_completes_an_image() {
    scenario("fetch", |scenario| {
        let mut registry = Registry::start(scenario)?;
        let image = small(scenario, "life/fetch")?;
        let reference = registry.add(&image)?;
        let mut node = Node::start(scenario, Version::V2)?;
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let lazy = modes(&node, &reference)?;
        anyhow::ensure!(
            lazy.iter().all(|mode| mode == "lazy"),
            "modes after a pull with indexes: {lazy:?}"
        );
        node.skimmerd.ask(&["fetch", &reference])?;
        let local = modes(&node, &reference)?;
        anyhow::ensure!(local.iter().all(|mode| mode == "local"), "modes after fetch: {local:?}");
        // A container start never needs the registry for cached content.
        registry.stop()?;
        node.containerd.run_image(
            &reference,
            "skimmer",
            "offline",
            &["md5sum", "/data/life-fetch"],
        )?;
        let images = node.skimmerd.ask(&["images"])?;
        anyhow::ensure!(images.to_string().contains(&reference), "skimmer images shows {images}");
        Ok(())
    });
}

#[test]
fn private_images_are_pulled_with_dockers_credentials() {
    scenario("private", |scenario| {
        let (user, password) = ("tester", "secret");
        for (name, auth) in [
            ("basic", Auth::Basic { user, password }),
            // Tokens that end while a pull goes on.
            ("token", Auth::Token { user, password, lifetime: Duration::from_secs(60) }),
        ] {
            let registry = Registry::start_with(scenario, name, &auth, None)?;
            let image = small(scenario, &format!("private/{name}"))?;
            let reference = registry.add(&image)?;
            let file = scenario.path(&format!("{name}.json"));
            docker_config::log_in(&file, &[registry.address()], user, password)?;
            let setup = Setup {
                name: format!("{name}-"),
                skimmerd: skimmerd::Setup { docker_config: Some(file), ..Default::default() },
                ..Setup::default()
            };
            let node = Node::start_with(scenario, Version::V2, &setup)?;
            node.skimmerd.ask(&["pull", &reference, "--namespace", "default"])?;
            node.containerd.run_image(&reference, "skimmer", name, &["true"])?;
            // The same through containerd, which has its own credentials; ours fetches the layers.
            node.containerd.remove_image(&reference)?;
            node.containerd
                .pull(&Pull { user: Some("tester:secret"), ..Pull::new(&reference, "skimmer") })?;
        }
        Ok(())
    });
}
