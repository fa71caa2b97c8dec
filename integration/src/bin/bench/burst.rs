//! Many nodes that want one image at once: how long it takes, and what the registry sends.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use skimmer_integration::command::PATIENCE;
use skimmer_integration::fleet::{Fleet, NEVER_LAZY, Setup};
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, Layer, noise};
use skimmer_integration::scenario::Scenario;
use skimmer_integration::tar::Tar;
use skimmer_integration::{skimmerd, sweep, switch};
use skimmer_proto::Geometry;

use crate::figure::{Bar, Bench, Figure, Outcome, median, rounded};
use crate::quiet::{Calm, undisturbed};

pub const EIGHT: Figure = Figure {
    name: "burst-8",
    what: "8 nodes × 50 Mbit/s, cold: until the last has every blob, its SHA-256 matched ÷ T*",
    unit: "ratio",
    bar: Bar::AtMost(1.30),
    aim: 1.12,
    against: Some("T* = (F/u)(1 + ⌊log₂N⌋/M), from the shaped rate"),
    measure: |bench| stretch(bench, &OF_EIGHT),
};

pub const SIXTEEN: Figure = Figure {
    name: "burst-16",
    what: "16 nodes × 25 Mbit/s, cold: until the last has every blob, its SHA-256 matched ÷ T*",
    unit: "ratio",
    bar: Bar::AtMost(1.30),
    aim: 1.12,
    against: Some("T* = (F/u)(1 + ⌊log₂N⌋/M), from the shaped rate"),
    measure: |bench| stretch(bench, &OF_SIXTEEN),
};

pub const EGRESS: Figure = Figure {
    name: "origin-egress",
    what: "burst-8 and burst-16: body bytes that the registry sent ÷ image, manifests included",
    unit: "ratio",
    bar: Bar::AtMost(1.03),
    aim: 1.0,
    against: None,
    measure: egress,
};

/// A kind of burst, and its runs so far: they serve two figures.
struct Burst {
    nodes: usize,
    bits_per_second: u64,
    layers: usize,
    layer_bytes: usize,
    runs: Mutex<Vec<Run>>,
}

static OF_EIGHT: Burst = Burst {
    nodes: 8,
    bits_per_second: 50_000_000,
    layers: 4,
    layer_bytes: 16 << 20,
    runs: Mutex::new(Vec::new()),
};

static OF_SIXTEEN: Burst = Burst {
    nodes: 16,
    bits_per_second: 25_000_000,
    layers: 4,
    layer_bytes: 12 << 20,
    runs: Mutex::new(Vec::new()),
};

/// Runs of each burst where only the egress is asked for.
const EGRESS_RUNS: u32 = 2;

/// What plain TCP carries at least where nothing but the shaping limits it, and tries to show it.
const CALIBRATED: f64 = 0.9;
const CALIBRATIONS: u32 = 3;

#[derive(Clone)]
struct Run {
    stretch: f64,
    egress: f64,
    report: Value,
}

/// skimmerd as it comes, but for what a test machine has no use for.
pub fn setup(bits_per_second: u64) -> Setup {
    let skimmerd = skimmerd::Setup {
        min_layer_bytes: 1 << 20,
        background: Some(Duration::from_secs(60)),
        deadline: Duration::from_secs(300),
        ..skimmerd::Setup::default()
    };
    Setup { bits_per_second: Some(bits_per_second), skimmerd, ..Setup::default() }
}

/// An image of as many layers of that length, which don't compress; `salt` makes it differ from others.
pub fn image(scenario: &Scenario, salt: u64, layers: usize, bytes: usize) -> anyhow::Result<Image> {
    let folder = scenario.path("blobs");
    let layer = |number: usize| {
        let tar =
            Tar::new().file(format!("data-{number}"), &noise(salt * 64 + number as u64, bytes));
        Layer::of(&tar.end(), Format::Gzip, &folder)
    };
    let layers: anyhow::Result<Vec<_>> = (0..layers).map(layer).collect();
    Plan::new(&format!("burst/app-{salt}"), layers?).build(&folder)
}

impl Burst {
    /// Measures until there are so many undisturbed runs; returns all, and how many were discarded.
    fn measure(&self, scenario: &Scenario, runs: u32) -> anyhow::Result<(Vec<Run>, u32)> {
        let mut known = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = runs.saturating_sub(u32::try_from(known.len())?);
        let (new, discarded) = undisturbed(missing, || self.once(scenario))?;
        known.extend(new);
        Ok((known.clone(), discarded))
    }

