//! Cold starts over a link of 200 Mbit/s.

use std::path::{Path, PathBuf};

use skimmer_integration::debian;
use skimmer_integration::scenario::Scenario;
use skimmer_integration::start::{self, Start, Way};
use skimmer_integration::world::World;

const BITS_PER_SECOND: u64 = 200_000_000;

/// Debian with numpy behind that link, and the indexes of its layers.
pub fn world(scenario: &Scenario) -> anyhow::Result<(World<'_>, PathBuf)> {
    let image = debian::numpy(&scenario.path("blobs"))?;
    let world = World::new(scenario, image, Some(BITS_PER_SECOND))?;
    eprintln!("  building indexes of {}", world.image.name);
    let indexes = world.indexes()?;
    Ok((world, indexes))
}

/// A cold start; skimmer has to do it lazily.
pub fn cold(world: &World<'_>, way: Way, indexes: &Path) -> anyhow::Result<Start> {
    let node = world.cold_node((way == Way::Skimmer).then_some(indexes))?;
    let start = start::measure(world, &node, way)?;
    let whole = world.image.compressed_bytes();
    anyhow::ensure!(
        way == Way::Overlayfs || start.bytes < whole,
        "all {whole} bytes of the layers were fetched: that isn't lazy"
    );
    Ok(start)
}
