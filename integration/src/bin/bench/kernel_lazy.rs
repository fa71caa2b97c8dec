//! How soon a container says something where the kernel serves layers before they are complete.

use skimmer_integration::node::Node;
use skimmer_integration::skimmerd::MountMode;
use skimmer_integration::start::{self, Way};

use crate::figure::{Bar, Bench, Figure, Outcome};
use crate::pairs::{Sample, compare};
use crate::start::world;

pub const FIGURE: Figure = Figure {
    name: "kernel-lazy-start",
    what: "lazy-start, incomplete layers served by the kernel ÷ the same by FUSE",
    unit: "ratio",
    bar: Bar::AtMost(1.0),
    aim: 0.8,
    against: Some("skimmer with FUSE"),
    measure,
};

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let (mut world, indexes) = world(bench.scenario)?;
    let ways = [(MountMode::Kernel, "kernel"), (MountMode::Auto, "fuse")];
    let settings = world.settings()?;
    compare(bench, settings, ways.map(|(mode, name)| ((mode, name), name)), |(mode, server)| {
        world.mounts = Some(mode);
        let node = world.cold_node(Some(&indexes))?;
        let start = start::measure(&world, &node, Way::Skimmer)?;
        check(&node, &world.reference, server)?;
        Ok(Sample {
            value: start.first_line.as_secs_f64(),
            details: vec![
                ("pull_s", start.pull.as_secs_f64()),
                ("fetched_mb", start.bytes as f64 / 1e6),
            ],
        })
    })
}

/// The image has incomplete layers, and all of them are served by whom it is about.
fn check(node: &Node, reference: &str, server: &str) -> anyhow::Result<()> {
    let images = node.skimmerd.ask(&["status", reference])?;
    let layers = images[0]["layers"].as_array().cloned().unwrap_or_default();
    let lazy: Vec<_> = layers.iter().filter(|layer| layer["mode"] == "lazy").collect();
    anyhow::ensure!(!lazy.is_empty(), "no layer is incomplete: {images}");
    anyhow::ensure!(
        lazy.iter().all(|layer| layer["server"] == server),
        "not all incomplete layers are served by {server}: {images}"
    );
    Ok(())
}
