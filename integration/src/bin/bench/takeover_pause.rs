//! How long a reader stands still when its daemon is killed and started again at once.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::debian;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::skimmerd;
use skimmer_integration::world::drop_caches;

use crate::figure::{Bar, Bench, Figure, Outcome, rounded};

pub const FIGURE: Figure = Figure {
    name: "takeover-pause",
    what: "`kill -9` and a new start while a file is read through FUSE: longest pause between two reads, p99 of all kills",
    unit: "s",
    bar: Bar::AtMost(2.0),
    aim: 0.3,
    against: None,
    measure,
};

/// Kills a run.
const KILLS: usize = 10;

/// A block of the file; each is read past the page cache's memory of it.
const BLOCK: usize = 128 << 10;

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let scenario = bench.scenario;
    let image = debian::single_layer(&scenario.path("blobs"))?;
    let registry = Registry::start(scenario)?;
    let reference = registry.add(&image)?;
    let skimmerd = skimmerd::Setup { holder: true, fuse: true, ..skimmerd::Setup::default() };
    let setup = Setup { skimmerd, ..Setup::default() };
    let mut node = Node::start_with(scenario, Version::V2, &setup)?;
    node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
    let view = node.view(&image, &scenario.path("view"))?;
    let file = view.path().join(debian::LARGE_FILE);
    let (mut pauses, mut runs) = (Vec::new(), Vec::new());
    for run in 0..bench.runs {
        let of_run = kills(&mut node, &file)?;
        eprintln!("  run {} of {}: longest {:.3} s", run + 1, bench.runs, longest(&of_run));
        runs.push(json!({ "pauses_s": of_run.iter().map(|s| rounded(*s)).collect::<Vec<_>>() }));
        pauses.extend(of_run);
    }
    pauses.sort_by(f64::total_cmp);
    let at = (pauses.len() * 99).div_ceil(100).saturating_sub(1);
    let value = pauses.get(at).copied().context("nothing was measured")?;
    let settings =
        json!({ "kills": pauses.len(), "block_bytes": BLOCK, "keeper": "skimmerd hold" });
    Ok(Outcome { value, runs, settings })
}

fn longest(pauses: &[f64]) -> f64 {
    pauses.iter().copied().fold(0.0, f64::max)
}

/// The reader's longest pause around each of [`KILLS`] kills.
fn kills(node: &mut Node, file: &Path) -> anyhow::Result<Vec<f64>> {
    let mut pauses = Vec::new();
    for kill in 0..KILLS {
        drop_caches()?;
        let over = AtomicBool::new(false);
        let pause = thread::scope(|scope| -> anyhow::Result<Duration> {
            let reader = scope.spawn(|| read_on(file, &over));
            // At different moments of the reader's work.
            thread::sleep(Duration::from_millis(40 + 7 * kill as u64));
            let restarted = node.skimmerd.kill().and_then(|()| node.skimmerd.run());
            thread::sleep(Duration::from_millis(100));
            over.store(true, Ordering::Release);
            let read = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
            restarted?;
            read
        })?;
        pauses.push(pause.as_secs_f64());
    }
    Ok(pauses)
}

/// Reads the file over and over, dropping it from the page cache, until it is over; the longest read.
fn read_on(path: &Path, over: &AtomicBool) -> anyhow::Result<Duration> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let blocks = file.metadata()?.len() / BLOCK as u64;
    let (mut block, mut room, mut longest) = (0, vec![0; BLOCK], Duration::ZERO);
    while !over.load(Ordering::Acquire) {
        if block % blocks == 0 {
            nix::fcntl::posix_fadvise(
                &file,
                0,
                0,
                nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
            )?;
        }
        let started = Instant::now();
        file.read_exact_at(&mut room, block % blocks * BLOCK as u64)?;
        longest = longest.max(started.elapsed());
        // So that the file isn't read through before the kill.
        thread::sleep(Duration::from_micros(500));
        block += 1;
    }
    Ok(longest)
}
