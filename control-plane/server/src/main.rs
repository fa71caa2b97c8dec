//! `skimmer-control`: manager and scheduler of clusters. Reads its configuration, wires the parts,
//! runs until told to stop.

mod accept;
mod admin;
mod app;
mod caller;
mod clock;
mod config;
mod directory;
mod manager;
mod scheduler;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use skimmer_service::{program, stop};

use crate::config::Config;

/// Lets nodes into clusters, and plans who fetches what from whom.
#[derive(Parser, Debug)]
#[command(
    name = "skimmer-control",
    version,
    after_help = "Every configuration key has a default; install/skimmer-control.toml lists them all.\n\n\
                  Examples:\n  skimmer-control --config /etc/skimmer/skimmer-control.toml\n  \
                  skimmer-control --config FILE --role manager\n  \
                  skimmer-control --config FILE --check"
)]
struct Options {
    /// Configuration file (TOML); built-in defaults if not given.
    #[arg(long, short)]
    config: Option<PathBuf>,
    /// What this process is.
    #[arg(long, value_enum, default_value_t = Role::All)]
    role: Role,
    /// Check the configuration and exit.
    #[arg(long)]
    check: bool,
}

/// Processes of different roles on one machine share the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Manager and scheduler.
    All,
    /// Enrolment, certificates, grants.
    Manager,
    /// Streams of nodes.
    Scheduler,
}

fn main() -> ExitCode {
    program::exit("skimmer-control", run(&Options::parse()))
}

fn run(options: &Options) -> anyhow::Result<()> {
    let config = match &options.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    program::run("skimmer-control", &config.log, options.check, async {
        let app = app::App::build(&config, options.role).await?;
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            role = ?options.role,
            store = %config.store.path.display(),
            "serving"
        );
        app.run(stop::asked()?).await
    })
}
