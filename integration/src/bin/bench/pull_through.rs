//! How fast an image is pulled whose layers nobody has indexed.

use std::time::Instant;

use serde_json::Value;
use skimmer_integration::ctr::Pull;
use skimmer_integration::debian;
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, Layer, noise};
use skimmer_integration::node::Node;
use skimmer_integration::scenario::Scenario;
use skimmer_integration::start::Way;
use skimmer_integration::tar::Tar;
use skimmer_integration::world::World;

use crate::figure::{Bar, Bench, Figure, Outcome};
use crate::pairs::{Sample, alternate};

const AGAINST: Option<&str> = Some("containerd overlayfs, pigz");

pub const FIGURE: Figure = Figure {
    name: "pull-through",
    what: "no index, unshaped: pull until every layer is local and proved ÷ overlayfs's pull and unpack",
    unit: "ratio",
    bar: Bar::AtMost(0.7),
    aim: 0.45,
    against: AGAINST,
    measure: |bench| measure(bench, debian::numpy(&bench.scenario.path("blobs"))?),
};

pub const SMALL: Figure = Figure {
    name: "pull-through-small",
    what: "the same of an image of 30,000 small files",
    unit: "ratio",
    bar: Bar::AtMost(0.6),
    aim: 0.4,
    against: AGAINST,
    measure: |bench| measure(bench, image(bench.scenario, "small", 30_000, 4 << 10)?),
};

pub const LARGE: Figure = Figure {
    name: "pull-through-large",
    what: "the same of an image of a few large files",
    unit: "ratio",
    bar: Bar::AtMost(0.6),
    aim: 0.4,
    against: AGAINST,
    measure: |bench| measure(bench, image(bench.scenario, "large", 6, 64 << 20)?),
};

/// Layers of the images that are made here.
const LAYERS: usize = 3;

/// An image of so many files, 100 to a folder, of the same length; they compress to about half.
fn image(
    scenario: &Scenario,
    name: &str,
    files: usize,
    file_bytes: usize,
) -> anyhow::Result<Image> {
    let blobs = scenario.path("blobs");
    let mut layers = Vec::new();
    for layer in 0..LAYERS {
        let mut tar = Tar::new();
        for file in (layer..files).step_by(LAYERS) {
            let bytes: Vec<u8> =
                noise(file as u64, file_bytes).iter().map(|byte| b'a' + (byte & 15)).collect();
            tar = tar.file(format!("data/{}/{file}", file / 100), &bytes);
        }
        layers.push(Layer::of(&tar.end(), Format::Gzip, &blobs)?);
    }
    Plan::new(&format!("files/{name}"), layers).build(&blobs)
}

fn measure(bench: &Bench<'_>, image: Image) -> anyhow::Result<Outcome> {
    let world = World::near(bench.scenario, image)?;
    alternate(bench, world.settings()?, |way| {
        let node = world.cold_node(None)?;
        let start = Instant::now();
        node.containerd.pull(&Pull::new(&world.reference, way.snapshotter()))?;
        let took = start.elapsed();
        if way == Way::Skimmer {
            all_local(&node, &world.reference)?;
        }
        Ok(Sample { value: took.as_secs_f64(), details: Vec::new() })
    })
}

/// Makes sure that the pull didn't end before the layers were here.
fn all_local(node: &Node, reference: &str) -> anyhow::Result<()> {
    let status = node.skimmerd.ask(&["status", reference])?;
    let layers: Vec<&Value> = status
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|image| image["layers"].as_array())
        .flatten()
        .collect();
    let local = layers.iter().all(|layer| layer["mode"] == "local");
    anyhow::ensure!(
        local && !layers.is_empty(),
        "after the pull, not every layer is local: {status}"
    );
    Ok(())
}
