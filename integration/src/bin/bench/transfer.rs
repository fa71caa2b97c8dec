//! What moving pieces between two nodes costs.
//!
//! The measuring is done by the swarm's example `transfer`, in which two nodes talk to each other.

use std::process::Command;

use anyhow::Context as _;
use serde_json::{Value, json};
use skimmer_integration::command::{self, PATIENCE};
use skimmer_integration::network::Host;
use skimmer_integration::tools;

use crate::figure::{Bar, Bench, Figure, Outcome, median};
use crate::quiet;

pub const CPU: Figure = Figure {
    name: "transfer-cpu",
    what: "processor time per GiB moved peer to peer over loopback, both ends, pieces verified",
    unit: "cpu-s/GiB",
    bar: Bar::AtMost(2.0),
    aim: 1.2,
    against: None,
    measure: |bench| measure(bench, "cpu", "cpu_s_per_gib", None),
};

pub const RATE: Figure = Figure {
    name: "transfer-rate",
    what: "throughput of one link over loopback ÷ that of a bare TLS stream, pieces verified",
    unit: "ratio",
    bar: Bar::AtLeast(0.5),
    aim: 0.8,
    against: Some("rustls, AES-128-GCM, over TCP in the same run"),
    measure: |bench| measure(bench, "rate", "ratio", None),
};

/// The link of the node that is asked, as its network card would be.
const LINK: u64 = 1_000_000_000;

pub const FAULT: Figure = Figure {
    name: "fault-latency",
    what: "fault of one 256 KiB run from a peer behind 1 Gbit/s ÷ bare TCP round trip and transfer, p50",
    unit: "ratio",
    bar: Bar::AtMost(4.0),
    aim: 2.0,
    against: Some("one byte over and 256 KiB back on an open TCP connection over the same link"),
    measure: fault,
};

fn fault(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let host = Host::new(Some(LINK))?;
    // A burst of the length of the run would let it pass at once, which no network card does.
    let shape = [
        "qdisc", "replace", "dev", "wire", "root", "tbf", "rate", "1gbit", "burst", "64kb",
        "latency", "50ms",
    ];
    command::output_of(host.command("tc").args(shape), PATIENCE)?;
    let mut outcome = measure(bench, "fault", "ratio", Some(&host))?;
    // For comparison: there the cryptography has nothing to hide behind.
    let loopback = measure(bench, "fault", "ratio", None)?;
    outcome.settings["link_bits_per_s"] = LINK.into();
    outcome.settings["over_unshaped_loopback"] = loopback.value.into();
    Ok(outcome)
}

/// Runs the example and takes the median of `value` over its rounds.
fn measure(
    bench: &Bench<'_>,
    what: &str,
    value: &str,
    sender: Option<&Host>,
) -> anyhow::Result<Outcome> {
    let quiet = quiet::wait();
    let mut call = Command::new(tools::built("examples/transfer")?);
    call.arg(what).arg(bench.runs.to_string());
    if let Some(host) = sender {
        call.arg(host.namespace()).arg(host.address().to_string());
    }
    let text = command::output_of(&mut call, PATIENCE * 10)?;
    let runs: Vec<Value> =
        serde_json::from_str(&text).with_context(|| format!("transfer printed {text:?}"))?;
    let values = runs.iter().filter_map(|run| run[value].as_f64()).collect();
    let settings = json!({ "disturbed": !quiet, "piece_bytes": if what == "fault" { 256 << 10 } else { 1 << 20 } });
    Ok(Outcome { value: median(values), runs, settings })
}
