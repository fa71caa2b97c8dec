//! How much of an image is fetched for a container's first line of output.

use serde_json::json;
use skimmer_integration::start::Way;

use crate::figure::{Bar, Bench, Figure, Outcome, median, rounded};
use crate::start;

pub const FIGURE: Figure = Figure {
    name: "lazy-bytes",
    what: "indexed, cold cache: bytes fetched until the first line of output ÷ compressed image size",
    unit: "ratio",
    bar: Bar::AtMost(0.30),
    aim: 0.12,
    against: Some("the image's compressed layers"),
    measure,
};

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let (world, indexes) = start::world(bench.scenario)?;
    let whole = world.image.compressed_bytes() as f64;
    let (mut shares, mut runs) = (Vec::new(), Vec::new());
    for run in 0..bench.runs {
        let start = start::cold(&world, Way::Skimmer, &indexes)?;
        let share = start.bytes as f64 / whole;
        eprintln!("  run {} of {}: {share:.3}", run + 1, bench.runs);
        shares.push(share);
        runs.push(
            json!({ "value": rounded(share), "fetched_mb": rounded(start.bytes as f64 / 1e6) }),
        );
    }
    Ok(Outcome { value: median(shares), runs, settings: world.settings()? })
}
