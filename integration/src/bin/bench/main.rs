//! `bench [FIGURE…]`: how skimmer does beside containerd with overlayfs, one JSON object a line.
//!
//! Each figure is a scenario of its own, with its own daemons, registry and link. `integration/bench` installs what
//! it needs, builds and runs it.

mod adopt;
mod burst;
mod busy_memory;
mod figure;
mod fuse_read;
mod graduated;
mod idle_memory;
mod index_build;
mod index_size;
mod kernel_lazy;
mod lazy_bytes;
mod lazy_start;
mod pairs;
mod pull_through;
mod quiet;
mod read_local;
mod running;
mod simulated;
mod speedup;
mod start;
mod start_time;
mod takeover_pause;
mod transfer;
mod warm_walk;

use anyhow::Context as _;
use clap::Parser;
use skimmer_integration::{interrupt, scenario, tools};

use figure::{Bench, Figure};

/// Every figure, in the order in which they are measured.
const FIGURES: [&Figure; 35] = [
    &lazy_start::FIGURE,
    &kernel_lazy::FIGURE,
    &lazy_bytes::FIGURE,
    &pull_through::FIGURE,
    &pull_through::SMALL,
    &pull_through::LARGE,
    &read_local::FIGURE,
    &warm_walk::FIGURE,
    &index_size::FIGURE,
    &index_build::FIGURE,
    &idle_memory::FIGURE,
    &busy_memory::FIGURE,
    &start_time::FIGURE,
    &takeover_pause::FIGURE,
    &fuse_read::FIGURE,
    &graduated::READ,
    &graduated::WALK,
    &graduated::RANDOM,
    &graduated::WARM,
    &adopt::FIGURE,
    &transfer::CPU,
    &transfer::RATE,
    &transfer::FAULT,
    &burst::EIGHT,
    &burst::SIXTEEN,
    &burst::EGRESS,
    &speedup::SPEEDUP,
    &speedup::LAZY,
    &simulated::EQUAL,
    &simulated::EGRESS,
    &simulated::ZONES,
    &simulated::CHURN,
    &simulated::LARGE,
    &simulated::LARGEST,
    &simulated::RATE,
];

#[derive(Parser)]
#[command(name = "bench", about = "Measures skimmer beside containerd with overlayfs")]
struct Options {
    /// What to measure; everything if not given.
    figures: Vec<String>,
    /// How often each side is measured; figures to be quoted need 5 or more.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// List the figures with their bars and aims, and measure nothing.
    #[arg(long)]
    list: bool,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if options.list {
        for figure in FIGURES {
            println!("{}", figure.line());
        }
        return Ok(());
    }
    let chosen = choose(&options.figures)?;
    if let Some(missing) = tools::missing() {
        anyhow::bail!("{missing}");
    }
    interrupt::sweep_and_exit()?;
    let mut failed = Vec::new();
    for figure in chosen {
        eprintln!("{}: {}", figure.name, figure.what);
        let bench = |scenario: &_| (figure.measure)(&Bench { scenario, runs: options.runs });
        match scenario::run(&format!("bench-{}", figure.name), bench) {
            Ok(outcome) => println!("{}", figure.report(&outcome)),
            Err(error) => {
                eprintln!("{} failed: {error:?}", figure.name);
                failed.push(figure.name);
            }
        }
    }
    anyhow::ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}

fn choose(names: &[String]) -> anyhow::Result<Vec<&'static Figure>> {
    if names.is_empty() {
        return Ok(FIGURES.to_vec());
    }
    let find = |name: &String| {
        let known = || FIGURES.map(|figure| figure.name).join(", ");
        FIGURES
            .into_iter()
            .find(|figure| figure.name == name)
            .with_context(|| format!("no figure {name:?}; there are {}", known()))
    };
    names.iter().map(find).collect()
}
