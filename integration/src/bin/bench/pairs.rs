//! Two ways measured side by side.

use serde_json::{Map, Value, json};
use skimmer_integration::start::Way;

use crate::figure::{Bench, Outcome, median, rounded};
use crate::quiet;

/// One measurement: the number that counts, and others that explain it.
pub struct Sample {
    pub value: f64,
    pub details: Vec<(&'static str, f64)>,
}

impl Sample {
    fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("value".into(), rounded(self.value).into());
        for (name, value) in &self.details {
            object.insert((*name).into(), rounded(*value).into());
        }
        object.into()
    }
}

/// Measures both ways `bench.runs` times, alternating; the value is skimmer's median over overlayfs's.
pub fn alternate(
    bench: &Bench<'_>,
    settings: Value,
    mut measure: impl FnMut(Way) -> anyhow::Result<Sample>,
) -> anyhow::Result<Outcome> {
    let (mut ours, mut theirs, mut runs) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..bench.runs {
        let mut pair = [Way::Skimmer, Way::Overlayfs];
        // Each goes first as often as the other.
        if run % 2 == 1 {
            pair.reverse();
        }
        let mut report = Map::new();
        for way in pair {
            let quiet = quiet::wait();
            let sample = measure(way)?;
            eprintln!(
                "  run {} of {}: {} {:.3}",
                run + 1,
                bench.runs,
                way.snapshotter(),
                sample.value
            );
            let mut json = sample.to_json();
            if !quiet {
                json["disturbed"] = true.into();
            }
            report.insert(way.snapshotter().into(), json);
            match way {
                Way::Skimmer => ours.push(sample.value),
                Way::Overlayfs => theirs.push(sample.value),
            }
        }
        runs.push(report.into());
    }
    let (ours, theirs) = (median(ours), median(theirs));
    let mut settings = settings;
    settings["medians"] = json!({ "skimmer": rounded(ours), "overlayfs": rounded(theirs) });
    Ok(Outcome { value: ours / theirs, runs, settings })
}
