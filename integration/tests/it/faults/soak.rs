//! Memory and descriptors over time, without faults: what grows for as long as there is work to do.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::{NODE, World};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// The shortest time that says something of growth.
const TELLING: Duration = Duration::from_secs(600);

/// What a daemon's own memory may grow by in an hour of work, in bytes.
const GROWTH: f64 = (8 << 20) as f64;

/// What was seen of one program, by the seconds since the beginning.
struct Watched {
    name: &'static str,
    process: u32,
    memory: Vec<(f64, f64)>,
    descriptors: Vec<(f64, f64)>,
}

/// Lets the load go on for `time` and fails if it stands still, or if a program grows.
pub fn soak(world: &World<'_>, time: Duration) -> anyhow::Result<()> {
    let daemon = &world.fleet.machines[NODE].skimmerd;
    let watched = |name, process: Option<u32>| -> anyhow::Result<Watched> {
        let process = process.with_context(|| format!("{name} doesn't run"))?;
        Ok(Watched { name, process, memory: Vec::new(), descriptors: Vec::new() })
    };
    let mut programs = [
        watched("skimmerd", daemon.id())?,
        watched("its holder", daemon.holder_id())?,
        watched("skimmer-control", world.fleet.control.id())?,
    ];
    let start = Instant::now();
    while start.elapsed() < time {
        thread::sleep(INTERVAL);
        world.load.check()?;
        let at = start.elapsed().as_secs_f64();
        for program in &mut programs {
            program.memory.push((at, anonymous(program.process)? as f64));
            let open = fs::read_dir(format!("/proc/{}/fd", program.process))?.count();
            program.descriptors.push((at, open as f64));
        }
    }
    for Watched { name, memory, descriptors, .. } in &programs {
        let (bytes, open) = (growth(memory), growth(descriptors));
        let last = memory.last().map_or(0.0, |(_, bytes)| *bytes);
        println!(
            "{name}: {:.1} MiB of its own, {:+.2} MiB an hour, {open:+.1} descriptors an hour",
            last / f64::from(1 << 20),
            bytes / f64::from(1 << 20),
        );
        if time >= TELLING {
            anyhow::ensure!(bytes < GROWTH, "{name} grows by {bytes} bytes an hour");
            anyhow::ensure!(open < 32.0, "{name} grows by {open} descriptors an hour");
        }
    }
    Ok(())
}

/// `RssAnon` (proc(5)), in bytes: memory that isn't a file's.
fn anonymous(process: u32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib << 10)
}

/// By how much it grows in an hour: the slope of the straight line through all but the first quarter, in which things
/// warm up, by least squares.
fn growth(samples: &[(f64, f64)]) -> f64 {
    let samples = &samples[samples.len() / 4..];
    let count = samples.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| samples.iter().map(of).sum::<f64>() / count;
    let (time, value) = (mean(|sample| sample.0), mean(|sample| sample.1));
    let (mut along, mut across) = (0.0, 0.0);
    for (at, is) in samples {
        along += (at - time) * (is - value);
        across += (at - time) * (at - time);
    }
    if across > 0.0 { along / across * 3600.0 } else { 0.0 }
}

#[test]
fn growth_is_that_of_the_line_after_the_beginning() {
    let line = |second: u32| (f64::from(second), 5.0 + 2.0 * f64::from(second));
    let mut samples: Vec<_> = (0..100).map(line).collect();
    assert!((growth(&samples) - 7200.0).abs() < 1e-6);
    samples[3].1 = 1e9;
    assert!((growth(&samples) - 7200.0).abs() < 1e-6);
    assert!(growth(&[]).abs() < 1e-9);
}
