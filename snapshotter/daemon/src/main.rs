//! `skimmerd`: the node daemon. Reads its configuration, wires the stages, runs until told to stop.

mod app;
mod config;
mod node;
mod swarm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use skimmer_service::{program, stop};

use crate::config::Config;

/// Serves containerd snapshots of images that are still arriving.
#[derive(Parser, Debug)]
#[command(
    name = "skimmerd",
    version,
    after_help = "Every configuration key has a default; install/skimmerd.toml lists them all.\n\n\
                  Examples:\n  skimmerd --config /etc/skimmer/skimmerd.toml\n  \
                  skimmerd --config FILE --check"
)]
struct Options {
    /// Configuration file (TOML); built-in defaults if not given.
    #[arg(long, short)]
    config: Option<PathBuf>,
    /// Check the configuration and exit.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    program::exit("skimmerd", run(&Options::parse()))
}

fn run(options: &Options) -> anyhow::Result<()> {
    let config = match &options.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    program::run("skimmerd", &config.log, options.check, async {
        let app = app::App::build(&config).await?;
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            address = %config.snapshots.address.display(),
            root = %config.root.display(),
            "serving"
        );
        app.run(stop::asked()?).await
    })
}
