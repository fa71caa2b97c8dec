//! Whether anything else is using the machine.

use std::time::{Duration, Instant};

/// The share of the processors that others may use during a measurement.
const TOLERATED: f64 = 0.2;

/// How long it is worth waiting for others to finish.
const PATIENCE: Duration = Duration::from_secs(15);

/// Waits until the machine is idle; says whether it became so.
pub fn wait() -> bool {
    let start = Instant::now();
    loop {
        let before = times();
        std::thread::sleep(Duration::from_millis(300));
        let after = times();
        let (all, idle) = (after.0 - before.0, after.1 - before.1);
        if all > 0.0 && 1.0 - idle / all <= TOLERATED {
            return true;
        }
        if start.elapsed() > PATIENCE {
            eprintln!("  other programs keep this machine busy: what is measured now is disturbed");
            return false;
        }
    }
}

/// The least share of the processors' time that must be left over during a measurement of a network.
const IDLE: f64 = 0.25;

/// Runs that may be discarded, besides as many as are wanted.
const SPARE: u32 = 2;

/// How idle the machine was.
#[derive(Clone, Copy, Debug)]
pub struct Calm {
    /// The idle share of the processors' time.
    pub idle: f64,
}

/// An interval that has begun.
pub struct Begun {
    before: (f64, f64),
}

impl Calm {
    pub fn begin() -> Begun {
        Begun { before: times() }
    }
}

impl Begun {
    pub fn end(self) -> Calm {
        let after = times();
        Calm { idle: (after.1 - self.before.1) / (after.0 - self.before.0).max(1.0) }
    }
}

/// Measures until there are `runs` runs that left the processors idle enough; says how many others were discarded.
///
/// # Errors
/// If a measurement fails, or too many are disturbed for there to be one that isn't.
pub fn undisturbed<T>(
    runs: u32,
    mut measure: impl FnMut() -> anyhow::Result<(T, Calm)>,
) -> anyhow::Result<(Vec<T>, u32)> {
    let (mut kept, mut discarded) = (Vec::new(), 0);
    while kept.len() < runs as usize {
        wait();
        let (run, calm) = measure()?;
        if calm.idle >= IDLE {
            kept.push(run);
            continue;
        }
        eprintln!("  discarded: the processors were idle for {:.0} % only", calm.idle * 100.0);
        discarded += 1;
        if discarded >= runs + SPARE {
            break;
        }
    }
    anyhow::ensure!(
        runs == 0 || !kept.is_empty(),
        "the machine is too busy: {discarded} runs were discarded"
    );
    Ok((kept, discarded))
}

/// All of the processors' time, and the idle part (proc(5), `/proc/stat`: user nice system idle iowait …).
fn times() -> (f64, f64) {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let fields: Vec<f64> =
        line.split_ascii_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    (fields.iter().take(8).sum(), fields.iter().skip(3).take(2).sum())
}
