//! How soon a container of an image that isn't here says something.

use crate::figure::{Bar, Bench, Figure, Outcome};
use crate::pairs::{Sample, alternate};
use crate::start;

pub const FIGURE: Figure = Figure {
    name: "lazy-start",
    what: "indexed, cold cache: pull and run to the first line of output ÷ the same with overlayfs",
    unit: "ratio",
    bar: Bar::AtMost(0.35),
    aim: 0.15,
    against: Some("containerd overlayfs, pigz"),
    measure,
};

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let (world, indexes) = start::world(bench.scenario)?;
    alternate(bench, world.settings()?, |way| {
        let start = start::cold(&world, way, &indexes)?;
        Ok(Sample {
            value: start.first_line.as_secs_f64(),
            details: vec![
                ("pull_s", start.pull.as_secs_f64()),
                ("fetched_mb", start.bytes as f64 / 1e6),
            ],
        })
    })
}
