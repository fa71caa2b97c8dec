//! How fast an image that this node has in skimmer's cache is put into containerd's content store.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use skimmer_integration::command::{self, PATIENCE};
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, Layer, noise};
use skimmer_integration::node::Node;
use skimmer_integration::start::Way;
use skimmer_integration::tar::Tar;
use skimmer_integration::world::{World, drop_caches};

use crate::figure::{Bar, Bench, Figure, Outcome};
use crate::pairs::{Sample, alternate};

pub const FIGURE: Figure = Figure {
    name: "adopt",
    what: "image from skimmer's cache into containerd's store, not unpacked ÷ `ctr content fetch` of it over loopback HTTP",
    unit: "ratio",
    bar: Bar::AtMost(0.3),
    aim: 0.1,
    against: Some("ctr content fetch"),
    measure,
};

/// Layers of incompressible bytes: nothing is unpacked, so only their number and length count.
const LAYERS: usize = 6;
const LAYER_BYTES: usize = 56 << 20;

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let world = World::near(bench.scenario, image(bench)?)?;
    let node = world.cold_node(None)?;
    put(&node, &world.reference)?;
    remove(&node, &world)?;
    alternate(bench, world.settings()?, |way| {
        drop_caches()?;
        // The registry's disk is another machine's business.
        for blob in world.image.blobs() {
            std::io::copy(&mut std::fs::File::open(&blob.path)?, &mut std::io::sink())?;
        }
        let start = Instant::now();
        match way {
            Way::Skimmer => put(&node, &world.reference)?,
            Way::Overlayfs => {
                let mut call = node.containerd.ctr()?;
                call.args(["content", "fetch", "--hosts-dir"]).arg(node.containerd.hosts());
                command::output_of(call.arg(&world.reference), PATIENCE)?;
            }
        }
        let took = start.elapsed();
        for layer in &world.image.layers {
            let stored = std::fs::metadata(stored(&node, &layer.blob.digest.hex()))?;
            anyhow::ensure!(stored.len() == layer.blob.size, "{stored:?}");
        }
        remove(&node, &world)?;
        Ok(Sample { value: took.as_secs_f64(), details: Vec::new() })
    })
}

fn image(bench: &Bench<'_>) -> anyhow::Result<Image> {
    let blobs = bench.scenario.path("blobs");
    let layer = |number: usize| {
        let bytes = noise(number as u64 + 1, LAYER_BYTES);
        Layer::of(&Tar::new().file(format!("data-{number}"), &bytes).end(), Format::Gzip, &blobs)
    };
    let layers: anyhow::Result<Vec<Layer>> = (0..LAYERS).map(layer).collect();
    Plan::new("bench/adopt", layers?).build(&blobs)
}

fn put(node: &Node, reference: &str) -> anyhow::Result<()> {
    let call = ["pull", "--full", reference, "--namespace", "default"];
    command::output_of(&mut node.skimmerd.skimmer(&call)?, PATIENCE)?;
    Ok(())
}

/// Has containerd forget the image; skimmer's cache keeps its blobs.
fn remove(node: &Node, world: &World<'_>) -> anyhow::Result<()> {
    for name in node.containerd.images()? {
        node.containerd.remove_image(&name)?;
    }
    for layer in &world.image.layers {
        let stored = stored(node, &layer.blob.digest.hex());
        command::wait_for("containerd collects its garbage", Duration::from_secs(60), || {
            (!stored.exists()).then_some(())
        })?;
    }
    Ok(())
}

fn stored(node: &Node, hex: &str) -> PathBuf {
    node.containerd.root().join("io.containerd.content.v1.content/blobs/sha256").join(hex)
}
