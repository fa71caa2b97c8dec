//! How fast an image is pulled whose layers nobody has indexed.

use std::time::Instant;

use serde_json::Value;
use skimmer_integration::ctr::Pull;
use skimmer_integration::debian;
use skimmer_integration::node::Node;
use skimmer_integration::start::Way;
use skimmer_integration::world::World;

use crate::figure::{Bar, Bench, Figure, Outcome};
use crate::pairs::{Sample, alternate};

pub const FIGURE: Figure = Figure {
    name: "pull-through",
    what: "no index, unshaped: pull until every layer is local and proved ÷ overlayfs's pull and unpack",
    unit: "ratio",
    bar: Bar::AtMost(0.7),
    aim: 0.45,
    against: Some("containerd overlayfs, pigz"),
    measure,
};

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let image = debian::numpy(&bench.scenario.path("blobs"))?;
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
