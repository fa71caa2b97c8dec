//! How soon a container says something where the kernel serves layers before they are complete.

use skimmer_integration::skimmerd::MountMode;
use skimmer_integration::start::Way;

use crate::figure::{Bar, Bench, Figure, Outcome};
use crate::pairs::{Sample, compare};
use crate::start;

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
    let (mut world, indexes) = start::world(bench.scenario)?;
    let ways = [(MountMode::Kernel, "kernel"), (MountMode::Auto, "fuse")];
    compare(bench, world.settings()?, ways, |mode| {
        world.mounts = Some(mode);
        let start = start::cold(&world, Way::Skimmer, &indexes)?;
        Ok(Sample {
            value: start.first_line.as_secs_f64(),
            details: vec![
                ("pull_s", start.pull.as_secs_f64()),
                ("fetched_mb", start.bytes as f64 / 1e6),
            ],
        })
    })
}
