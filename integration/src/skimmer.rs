//! The `skimmer` command of one skimmerd, whether that runs or not.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use serde_json::Value;

use crate::command::{self, PATIENCE};
use crate::tools;

/// A client of the skimmerd that listens at an address.
#[derive(Clone, Debug)]
pub struct Skimmer {
    address: PathBuf,
}

impl Skimmer {
    pub fn at(address: PathBuf) -> Self {
        Self { address }
    }

    pub fn address(&self) -> PathBuf {
        self.address.clone()
    }

    /// A call of the `skimmer` command with JSON output.
    pub fn skimmer(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(tools::built("skimmer")?);
        command.arg("--address").arg(&self.address).args(["--output", "json"]).args(arguments);
        Ok(command)
    }

    /// Runs `skimmer` with JSON output, which it prints as one value or as one a line: the last counts.
    pub fn ask(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = command::output_of(&mut self.skimmer(arguments)?, PATIENCE)?;
        let mut last = None;
        for value in serde_json::Deserializer::from_str(&text).into_iter::<Value>() {
            last = Some(value.with_context(|| format!("skimmer {arguments:?} printed {text}"))?);
        }
        Ok(last.unwrap_or(Value::Null))
    }

    /// Whether it has a stream to its cluster's scheduler.
    pub fn is_attending(&self) -> bool {
        self.ask(&["peers"]).is_ok_and(|status| status["scheduler"] == true)
    }

    /// Imports every index in `folder`.
    pub fn import_indexes(&self, folder: &Path) -> anyhow::Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let mut call = self.skimmer(&["index", "import"])?;
            command::output_of(call.arg(entry?.path()), PATIENCE)?;
        }
        Ok(())
    }

    /// How each layer of an image is there, the lowest first.
    pub fn modes(&self, reference: &str) -> anyhow::Result<Vec<String>> {
        let layers = self.layers(reference)?;
        Ok(layers.iter().map(|l| l["mode"].as_str().unwrap_or_default().to_owned()).collect())
    }

    /// What `status` shows of each layer of an image, the lowest first.
    pub fn layers(&self, reference: &str) -> anyhow::Result<Vec<Value>> {
        let status = self.ask(&["status", reference])?;
        status[0]["layers"].as_array().cloned().context("no layers are shown")
    }
}
