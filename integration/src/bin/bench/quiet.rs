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

/// All of the processors' time, and the idle part (proc(5), `/proc/stat`: user nice system idle iowait …).
fn times() -> (f64, f64) {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let fields: Vec<f64> =
        line.split_ascii_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    (fields.iter().take(8).sum(), fields.iter().skip(3).take(2).sum())
}
