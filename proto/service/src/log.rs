//! Where a program's log goes: standard error, as text or as JSON lines.

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// The section `[log]` of a configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Log {
    /// A `tracing` filter: `info`, `warn,skimmer_layers=debug`.
    pub level: String,
    pub format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    Text,
    Json,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

/// Whether `log.level` is a filter that can be used.
pub fn check(config: &Log) -> anyhow::Result<()> {
    filter(config).map(|_| ())
}

/// Everything traced from now on goes there. Once a process.
pub fn start(config: &Log) -> anyhow::Result<()> {
    let log =
        tracing_subscriber::fmt().with_env_filter(filter(config)?).with_writer(std::io::stderr);
    match config.format {
        LogFormat::Text => log.with_ansi(false).try_init(),
        LogFormat::Json => log.json().try_init(),
    }
    .map_err(|error| anyhow::anyhow!(error))
    .context("start the log")
}

/// What goes before a configured filter, which may say otherwise: a dependency that warns of what is ordinary here,
/// a peer that is gone.
const QUIETER: &str = "yamux=error";

fn filter(config: &Log) -> anyhow::Result<EnvFilter> {
    EnvFilter::try_new(format!("{QUIETER},{}", config.level))
        .with_context(|| format!("configuration key `log.level` has the filter {:?}", config.level))
}
