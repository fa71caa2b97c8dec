//! From a program's configuration to its exit status.

use std::process::ExitCode;

use anyhow::Context as _;

use crate::log::{self, Log};

/// Says on standard error why `program` failed, if it did.
pub fn exit(program: &str, outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the log and a runtime and has it run `serve` to its end. With `check_only` nothing is
/// started, and only the log's own configuration is looked at.
///
/// # Errors
/// If the log can't be set up as configured, or `serve` fails.
pub fn run(
    program: &str,
    log: &Log,
    check_only: bool,
    serve: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    log::check(log)?;
    if check_only {
        return Ok(());
    }
    log::start(log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name(program)
        .build()
        .context("start the runtime")?;
    runtime.block_on(serve)
}
