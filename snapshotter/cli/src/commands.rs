//! What each command does.

mod cache;
mod control;
mod doctor;
mod get;
mod images;
mod index;
mod peers;
mod pull;
mod verifier;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::CommandFactory as _;
use skimmer_proto::node::PullRequest;

use crate::cli::{Cli, Command};

pub async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let global = cli.global;
    match cli.command {
        Command::Images { namespace } => images::images(&global, namespace).await,
        Command::Status { image, namespace } => images::status(&global, image, namespace).await,
        Command::Peers => peers::peers(&global).await,
        Command::Pull { reference, namespace, platform, snapshotter, full } => {
            let platform = platform.unwrap_or_default();
            let request = PullRequest { reference, namespace, platform, snapshotter, full };
            pull::pull(&global, request).await
        }
        Command::Materialize { image, namespace } => {
            pull::materialize(&global, image, namespace).await
        }
        Command::Get(options) => return get::get(&global, options).await,
        Command::Verifier { timeout, arguments } => {
            verifier::verifier(&global, timeout, &arguments).await;
            Ok(())
        }
        Command::Fetch { image, namespace } => pull::fetch(&global, image, namespace).await,
        Command::Cluster { control, command } => control::cluster(&global, &control, command).await,
        Command::Token { control, command } => control::token(&global, &control, command).await,
        Command::Node { control, command } => control::node(&global, &control, command).await,
        Command::Task { control, command } => control::task(&global, &control, command).await,
        Command::Event { control, command } => control::event(&global, &control, command).await,
        Command::Index(command) => index::run(&global, command).await,
        Command::Cache(command) => return cache::run(&global, command).await,
        Command::Doctor(options) => return doctor::run(&global, options).await,
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "skimmer", &mut std::io::stdout());
            Ok(())
        }
        Command::Man { directory } => man(&directory),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn man(directory: &Path) -> anyhow::Result<()> {
    clap_mangen::generate_to(Cli::command(), directory)
        .with_context(|| format!("write man pages into {}", directory.display()))
}
