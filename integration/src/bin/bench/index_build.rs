//! What building an index costs.

use std::process::Command;

use anyhow::Context as _;
use serde_json::{Value, json};
use skimmer_integration::command::{self, PATIENCE};
use skimmer_integration::{debian, tools};

use crate::figure::{Bar, Bench, Figure, Outcome};
use crate::quiet;

pub const FIGURE: Figure = Figure {
    name: "index-build",
    what: "index build ÷ plain decoding of the same blob, processor time; the larger of two blobs",
    unit: "ratio",
    bar: Bar::AtMost(1.25),
    aim: 1.1,
    against: Some("flate2 with zlib-rs, decoding only"),
    measure,
};

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let blobs = bench.scenario.path("blobs");
    let program = tools::built("examples/index_build")?;
    let largest = debian::numpy(&blobs)?.layers.into_iter().max_by_key(|layer| layer.blob.size);
    let single = debian::single_layer(&blobs)?.layers.into_iter().next();
    let (mut value, mut runs) = (0.0_f64, Vec::new());
    for layer in largest.into_iter().chain(single) {
        let quiet = quiet::wait();
        // Its own rounds alternate, and it prints medians.
        let mut call = Command::new(&program);
        call.arg(&layer.blob.path).arg(bench.runs.to_string());
        let text = command::output_of(&mut call, PATIENCE * 10)?;
        let mut report: Value =
            serde_json::from_str(&text).with_context(|| format!("index_build printed {text:?}"))?;
        let ratio = report["ratio"].as_f64().context("index_build printed no ratio")?;
        eprintln!("  {} MB: {ratio:.3}", layer.blob.size / 1_000_000);
        value = value.max(ratio);
        if !quiet {
            report["disturbed"] = true.into();
        }
        runs.push(report);
    }
    let settings = json!({
        "build_cpu_s": "decoding with checkpoints, tar walk, tree, inodes, encoding",
        "pass_cpu_s": "the same with the blob's SHA-256, the DiffID and the pieces' values",
    });
    Ok(Outcome { value, runs, settings })
}
