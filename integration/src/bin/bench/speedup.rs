//! A burst with skimmer beside the same burst without: every node's containerd pulls at once.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Map, Value, json};
use skimmer_integration::command::{self, PATIENCE, wait_for};
use skimmer_integration::ctr::Pull;
use skimmer_integration::fleet::{Fleet, Machine, NEVER_LAZY, Spec};
use skimmer_integration::image::Image;
use skimmer_integration::scenario::Scenario;
use skimmer_integration::start::Way;
use skimmer_integration::{containerd::Version, debian};

use crate::burst;
use crate::figure::{Bar, Bench, Figure, Outcome, median, rounded};
use crate::quiet::{Calm, undisturbed};

pub const SPEEDUP: Figure = Figure {
    name: "burst-speedup",
    what: "8 nodes × 50 Mbit/s, cold: pull with overlayfs from the registry ÷ pull with skimmer, last node",
    unit: "ratio",
    bar: Bar::AtLeast(5.0),
    aim: 8.0,
    against: Some("containerd overlayfs, registry link shaped as a node's"),
    measure: speedup,
};

pub const LAZY: Figure = Figure {
    name: "swarm-lazy-start",
    what: "8 nodes × 200 Mbit/s, one a seed peer that has the image: pull and run to the first line ÷ overlayfs, last node",
    unit: "ratio",
    bar: Bar::AtMost(0.35),
    aim: 0.12,
    against: Some("containerd overlayfs, registry link shaped as a node's"),
    measure: lazy_start,
};

const NODES: usize = 8;
const BITS_PER_SECOND: u64 = 50_000_000;
/// What the registry sends to all nodes, one after another, takes long.
const LAYERS: usize = 4;
const LAYER_BYTES: usize = 6 << 20;
const LAZY_BITS_PER_SECOND: u64 = 200_000_000;

fn speedup(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let (scenario, mut salt) = (bench.scenario, 1_000);
    pairs(bench, BITS_PER_SECOND, |way| {
        salt += 1;
        let image = burst::image(scenario, salt, LAYERS, LAYER_BYTES)?;
        let fleet = burst::fresh_fleet(scenario, || fleet(scenario, BITS_PER_SECOND, false))?;
        let reference = fleet.registry.add(&image)?;
        burst::calibrate(&fleet, BITS_PER_SECOND)?;
        all_at_once(&fleet.machines, |_, machine| {
            machine.containerd()?.pull(&Pull::new(&reference, way.snapshotter()))?;
            if way == Way::Skimmer {
                wait_local(machine, &reference)?;
            }
            Ok(())
        })
    })
    .map(|pairs| pairs.outcome(|ours, theirs| theirs / ours))
}

fn lazy_start(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let scenario = bench.scenario;
    let image = debian::numpy(&scenario.path("blobs"))?;
    pairs(bench, LAZY_BITS_PER_SECOND, |way| {
        let fleet = burst::fresh_fleet(scenario, || fleet(scenario, LAZY_BITS_PER_SECOND, true))?;
        let reference = fleet.registry.add(&image)?;
        burst::calibrate(&fleet, LAZY_BITS_PER_SECOND)?;
        let (seed, others) = fleet.machines.split_first().context("a fleet of nobody")?;
        if way == Way::Skimmer {
            seed.build(&reference)?.wait(PATIENCE * 2)?;
            is_offered(&image, others, &fleet)?;
        }
        all_at_once(others, |number, machine| {
            let containerd = machine.containerd()?;
            containerd.pull(&Pull::new(&reference, way.snapshotter()))?;
            let id = format!("first-{number}");
            let line =
                containerd.first_line(&reference, way.snapshotter(), &id, &debian::COMMAND)?;
            anyhow::ensure!(line.text == "1", "a container printed {:?}", line.text);
            let modes = machine.skimmerd.modes(&reference);
            let lazy = way == Way::Overlayfs || modes?.iter().any(|mode| mode == "lazy");
            anyhow::ensure!(lazy, "a node read the image whole");
            Ok(())
        })
    })
    .map(|pairs| pairs.outcome(|ours, theirs| ours / theirs))
}

