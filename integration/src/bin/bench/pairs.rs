//! Two ways measured side by side.

use serde_json::{Map, Value};
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
    measure: impl FnMut(Way) -> anyhow::Result<Sample>,
) -> anyhow::Result<Outcome> {
    let ways = [Way::Skimmer, Way::Overlayfs].map(|way| (way, way.snapshotter()));
    compare(bench, settings, ways, measure)
}

/// The same of any two ways with names; the value is the first's median over the second's.
pub fn compare<T: Copy>(
    bench: &Bench<'_>,
    mut settings: Value,
    ways: [(T, &'static str); 2],
    mut measure: impl FnMut(T) -> anyhow::Result<Sample>,
) -> anyhow::Result<Outcome> {
    let (mut values, mut runs) = ([Vec::new(), Vec::new()], Vec::new());
    for run in 0..bench.runs {
        let mut pair = [0, 1];
        // Each goes first as often as the other.
        if run % 2 == 1 {
            pair.reverse();
        }
        let mut report = Map::new();
        for at in pair {
            let (way, name) = ways[at];
            let quiet = quiet::wait();
            let sample = measure(way)?;
            eprintln!("  run {} of {}: {name} {:.3}", run + 1, bench.runs, sample.value);
            let mut json = sample.to_json();
            if !quiet {
                json["disturbed"] = true.into();
            }
            report.insert(name.into(), json);
            values[at].push(sample.value);
        }
        runs.push(report.into());
    }
    let [first, second] = values.map(median);
    let mut medians = Map::new();
    for ((_, name), value) in ways.into_iter().zip([first, second]) {
        medians.insert(name.into(), rounded(value).into());
    }
    settings["medians"] = medians.into();
    Ok(Outcome { value: first / second, runs, settings })
}
