//! What skimmerd takes of a node's memory at most while it has much to do.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use skimmer_integration::ctr::Pull;
use skimmer_integration::debian;
use skimmer_integration::world::World;

use crate::figure::{Bar, Bench, Figure, Outcome, median, rounded};
use crate::idle_memory::{fuse_mounts, status_mib};

pub const FIGURE: Figure = Figure {
    name: "busy-memory",
    what: "peak resident memory of skimmerd, 200 layers lazily mounted, 8 readers of all files at once, layers being completed meanwhile",
    unit: "MiB",
    bar: Bar::AtMost(256.0),
    aim: 120.0,
    against: None,
    measure,
};

/// How many layers are mounted.
const LAYERS: usize = 200;

const READERS: usize = 8;

/// After so long layers are completed.
const DELAY: Duration = Duration::from_secs(2);

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let image = debian::many_layers(&bench.scenario.path("blobs"), LAYERS)?;
    let mut world = World::near(bench.scenario, image)?;
    eprintln!("  building indexes of {}", world.image.name);
    let indexes = world.indexes()?;
    world.min_layer_bytes = 0;
    world.background = Some(DELAY);
    let (mut values, mut runs) = (Vec::new(), Vec::new());
    for run in 0..bench.runs {
        let node = world.cold_node(Some(&indexes))?;
        node.containerd.pull(&Pull::new(&world.reference, "skimmer"))?;
        let command = ["sleep", "1000000"];
        node.containerd.start_image(&world.reference, "skimmer", "busy", &command)?;
        let mounts = fuse_mounts(&node);
        anyhow::ensure!(mounts >= LAYERS, "only {mounts} layers are mounted");
        let status = node.skimmerd.ask(&["status", &world.reference])?;
        let layers = status[0]["layers"].as_array().context("no layers are shown")?;
        let lazy = layers.iter().filter(|layer| layer["mode"] == "lazy").count();
        anyhow::ensure!(lazy == LAYERS, "only {lazy} layers are lazy");
        let start = Instant::now();
        // Layer by layer: an overlay of so many has names too long for mount(8).
        let bytes = read_all(&node.skimmerd.root().join("snapshots/m"))?;
        let seconds = start.elapsed().as_secs_f64();
        let peak = status_mib(&node, "VmHWM:")?;
        let (after, anonymous) = (status_mib(&node, "VmRSS:")?, status_mib(&node, "RssAnon:")?);
        eprintln!("  run {} of {}: {peak:.1} MiB", run + 1, bench.runs);
        values.push(peak);
        runs.push(json!({
            "value": rounded(peak), "after_mib": rounded(after), "anonymous_after_mib": rounded(anonymous),
            "mounts": mounts, "read_mb": rounded(bytes as f64 / 1e6), "seconds": rounded(seconds),
        }));
    }
    Ok(Outcome { value: median(values), runs, settings: world.settings()? })
}

/// Has [`READERS`] threads read every file below `root`, each a part of them; how many bytes these are.
fn read_all(root: &Path) -> anyhow::Result<u64> {
    let files = files(root)?;
    let read = |reader: usize| -> anyhow::Result<u64> {
        let mut bytes = 0;
        for file in files.iter().skip(reader).step_by(READERS) {
            let mut open = File::open(file).with_context(|| format!("open {}", file.display()))?;
            bytes += std::io::copy(&mut open, &mut std::io::sink())
                .with_context(|| format!("read {}", file.display()))?;
        }
        Ok(bytes)
    };
    thread::scope(|scope| {
        let read = &read;
        let readers: Vec<_> =
            (0..READERS).map(|reader| scope.spawn(move || read(reader))).collect();
        readers
            .into_iter()
            .map(|reader| reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?)
            .sum()
    })
}

/// The files below `root`, links not followed.
fn files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let (mut found, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}