/// Both ways, measured by turns.
struct Pairs {
    ours: Vec<f64>,
    theirs: Vec<f64>,
    runs: Vec<Value>,
    settings: Value,
}

impl Pairs {
    fn outcome(self, value: impl Fn(f64, f64) -> f64) -> Outcome {
        let (ours, theirs) = (median(self.ours), median(self.theirs));
        let mut settings = self.settings;
        settings["medians"] = json!({ "skimmer": rounded(ours), "overlayfs": rounded(theirs) });
        Outcome { value: value(ours, theirs), runs: self.runs, settings }
    }
}

fn pairs(
    bench: &Bench<'_>,
    bits_per_second: u64,
    mut measure: impl FnMut(Way) -> anyhow::Result<(Duration, Calm)>,
) -> anyhow::Result<Pairs> {
    let (runs, discarded) = undisturbed(bench.runs, || {
        let (mut pair, mut calm) = (Map::new(), Calm { idle: 1.0 });
        for way in [Way::Skimmer, Way::Overlayfs] {
            let (took, during) = measure(way)?;
            let took = took.as_secs_f64();
            eprintln!("  {}: {took:.2} s, idle {:.0} %", way.snapshotter(), during.idle * 100.0);
            pair.insert(way.snapshotter().into(), rounded(took).into());
            calm.idle = calm.idle.min(during.idle);
        }
        Ok((pair, calm))
    })?;
    let of = |way: Way| {
        runs.iter().filter_map(|pair| pair[way.snapshotter()].as_f64()).collect::<Vec<f64>>()
    };
    let (ours, theirs) = (of(Way::Skimmer), of(Way::Overlayfs));
    let settings = json!({
        "nodes": NODES, "link_mbit_s": bits_per_second / 1_000_000, "congestion_control": "cubic",
        "containerd": Version::V2.number()?, "discarded_runs": discarded,
    });
    Ok(Pairs { ours, theirs, runs: runs.into_iter().map(Value::Object).collect(), settings })
}

/// Nodes with a containerd each, the first a seed peer if wanted.
fn fleet(scenario: &Scenario, bits_per_second: u64, seed: bool) -> anyhow::Result<Fleet<'_>> {
    let mut setup = burst::setup(bits_per_second);
    if !seed {
        setup.skimmerd.min_layer_bytes = NEVER_LAZY;
    }
    let mut fleet = Fleet::start(scenario, setup)?;
    for number in 0..NODES {
        let first = seed && number == 0;
        let role = if first { "seed" } else { "peer" };
        fleet.add(&Spec { role, containerd: !first, ..Spec::default() })?;
    }
    fleet.wait_attending()?;
    Ok(fleet)
}

/// Does `work` on every machine; returns how long the last one took.
fn all_at_once(
    machines: &[Machine],
    work: impl Fn(usize, &Machine) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<(Duration, Calm)> {
    let (start, calm, work) = (Instant::now(), Calm::begin(), &work);
    std::thread::scope(|scope| {
        let threads: Vec<_> = machines
            .iter()
            .enumerate()
            .map(|(number, machine)| scope.spawn(move || work(number, machine)))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("panicked"))?)
    })?;
    Ok((start.elapsed(), calm.end()))
}

fn wait_local(machine: &Machine, reference: &str) -> anyhow::Result<()> {
    wait_for("every layer is local", PATIENCE, || {
        machine.skimmerd.modes(reference).ok()?.iter().all(|mode| mode == "local").then_some(())
    })
}

/// Waits until the seed peer has told the scheduler of the whole image.
fn is_offered(image: &Image, others: &[Machine], fleet: &Fleet<'_>) -> anyhow::Result<()> {
    anyhow::ensure!(!others.is_empty(), "nobody to offer it to");
    for layer in &image.layers {
        let digest = layer.blob.digest.to_string();
        wait_for("the seed peer offers the image", PATIENCE, || {
            let mut call = fleet.control.skimmer(&["task", "show", &digest]).ok()?;
            let shown = command::output_of(&mut call, PATIENCE).ok()?;
            let shown: Value = serde_json::from_str(&shown).ok()?;
            (shown["complete"].as_u64()? >= 1).then_some(())
        })?;
    }
    Ok(())
}
