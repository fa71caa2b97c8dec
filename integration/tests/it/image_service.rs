//! CRI's image service at skimmerd, through the real `crictl`: its credentials, and blobs straight into containerd.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use skimmer_integration::containerd::{VERSIONS, Version};
use skimmer_integration::crictl::Crictl;
use skimmer_integration::http;
use skimmer_integration::image::Plan;
use skimmer_integration::layer::Format;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{self, ImageService};

use crate::credentials::{PASSWORD, USER, basic, nowhere, token};
use crate::fixtures::{blobs, busybox, data, md5sum, pause, small};
use crate::indexes;

const TOKENS: Duration = Duration::from_secs(60);

/// A node whose image service is skimmerd's.
fn node(
    scenario: &Scenario,
    version: Version,
    registry: &Registry,
    images: ImageService,
) -> anyhow::Result<Node> {
    let skimmerd = skimmerd::Setup {
        metrics: http::free_address()?,
        log_level: "trace",
        images: Some(images),
        holder: true,
        ..skimmerd::Setup::default()
    };
    let setup = Setup {
        skimmerd,
        pause_image: Some(registry.add(&pause(scenario)?)?),
        annotations: !images.full,
        plain_pods: images.full,
        ..Setup::default()
    };
    Node::start_with(scenario, version, &setup)
}

fn crictl(node: &Node) -> anyhow::Result<Option<Crictl>> {
    Crictl::new(&node.containerd.address(), &node.skimmerd.images())
}

#[test]
fn a_private_image_is_read_lazily_with_the_credentials_of_its_pull() {
    for (version, auth) in VERSIONS.into_iter().zip([basic(), token(TOKENS), basic()]) {
        scenario(&format!("image-service-{version:?}"), |scenario| {
            let open = Registry::start(scenario)?;
            let registry = Registry::start_with(scenario, "private", &auth, None)?;
            let image = small(scenario, "private/app")?;
            let reference = registry.add(&image)?;
            let learned = open.add(&image)?;
            let mut node = node(scenario, version, &open, ImageService::default())?;
            let Some(crictl) = crictl(&node)? else { return Ok(()) };
            indexes::learn(scenario, &mut node, &[(&image, &learned)])?;

            let wrong = format!("{USER}:of-yesterday");
            let said = crictl.failure(&["pull", "--creds", &wrong, &reference])?;
            anyhow::ensure!(said.contains("401"), "crictl said {said}");
            let encoded = STANDARD.encode(format!("{USER}:{PASSWORD}"));
            crictl.call(&["pull", "--auth", &encoded, &reference])?;
            let data = image.layers[1].blob.digest;
            let before = registry.sent(&data).bytes;
            anyhow::ensure!(before < 1 << 20, "{before} bytes of the data were fetched");

            // What others get wrong is nothing to those who got it right.
            crictl.failure(&["pull", "--creds", &wrong, &reference])?;
            let running = crictl.run(scenario, &reference)?;
            // Nor are they lost with the process that was told.
            node.skimmerd.kill()?;
            node.skimmerd.run()?;
            let sum = crictl.exec(&running, &["md5sum", "/data/private-app"])?;
            let expected = md5sum(scenario, "private-app", 8 << 20)?;
            anyhow::ensure!(sum == expected.trim(), "md5sum said {sum:?}");
            registry.settle()?;
            let sent = registry.sent(&data);
            anyhow::ensure!(sent.bytes == sent.by_daemon && sent.bytes > 8 << 20, "{sent:?}");
            crictl.remove(&running)?;

            let images = crictl.call(&["images"])?;
            anyhow::ensure!(images.contains("private/app"), "crictl images: {images}");
            let inspected = crictl.call(&["inspecti", &reference])?;
            anyhow::ensure!(inspected.contains(&reference), "crictl inspecti: {inspected}");
            let usage = crictl.call(&["imagefsinfo"])?;
            anyhow::ensure!(usage.contains("usedBytes"), "crictl imagefsinfo: {usage}");
            crictl.call(&["rmi", &reference])?;
            let images = crictl.call(&["images"])?;
            anyhow::ensure!(!images.contains("private/app"), "crictl images: {images}");
            nowhere(&node, &[PASSWORD, "of-yesterday", &encoded])
        });
    }
}

#[test]
fn with_full_pulls_containerd_asks_the_registry_for_one_head() {
    for version in VERSIONS {
        scenario(&format!("image-service-full-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let layers = vec![
                busybox(scenario, Format::Gzip)?,
                data(scenario, "images-full", 8 << 20, Format::Zstd)?,
            ];
            let mut plan = Plan::new("images/full", layers);
            plan.index = true;
            let image = plan.build(&blobs(scenario))?;
            let reference = registry.add(&image)?;
            let node = node(scenario, version, &registry, ImageService::FULL)?;
            let Some(crictl) = crictl(&node)? else { return Ok(()) };

            crictl.call(&["pull", &reference])?;
            registry.settle()?;
            let asked = registry.asked_by_containerd(0);
            anyhow::ensure!(asked.len() == 1 && asked[0].0 == "HEAD", "{asked:?}");
            let sent = registry.sent_of(&image);
            anyhow::ensure!(sent.bytes == image.compressed_bytes(), "{sent:?}");
            let running = crictl.run(scenario, &reference)?;
            let output = crictl.exec(&running, &["echo", "hello"])?;
            anyhow::ensure!(output == "hello", "the container said {output:?}");
            crictl.remove(&running)
        });
    }
}

#[test]
fn with_full_pulls_a_private_images_blobs_are_fetched_by_skimmerd_alone() {
    scenario("image-service-full-private", |scenario| {
        let open = Registry::start(scenario)?;
        let registry = Registry::start_with(scenario, "private", &basic(), None)?;
        let image = small(scenario, "private/full")?;
        let reference = registry.add(&image)?;
        let node = node(scenario, Version::V1_7, &open, ImageService::FULL)?;
        let Some(crictl) = crictl(&node)? else { return Ok(()) };
        let creds = format!("{USER}:{PASSWORD}");
        crictl.call(&["pull", "--creds", &creds, &reference])?;
        registry.settle()?;
        let asked = registry.asked_by_containerd(0);
        anyhow::ensure!(asked.iter().all(|(method, _)| method == "HEAD"), "{asked:?}");
        nowhere(&node, &[PASSWORD])
    });
}

#[test]
fn what_skimmerd_cannot_do_never_fails_a_pull() {
    scenario("image-service-without", |scenario| {
        let open = Registry::start(scenario)?;
        let registry = Registry::start_with(scenario, "private", &basic(), None)?;
        let image = small(scenario, "private/forgotten")?;
        let reference = registry.add(&image)?;
        // It can't get the blobs without the credentials.
        let forgetful = ImageService { remembers: false, ..ImageService::FULL };
        let mut node = node(scenario, Version::V1_7, &open, forgetful)?;
        let Some(crictl) = crictl(&node)? else { return Ok(()) };
        let creds = format!("{USER}:{PASSWORD}");
        crictl.call(&["pull", "--creds", &creds, &reference])?;
        registry.settle()?;
        let sent = registry.sent_of(&image);
        anyhow::ensure!((sent.bytes, sent.by_daemon) == (image.compressed_bytes(), 0), "{sent:?}");
        let log = node.skimmerd.log();
        anyhow::ensure!(log.contains("containerd gets the blobs"), "the log doesn't say why");
        // A socket that a killed process left is no hindrance.
        node.skimmerd.kill()?;
        node.skimmerd.run()?;
        crictl.call(&["pull", "--creds", &creds, &reference])?;
        Ok(())
    });
}
