//! The control plane's configuration: a TOML file, every key with a default.
//!
//! `install/skimmer-control.toml` lists and explains every key; a test keeps the two equal.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use skimmer_service::log::Log;
use skimmer_service::settings;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    pub store: Store,
    pub admin: Admin,
    pub manager: Manager,
    pub scheduler: Scheduler,
    pub identity: Identity,
    pub grants: Grants,
    pub metrics: Metrics,
    pub log: Log,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Store {
    /// The SQLite file.
    pub path: PathBuf,
    /// How often what other processes wrote is looked for.
    #[serde(with = "humantime_serde")]
    pub refresh: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Admin {
    /// Unix socket for the `skimmer` command.
    pub address: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Manager {
    /// gRPC: enrolment, renewal, grants.
    pub address: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scheduler {
    /// gRPC: one stream a node.
    pub address: String,
    /// `host:port` that nodes are told; empty: the address at which they reached the manager, with the port above.
    pub advertise: Vec<String>,
    /// `host:port` at which other schedulers on the same store reach this one; empty: 127.0.0.1, or the
    /// address above if that is one, with the port above.
    pub replica_address: String,
    /// Messages that may wait for a node before its stream is closed.
    pub queue: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Identity {
    /// Of membership certificates.
    #[serde(with = "humantime_serde")]
    pub certificate_lifetime: Duration,
    /// How long after its end a certificate is still renewed.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Grants {
    #[serde(with = "humantime_serde")]
    pub lifetime: Duration,
    /// Registries, `host:port`, that are asked without TLS.
    pub plain_http: Vec<String>,
    /// PEM: authorities of registries, besides the system's.
    pub ca_files: Vec<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// Where `/metrics`, `/ready` and `/live` are served; empty: nowhere.
    pub address: String,
}

impl Default for Store {
    fn default() -> Self {
        let path = "/var/lib/skimmer-control/control.db".into();
        Self { path, refresh: Duration::from_secs(2) }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self { address: "/run/skimmer/control.sock".into() }
    }
}

impl Default for Manager {
    fn default() -> Self {
        Self { address: "0.0.0.0:65003".into() }
    }
}

impl Default for Scheduler {
    fn default() -> Self {
        Self {
            address: "0.0.0.0:8002".into(),
            advertise: Vec::new(),
            replica_address: String::new(),
            queue: 4096,
        }
    }
}

impl Default for Identity {
    fn default() -> Self {
        let hour = Duration::from_secs(3600);
        Self { certificate_lifetime: hour, grace: 24 * hour }
    }
}

impl Default for Grants {
    fn default() -> Self {
        let lifetime = Duration::from_secs(3600);
        Self { lifetime, plain_http: Vec::new(), ca_files: Vec::new() }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self { address: "127.0.0.1:8003".into() }
    }
}

impl Config {
    /// # Errors
    /// If the file can't be read, or a key or a value isn't right; the message names it.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let config: Self = settings::load(path)?;
        config.check(path)?;
        Ok(config)
    }

    /// `path` is for messages only.
    fn check(&self, path: &Path) -> anyhow::Result<()> {
        settings::at_least_one(path, &[("scheduler.queue", self.scheduler.queue)])?;
        for (key, duration) in [
            ("store.refresh", self.store.refresh),
            ("identity.certificate_lifetime", self.identity.certificate_lifetime),
            ("grants.lifetime", self.grants.lifetime),
        ] {
            anyhow::ensure!(
                duration >= Duration::from_secs(1),
                "configuration {}: `{key}` must be at least 1s",
                path.display()
            );
        }
        let replica = Some(&self.scheduler.replica_address).filter(|address| !address.is_empty());
        let named = [
            ("advertise", self.scheduler.advertise.iter().collect()),
            ("replica_address", Vec::from_iter(replica)),
        ];
        for (key, address) in named.iter().flat_map(|(key, all)| all.iter().map(move |a| (key, a)))
        {
            let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            port.with_context(|| {
                format!(
                    "configuration {}: `scheduler.{key}` has {address:?}, which isn't host:port",
                    path.display()
                )
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> anyhow::Result<Config> {
        let path = Path::new("skimmer-control.toml");
        let config: Config = settings::parse(path, text)?;
        config.check(path).map(|()| config)
    }

    #[test]
    fn the_annotated_file_is_the_defaults_explained() {
        let text = include_str!("../../../install/skimmer-control.toml");
        settings::check_annotated::<Config>(text).unwrap();
    }

    #[test]
    fn wrong_keys_and_values_are_named() {
        for (text, expected) in [
            ("[scheduler]\nadress = 'x'", "nearest known one is `scheduler.address`"),
            ("[identity]\ngrace_period = '1h'", "nearest known one is `identity.grace`"),
            ("[scheduler]\nqueue = 0", "`scheduler.queue` must be at least 1"),
            ("[identity]\ncertificate_lifetime = '10ms'", "must be at least 1s"),
            ("[scheduler]\nadvertise = ['host']", "which isn't host:port"),
            ("[scheduler]\nreplica_address = 'host'", "`scheduler.replica_address` has"),
            ("[grants]\nlifetime = 'soon'", "a value is not valid"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert_eq!(parse("").unwrap(), Config::default());
    }
}
