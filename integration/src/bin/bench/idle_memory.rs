//! What skimmerd takes of a node's memory while it has nothing to do.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use skimmer_integration::ctr::Pull;
use skimmer_integration::debian;
use skimmer_integration::node::Node;
use skimmer_integration::world::World;

use crate::figure::{Bar, Bench, Figure, Outcome, median, rounded};

pub const FIGURE: Figure = Figure {
    name: "idle-memory",
    what: "resident memory of skimmerd, 50 layers lazily mounted and one container running, idle",
    unit: "MiB",
    bar: Bar::AtMost(80.0),
    aim: 40.0,
    against: None,
    measure,
};

/// How many layers are mounted.
const LAYERS: usize = 50;

/// Idle is: no change for this long.
const STEADY: Duration = Duration::from_secs(3);

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let image = debian::many_layers(&bench.scenario.path("blobs"), LAYERS)?;
    let world = World::near(bench.scenario, image)?;
    eprintln!("  building indexes of {}", world.image.name);
    let indexes = world.indexes()?;
    let (mut values, mut runs) = (Vec::new(), Vec::new());
    for run in 0..bench.runs {
        let node = world.cold_node(Some(&indexes))?;
        node.containerd.pull(&Pull::new(&world.reference, "skimmer"))?;
        let command = ["sleep", "1000000"];
        node.containerd.start_image(&world.reference, "skimmer", "idle", &command)?;
        let mounts = fuse_mounts(&node);
        anyhow::ensure!(mounts >= LAYERS, "only {mounts} layers are mounted");
        let (resident, anonymous) = steady(&node)?;
        eprintln!("  run {} of {}: {resident:.1} MiB", run + 1, bench.runs);
        values.push(resident);
        runs.push(json!({ "value": rounded(resident), "anonymous_mib": rounded(anonymous), "mounts": mounts }));
    }
    Ok(Outcome { value: median(values), runs, settings: world.settings()? })
}

/// Layers of this node that are mounted.
pub fn fuse_mounts(node: &Node) -> usize {
    let folder = node.skimmerd.root().join("snapshots/m");
    skimmer_integration::mounts::below(&folder).len()
}

/// Resident and anonymous memory in MiB, once it changes no more.
fn steady(node: &Node) -> anyhow::Result<(f64, f64)> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let (mut last, mut since) = (memory(node)?, Instant::now());
    while since.elapsed() < STEADY {
        anyhow::ensure!(Instant::now() < deadline, "skimmerd's memory never settles");
        std::thread::sleep(Duration::from_millis(200));
        let now = memory(node)?;
        if (now.0 - last.0).abs() > 0.25 {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(last)
}

fn memory(node: &Node) -> anyhow::Result<(f64, f64)> {
    Ok((status_mib(node, "VmRSS:")?, status_mib(node, "RssAnon:")?))
}

/// The line `name` of skimmerd's `/proc/pid/status` (proc(5)), in MiB.
pub fn status_mib(node: &Node, name: &str) -> anyhow::Result<f64> {
    let process = node.skimmerd.id().context("skimmerd doesn't run")?;
    let text = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = text.lines().find(|line| line.starts_with(name));
    let words = line.and_then(|line| line.split_ascii_whitespace().nth(1));
    let kib: f64 = words.with_context(|| format!("no {name} of skimmerd"))?.parse()?;
    Ok(kib / 1024.0)
}
