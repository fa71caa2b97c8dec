//! How long a reader waits while skimmerd is killed and started anew, as systemd does it by its unit.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use skimmer_integration::ctr::Pull;
use skimmer_integration::debian;
use skimmer_integration::node::Node;
use skimmer_integration::world::World;

use crate::figure::{Bar, Bench, Figure, Outcome, rounded};

pub const FIGURE: Figure = Figure {
    name: "takeover-pause",
    what: "longest read in a container across `kill -9` of skimmerd and its restart by its unit, p99 over the kills",
    unit: "s",
    bar: Bar::AtMost(2.0),
    aim: 0.3,
    against: None,
    measure,
};

/// Kills in a run.
const KILLS: usize = 4;
const READER: &str = "reader";

/// Reads pages that were never read, from `FROM` on, for some seconds; prints how long the longest read took.
const PROGRAM: &str = "
import os, time
file = os.open('/FILE', os.O_RDONLY)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
longest, at, end = 0, FROM, time.perf_counter() + 4
while time.perf_counter() < end:
    start = time.perf_counter()
    assert len(os.pread(file, 4096, at)) == 4096
    longest = max(longest, time.perf_counter() - start)
    at += 4 * 4096
    time.sleep(0.01)
print(longest)
";
/// No more than one of them reads.
const APART: usize = 8 << 20;

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let restart = restart_delay()?;
    let image = debian::single_layer(&bench.scenario.path("blobs"))?;
    let mut world = World::near(bench.scenario, image)?;
    world.holder = true;
    eprintln!("  building indexes of {}", world.image.name);
    let indexes = world.indexes()?;
    let mut node = world.cold_node(Some(&indexes))?;
    node.containerd.pull(&Pull::new(&world.reference, "skimmer"))?;
    node.containerd.start_image(&world.reference, "skimmer", READER, &["sleep", "1000000"])?;
    // What the reader itself is made of is not to be waited for.
    read(&node, 0)?;
    let (mut pauses, mut runs) = (Vec::new(), Vec::new());
    for run in 0..bench.runs as usize {
        let mut of_run = Vec::new();
        for kill in 0..KILLS {
            let from = (1 + run * KILLS + kill) * APART;
            of_run.push(pause(&mut node, from, restart)?);
        }
        eprintln!("  run {} of {}: {of_run:.3?} s", run + 1, bench.runs);
        runs.push(
            json!({ "pauses_s": of_run.iter().map(|pause| rounded(*pause)).collect::<Vec<_>>() }),
        );
        pauses.extend(of_run);
    }
    pauses.sort_by(f64::total_cmp);
    let rank = (pauses.len() * 99).div_ceil(100);
    let value = *pauses.get(rank.saturating_sub(1)).context("nothing was measured")?;
    let mut settings = world.settings()?;
    settings["restart_delay_s"] = json!(restart.as_secs_f64());
    Ok(Outcome { value, runs, settings })
}

/// How long systemd waits before it starts skimmerd anew: what the unit says.
fn restart_delay() -> anyhow::Result<Duration> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../install/skimmerd.service");
    let text =
        std::fs::read_to_string(&unit).with_context(|| format!("read {}", unit.display()))?;
    let delay = text.lines().find_map(|line| line.strip_prefix("RestartSec=")?.strip_suffix("ms"));
    let delay = delay.with_context(|| format!("{} has no RestartSec= in ms", unit.display()))?;
    Ok(Duration::from_millis(delay.parse()?))
}

/// The longest read of one that reads while skimmerd dies and comes back, `restart` after its death.
fn pause(node: &mut Node, from: usize, restart: Duration) -> anyhow::Result<f64> {
    let mut reader = node.containerd.exec_command(READER, &["python3", "-c", &program(from)])?;
    let reading = thread::spawn(move || {
        skimmer_integration::command::output_of(&mut reader, Duration::from_secs(60))
    });
    thread::sleep(Duration::from_secs(2));
    node.skimmerd.kill()?;
    thread::sleep(restart);
    node.skimmerd.run()?;
    let said = reading.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    said.trim().parse().with_context(|| format!("the reader said {said:?}"))
}

fn read(node: &Node, from: usize) -> anyhow::Result<String> {
    node.containerd.exec(READER, &["python3", "-c", &program(from)])
}

fn program(from: usize) -> String {
    PROGRAM.replace("FILE", debian::LARGE_FILE).replace("FROM", &from.to_string())
}
