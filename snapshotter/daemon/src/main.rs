//! `skimmerd`: the node daemon. Reads its configuration, wires the stages, runs until told to stop.

mod app;
mod config;
mod node;
mod swarm;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use skimmer_service::{log, stop};

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
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("skimmerd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    let config = match &options.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    log::check(&config.log)?;
    if options.check {
        return Ok(());
    }
    log::start(&config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("skimmerd")
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
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
