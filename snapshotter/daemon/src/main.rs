//! `skimmerd`: the node daemon. Reads its configuration, wires the stages, runs until told to stop.

mod app;
mod completed;
mod config;
mod cri;
mod descriptors;
mod keeper;
mod node;
mod pulled;
mod swarm;
mod unit;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use skimmer_service::{log, program, stop};

use crate::config::Config;

/// Serves containerd snapshots of images that are still arriving.
#[derive(Parser, Debug)]
#[command(
    name = "skimmerd",
    version,
    after_help = "Every configuration key has a default; install/skimmerd.toml lists them all.\n\n\
                  Examples:\n  skimmerd --config /etc/skimmer/skimmerd.toml\n  \
                  skimmerd --config FILE --check\n  \
                  skimmerd hold                          in a unit of its own, where systemd keeps no descriptors\n  \
                  skimmerd drain --unmount               after it was stopped for good"
)]
struct Options {
    /// Configuration file (TOML); built-in defaults if not given.
    #[arg(long, short, global = true)]
    config: Option<PathBuf>,
    /// Check the configuration and exit.
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    task: Option<Task>,
}

/// What else the program does than to serve.
#[derive(Subcommand, Debug)]
enum Task {
    /// Keep the descriptors of mounts while skimmerd is stopped, crashed or being upgraded.
    ///
    /// Runs for ever at `mount.holder_address`, and has to outlive skimmerd: give it a unit of its own.
    Hold,
    /// Give up what a stopped skimmerd left to its successor.
    Drain {
        /// Unmount every layer: containers that use one get errors from it.
        #[arg(long, required = true)]
        unmount: bool,
        /// The unit that it ran as, where systemd keeps the descriptors of mounts.
        #[arg(long, default_value = "skimmerd.service")]
        unit: String,
    },
}

fn main() -> ExitCode {
    program::exit("skimmerd", run(&Options::parse()))
}

fn run(options: &Options) -> anyhow::Result<()> {
    let config = match &options.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    match &options.task {
        Some(Task::Hold) => {
            log::start(&config.log)?;
            descriptors::raise_limit();
            Ok(skimmer_keeper::hold::serve(&config.mount.holder_address)?)
        }
        Some(Task::Drain { unmount: _, unit }) => {
            log::start(&config.log)?;
            if unit::keeps(&config, unit) {
                unit::drain(unit, options.config.as_deref())
            } else {
                keeper::unmount(&config)
            }
        }
        None => serve(&config, options.check),
    }
}

fn serve(config: &Config, check: bool) -> anyhow::Result<()> {
    program::run("skimmerd", &config.log, check, async {
        descriptors::raise_limit();
        let app = app::App::build(config).await?;
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            address = %config.snapshots.address.display(),
            root = %config.root.display(),
            "serving"
        );
        app.run(stop::asked()?).await
    })
}
