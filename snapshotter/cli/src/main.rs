//! `skimmer`: what people type on a node. Asks the daemon, prints the answer.

mod cli;
mod commands;
mod containerd_config;
mod daemon;
mod output;
mod progress;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    match runtime.block_on(commands::run(cli)) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

/// One line: what failed, then each cause.
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("skimmer: {error:#}");
    match error.downcast_ref::<daemon::Unreachable>() {
        Some(_) => ExitCode::from(cli::EXIT_UNREACHABLE),
        None => ExitCode::FAILURE,
    }
}
