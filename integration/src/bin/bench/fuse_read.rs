//! How fast a lazily mounted file is read whose compressed bytes are on this node's disk.

use std::time::Duration;

use skimmer_integration::command;
use skimmer_integration::ctr::Pull;
use skimmer_integration::debian;
use skimmer_integration::skimmerd::MountMode;
use skimmer_integration::start::Way;
use skimmer_integration::world::{World, drop_caches};

use crate::figure::{Bar, Bench, Figure, Outcome};
use crate::pairs::{Sample, alternate};
use crate::read_local;
use crate::running;

pub const FIGURE: Figure = Figure {
    name: "fuse-read",
    what: "layer lazily mounted by FUSE, its blob on disk, nothing decoded: throughput of reading a large file in order ÷ overlayfs's",
    unit: "ratio",
    bar: Bar::AtLeast(0.6),
    aim: 0.9,
    against: Some("containerd overlayfs"),
    measure,
};

const READER: &str = "reader";

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let image = debian::single_layer(&bench.scenario.path("blobs"))?;
    let mut world = World::near(bench.scenario, image)?;
    world.mounts = Some(MountMode::Fuse);
    eprintln!("  building indexes of {}", world.image.name);
    let indexes = world.indexes()?;
    let program = read_local::PROGRAM.replace("FILE", debian::LARGE_FILE);
    alternate(bench, world.settings()?, |way| {
        let node = world.cold_node(Some(&indexes))?;
        // Whole, for either.
        let mut pull = node.skimmerd.skimmer(&["pull", "--full", &world.reference])?;
        command::output_of(&mut pull, Duration::from_secs(300))?;
        node.containerd.pull(&Pull::new(&world.reference, way.snapshotter()))?;
        let command = ["sleep", "1000000"];
        node.containerd.start_image(&world.reference, way.snapshotter(), READER, &command)?;
        if way == Way::Skimmer {
            let images = node.skimmerd.ask(&["status", &world.reference])?;
            let layer = &images[0]["layers"][0];
            anyhow::ensure!(layer["mode"] == "lazy", "the layer is not lazily mounted: {images}");
        }
        drop_caches()?;
        let numbers =
            running::numbers(&node.containerd.exec(READER, &["python3", "-c", &program])?)?;
        let [length, seconds] = numbers[..] else { anyhow::bail!("got {numbers:?}") };
        Ok(Sample {
            value: length / 1e6 / seconds,
            details: vec![("seconds", seconds), ("file_mb", length / 1e6)],
        })
    })
}
