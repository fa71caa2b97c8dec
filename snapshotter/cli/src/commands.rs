//! What each command does.

mod cache;
mod control;
mod doctor;
mod get;
mod images;
mod index;
mod peers;
mod pull;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::CommandFactory as _;

use crate::cli::{Cli, Command};

pub async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let global = cli.global;
    match cli.command {
        Command::Images { namespace } => images::images(&global, namespace).await,
        Command::Status { image, namespace } => images::status(&global, image, namespace).await,
        Command::Peers => peers::peers(&global).await,
        Command::Pull { reference, namespace, platform, snapshotter } => {
            pull::pull(&global, reference, namespace, platform, snapshotter).await
        }
        Command::Get(options) => return get::get(&global, options).await,
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
