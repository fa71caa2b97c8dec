//! The scheduler over a modelled network, in virtual time: nothing of this depends on the machine but `scheduler-rate`.

use serde_json::json;
use skimmer_integration::sim::{Outcome, Setup, replay, run};

use crate::figure::{self, Bar, Bench, Figure, median, rounded};

const LINKS: &str = "the least possible, (F/u)(1 + ⌊log₂N⌋/M), with equal links";

pub const EQUAL: Figure = Figure {
    name: "sim-1000",
    what: "simulated burst, 1,000 nodes × 256 pieces: makespan ÷ T*",
    unit: "ratio",
    bar: Bar::AtMost(1.12),
    aim: 1.05,
    against: Some(LINKS),
    measure: |bench| simulate(bench, &Setup::new(1000, 256), Outcome::ratio),
};

pub const EGRESS: Figure = Figure {
    name: "sim-1000-egress",
    what: "the same: what the origin sends ÷ the image",
    unit: "ratio",
    bar: Bar::AtMost(1.01),
    aim: 1.0,
    against: Some("the image once"),
    measure: |bench| simulate(bench, &Setup::new(1000, 256), Outcome::egress),
};

pub const ZONES: Figure = Figure {
    name: "sim-1000-zones",
    what: "the same in 8 zones: copies of the image that cross zones (7 are needed; makespan ≤ 1.15 T* or it doesn't count)",
    unit: "copies",
    bar: Bar::AtMost(7.5),
    aim: 7.0,
    against: Some("one copy into every zone but the first"),
    measure: |bench| {
        let setup = Setup { zones: 8, ..Setup::new(1000, 256) };
        simulate(bench, &setup, |outcome, setup| {
            if outcome.ratio(setup) <= 1.15 { outcome.copies_across(setup) } else { f64::NAN }
        })
    },
};

pub const CHURN: Figure = Figure {
    name: "sim-1000-churn",
    what: "the same while 100 nodes die and 100 join: makespan of those there from beginning to end ÷ T*",
    unit: "ratio",
    bar: Bar::AtMost(1.30),
    aim: 1.15,
    against: Some(LINKS),
    measure: |bench| {
        let setup = Setup { dying: 100, joining: 100, ..Setup::new(1000, 256) };
        simulate(bench, &setup, Outcome::survivors_ratio)
    },
};

pub const LARGE: Figure = Figure {
    name: "sim-10000",
    what: "simulated burst, 10,000 nodes × 64 pieces: makespan ÷ T*",
    unit: "ratio",
    bar: Bar::AtMost(1.20),
    aim: 1.08,
    against: Some(LINKS),
    measure: |bench| simulate(bench, &ten_thousand(), Outcome::ratio),
};

pub const LARGEST: Figure = Figure {
    name: "sim-100000",
    what: "simulated burst, 100,000 nodes × 16 pieces: makespan ÷ T*",
    unit: "ratio",
    bar: Bar::AtMost(1.30),
    aim: 1.12,
    against: Some(LINKS),
    // One history: it takes minutes.
    measure: |bench| simulate(&Bench { runs: 1, ..*bench }, &hundred_thousand(), Outcome::ratio),
};

pub const RATE: Figure = Figure {
    name: "scheduler-rate",
    what: "events of nodes that the scheduler handles per second of one core, in that burst",
    unit: "events/s",
    bar: Bar::AtLeast(50_000.0),
    aim: 300_000.0,
    against: None,
    measure: |bench| {
        let (mut rates, mut runs) = (Vec::new(), Vec::new());
        let setup = Setup { recorded: true, ..ten_thousand() };
        let outcome = run(&setup)?;
        for _ in 0..bench.runs {
            let took = replay(&setup.limits, outcome.log.clone())?;
            let rate = outcome.node_events as f64 / took.as_secs_f64();
            eprintln!("  {rate:.0} events/s");
            rates.push(rate);
            runs.push(json!({ "value": rate.round(), "cpu_s": took.as_secs_f64() }));
        }
        let settings = json!({
            "node_events": outcome.node_events, "events": outcome.log.len(),
            "time": "processor time of the thread, actions included",
        });
        Ok(figure::Outcome { value: median(rates).round(), runs, settings })
    },
};

/// Links at which this many nodes are just assigned piece by piece: 40 Mbit/s.
fn ten_thousand() -> Setup {
    Setup { rate: 5_000_000, checked: false, ..Setup::new(10_000, 64) }
}

/// Ten times as many nodes, with links ten times slower: as many assignments a second.
fn hundred_thousand() -> Setup {
    Setup { rate: 500_000, checked: false, ..Setup::new(100_000, 16) }
}

/// One history for each run, each with a seed of its own.
fn simulate(
    bench: &Bench<'_>,
    setup: &Setup,
    value: impl Fn(&Outcome, &Setup) -> f64,
) -> anyhow::Result<figure::Outcome> {
    let (mut values, mut runs) = (Vec::new(), Vec::new());
    for seed in 1..=u64::from(bench.runs) {
        let setup = Setup { seed, ..setup.clone() };
        let outcome = run(&setup)?;
        anyhow::ensure!(outcome.unfinished == 0, "seed {seed}: {} unfinished", outcome.unfinished);
        let value = value(&outcome, &setup);
        eprintln!("  seed {seed}: {value:.4}");
        values.push(value);
        runs.push(json!({
            "value": rounded(value), "seed": seed, "makespan_s": rounded(outcome.makespan.as_secs_f64()),
            "makespan_ratio": rounded(outcome.ratio(&setup)), "egress": rounded(outcome.egress(&setup)),
        }));
    }
    let settings = json!({
        "nodes": setup.nodes, "pieces": setup.shape.pieces, "piece_bytes": setup.shape.piece_len,
        "link_bytes_per_second": setup.rate, "zones": setup.zones, "dying": setup.dying, "joining": setup.joining,
        "latency_us": setup.latency.as_micros(), "scheduler_latency_us": setup.control.as_micros(),
        "ideal_s": rounded(setup.ideal().as_secs_f64()),
    });
    Ok(figure::Outcome { value: median(values), runs, settings })
}