    /// One burst of a fleet of its own.
    fn once(&self, scenario: &Scenario) -> anyhow::Result<(Run, Calm)> {
        let salt = u64::try_from(self.nodes)?;
        let image = image(scenario, salt, self.layers, self.layer_bytes)?;
        // All of it is wanted everywhere, also where two others have read a layer already.
        let mut setup = setup(self.bits_per_second);
        setup.skimmerd.min_layer_bytes = NEVER_LAZY;
        let fleet = fresh_fleet(scenario, || Fleet::of(scenario, setup, self.nodes))?;
        let reference = fleet.registry.add(&image)?;
        let calibration = calibrate(&fleet, self.bits_per_second)?;
        let calm = Calm::begin();
        let took = fleet.build_everywhere(&reference, PATIENCE * 2)?;
        let calm = calm.end();
        fleet.check_blobs(&image, &(0..self.nodes).collect::<Vec<_>>())?;
        fleet.registry.settle()?;
        let whole: u64 = image.blobs().map(|blob| blob.size).sum();
        let egress = fleet.registry.sent_since(0) as f64 / whole as f64;
        let bound = self.bound(&image)?;
        let stretch = took.as_secs_f64() / bound;
        eprintln!(
            "  {} nodes: {:.2} s, {stretch:.3} × T*, egress {egress:.4}, idle {:.0} %",
            self.nodes,
            took.as_secs_f64(),
            calm.idle * 100.0
        );
        let report = json!({
            "value": rounded(stretch), "makespan_s": rounded(took.as_secs_f64()), "bound_s": rounded(bound),
            "egress": rounded(egress), "idle": rounded(calm.idle), "calibration": rounded(calibration),
        });
        Ok((Run { stretch, egress, report }, calm))
    }

    /// T* of DESIGN's control plane section, in seconds.
    fn bound(&self, image: &Image) -> anyhow::Result<f64> {
        let pieces = |size: u64| Geometry::of(size).map(|geometry| u64::from(geometry.pieces()));
        let pieces: Option<u64> = image.layers.iter().map(|layer| pieces(layer.blob.size)).sum();
        let pieces = pieces.context("a layer too long for the geometry")? as f64;
        let copy = image.compressed_bytes() as f64 * 8.0 / self.bits_per_second as f64;
        Ok(copy * (1.0 + f64::from(self.nodes.ilog2()) / pieces))
    }

    fn settings(&self, discarded: u32) -> Value {
        json!({
            "nodes": self.nodes, "link_mbit_s": self.bits_per_second / 1_000_000, "layers": self.layers,
            "layer_bytes": self.layer_bytes, "congestion_control": "cubic", "discarded_runs": discarded,
        })
    }
}

/// What plain TCP around the ring carries on its middle link ÷ the shaped rate, which includes headers.
///
/// # Errors
/// If that is less than [`CALIBRATED`] time after time: then the machine, not the shaping, limits what is measured.
pub fn calibrate(fleet: &Fleet<'_>, bits_per_second: u64) -> anyhow::Result<f64> {
    // For a second.
    let bytes = bits_per_second / 8;
    let mut best = 0.0_f64;
    for _ in 0..CALIBRATIONS {
        let (_, middle) = switch::ring(&fleet.hosts(), bytes)?;
        best = best.max(middle / bits_per_second as f64);
        if best >= CALIBRATED {
            return Ok(best);
        }
    }
    anyhow::bail!("plain TCP carries {best:.3} of the shaped rate: this machine is too busy")
}

/// A fleet whose nodes have seen nothing: what an earlier one left is removed first.
pub fn fresh_fleet<'a>(
    scenario: &'a Scenario,
    make: impl FnOnce() -> anyhow::Result<Fleet<'a>>,
) -> anyhow::Result<Fleet<'a>> {
    for entry in std::fs::read_dir(scenario.folder())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !["blobs", "logs", "hosts"].contains(&name.as_str()) {
            sweep::remove(&path)?;
        }
    }
    for entry in std::fs::read_dir(scenario.logs())? {
        std::fs::remove_file(entry?.path())?;
    }
    make()
}

fn stretch(bench: &Bench<'_>, burst: &Burst) -> anyhow::Result<Outcome> {
    let (runs, discarded) = burst.measure(bench.scenario, bench.runs)?;
    let value = median(runs.iter().map(|run| run.stretch).collect());
    let runs = runs.into_iter().map(|run| run.report).collect();
    Ok(Outcome { value, runs, settings: burst.settings(discarded) })
}

/// The worst of all runs: a promise about each.
fn egress(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let (mut worst, mut reports, mut settings) = (0.0_f64, Vec::new(), Vec::new());
    for burst in [&OF_EIGHT, &OF_SIXTEEN] {
        let (runs, discarded) = burst.measure(bench.scenario, EGRESS_RUNS)?;
        worst = runs.iter().map(|run| run.egress).fold(worst, f64::max);
        reports.extend(runs.into_iter().map(|run| run.report));
        settings.push(burst.settings(discarded));
    }
    Ok(Outcome { value: worst, runs: reports, settings: Value::Array(settings) })
}
