//! How big indexes are.

use serde_json::json;
use skimmer_integration::skimmerd::index_file;
use skimmer_integration::world::World;
use skimmer_integration::{debian, sweep};

use crate::figure::{Bar, Bench, Figure, Outcome, rounded};

pub const FIGURE: Figure = Figure {
    name: "index-size",
    what: "index and piece table of an image's layers ÷ their compressed blobs; the larger of two images",
    unit: "ratio",
    bar: Bar::AtMost(0.035),
    aim: 0.02,
    against: Some("the compressed blobs"),
    measure,
};

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let blobs = bench.scenario.path("blobs");
    let (mut shares, mut runs, mut settings) = (Vec::new(), Vec::new(), Vec::new());
    for image in [debian::numpy(&blobs)?, debian::single_layer(&blobs)?] {
        let world = World::near(bench.scenario, image)?;
        eprintln!("  building indexes of {}", world.image.name);
        let indexes = world.indexes()?;
        let (mut all, mut of_layers) = (0, Vec::new());
        for layer in &world.image.layers {
            let size = std::fs::metadata(index_file(&indexes, &layer.blob.digest))?.len();
            all += size;
            of_layers.push(json!({ "index_bytes": size, "blob_bytes": layer.blob.size }));
        }
        let share = all as f64 / world.image.compressed_bytes() as f64;
        eprintln!("  {}: {share:.4}", world.image.name);
        shares.push(share);
        runs.push(json!({ "value": (share * 1e5).round() / 1e5, "image": world.image.name, "layers": of_layers }));
        settings.push(world.settings()?);
        sweep::remove(&indexes)?;
    }
    let value = shares.into_iter().fold(0.0, f64::max);
    Ok(Outcome { value: rounded(value), runs, settings: settings.into() })
}
