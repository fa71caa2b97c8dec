//! docker's `config.json` with the credentials of registries, and a credential helper that it may name instead.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::files::replace;
use crate::scenario::Scenario;

/// `config.json`'s name of the helper, and its program's.
const HELPER: &str = "test";
const PROGRAM: &str = "docker-credential-test";

/// Has `file` know this password for each of the `registries`, which it names as references do.
pub fn log_in(file: &Path, registries: &[&str], user: &str, password: &str) -> anyhow::Result<()> {
    let auth = STANDARD.encode(format!("{user}:{password}"));
    write(file, "auths", registries, &json!({ "auth": auth }))
}

/// One entry of that `kind` for each of the `registries`.
fn write(file: &Path, kind: &str, registries: &[&str], entry: &Value) -> anyhow::Result<()> {
    let entries: Map<_, _> =
        registries.iter().map(|registry| ((*registry).to_owned(), entry.clone())).collect();
    replace(file, json!({ kind: entries }).to_string())
}

/// What has to be on a program's `PATH` for it to find the credential helpers of `scenario`.
pub fn helpers(scenario: &Scenario) -> PathBuf {
    scenario.path("helpers")
}

/// A credential helper that hands out a user's password (docker-credential-helpers' protocol).
pub struct CredentialHelper {
    folder: PathBuf,
}

impl CredentialHelper {
    /// One that knows of nobody yet.
    pub fn new(scenario: &Scenario, user: &str) -> anyhow::Result<Self> {
        let helper = Self { folder: helpers(scenario) };
        fs::create_dir_all(&helper.folder)?;
        helper.hand_out("")?;
        let program = helper.folder.join(PROGRAM);
        let script = format!(
            "#!/bin/sh\ncat >/dev/null\n\
             echo '{{\"Username\":\"{user}\",\"Secret\":\"'\"$(cat {})\"'\"}}'\n",
            helper.password().display()
        );
        fs::write(&program, script)?;
        fs::set_permissions(&program, Permissions::from_mode(0o755))?;
        Ok(helper)
    }

    /// Copies its program into `folder`, for a `PATH` that [`helpers`] isn't on.
    pub fn be_installed(&self, folder: &Path) -> anyhow::Result<()> {
        fs::copy(self.folder.join(PROGRAM), folder.join(PROGRAM))?;
        Ok(())
    }

    /// From now on this password; an empty one is none.
    pub fn hand_out(&self, password: &str) -> anyhow::Result<()> {
        replace(&self.password(), password)
    }

    /// Has `config.json` name it for each of the `registries`, and nothing else.
    pub fn be_named(&self, config: &Path, registries: &[&str]) -> anyhow::Result<()> {
        write(config, "credHelpers", registries, &json!(HELPER))
    }

    fn password(&self) -> PathBuf {
        self.folder.join("password")
    }
}
