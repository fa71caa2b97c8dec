//! Where the daemon's log goes: standard error, as text or as JSON lines.

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Whether `log.level` is a filter that can be used.
pub fn check(config: &Log) -> anyhow::Result<()> {
    filter(config).map(|_| ())
}

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

fn filter(config: &Log) -> anyhow::Result<EnvFilter> {
    EnvFilter::try_new(&config.level)
        .with_context(|| format!("configuration key `log.level` has the filter {:?}", config.level))
}
