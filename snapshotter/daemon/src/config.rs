//! The daemon's configuration: a TOML file, every key with a default.
//!
//! `install/skimmerd.toml` lists and explains every key; a test keeps the two equal.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Everything the daemon keeps: snapshots, cache, metadata.
    pub root: PathBuf,
    pub snapshots: Snapshots,
    pub containerd: Containerd,
    pub registry: Registry,
    pub cache: Cache,
    pub index: Index,
    pub fetch: Fetch,
    pub background: Background,
    pub mount: Mount,
    pub fuse: Fuse,
    pub metrics: Metrics,
    pub log: Log,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Snapshots {
    /// Unix socket for containerd and for the `skimmer` command.
    pub address: PathBuf,
    /// How long a pull waits for a layer without an index.
    #[serde(with = "humantime_serde")]
    pub prepare_wait: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Containerd {
    /// containerd's own socket, for its content store.
    pub address: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Registry {
    /// containerd's `certs.d`.
    pub config_path: PathBuf,
    /// Docker's `config.json`.
    pub docker_config: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cache {
    /// 0: 80 % of the file system that holds `root`.
    pub quota_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Index {
    /// Smaller layers are pulled through even if they have an index.
    pub min_layer_bytes: u64,
    /// Whether a table of contents inside a blob is believed before the blob was read to its end.
    pub trust_toc: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fetch {
    /// How long a reader is kept waiting, over all retries, before it gets EIO.
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
    /// Connections per blob.
    pub connections: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Background {
    /// Whether lazily mounted layers are completed while nobody waits.
    pub enabled: bool,
    /// How long a layer has been mounted before that begins.
    #[serde(with = "humantime_serde")]
    pub delay: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    pub mode: MountMode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountMode {
    Auto,
    Fuse,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fuse {
    /// Threads that read requests, for each mount.
    pub threads: usize,
    /// Requests the kernel may have outstanding in the background, for each mount.
    pub max_background: u16,
    /// The kernel's read-ahead, for each mount.
    pub read_ahead_kib: u32,
    /// Reads that may wait for bytes at once, over all mounts.
    pub max_faults: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// Where `/metrics`, `/ready` and `/live` are served; empty: nowhere.
    pub address: String,
}

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

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/skimmer".into(),
            snapshots: Snapshots::default(),
            containerd: Containerd::default(),
            registry: Registry::default(),
            cache: Cache::default(),
            index: Index::default(),
            fetch: Fetch::default(),
            background: Background::default(),
            mount: Mount::default(),
            fuse: Fuse::default(),
            metrics: Metrics::default(),
            log: Log::default(),
        }
    }
}

impl Default for Snapshots {
    fn default() -> Self {
        Self { address: "/run/skimmer/skimmerd.sock".into(), prepare_wait: Duration::from_secs(60) }
    }
}

impl Default for Containerd {
    fn default() -> Self {
        Self { address: "/run/containerd/containerd.sock".into() }
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            config_path: "/etc/containerd/certs.d".into(),
            docker_config: "/root/.docker/config.json".into(),
        }
    }
}

#[expect(clippy::derivable_impls, reason = "the defaults stand together, each in words")]
impl Default for Cache {
    fn default() -> Self {
        Self { quota_bytes: 0 }
    }
}

impl Default for Index {
    fn default() -> Self {
        Self { min_layer_bytes: 1 << 20, trust_toc: false }
    }
}

impl Default for Fetch {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(300), connections: 4 }
    }
}

impl Default for Background {
    fn default() -> Self {
        Self { enabled: true, delay: Duration::from_secs(60) }
    }
}

impl Default for Mount {
    fn default() -> Self {
        Self { mode: MountMode::Auto }
    }
}

impl Default for Fuse {
    fn default() -> Self {
        Self { threads: 1, max_background: 64, read_ahead_kib: 1024, max_faults: 256 }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self { address: "127.0.0.1:4002".into() }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read configuration {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("configuration {path} is not valid TOML")]
    Syntax { path: PathBuf, source: Box<toml::de::Error> },
    #[error("configuration {path}: unknown key `{key}`; the nearest known one is `{nearest}`")]
    UnknownKey { path: PathBuf, key: String, nearest: String },
    #[error("configuration {path}: a value is not valid")]
    Value { path: PathBuf, source: Box<toml::de::Error> },
    #[error("configuration {path}: `{key}` must be at least 1")]
    Zero { path: PathBuf, key: &'static str },
}

impl Config {
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(path)
            .map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// `path` is for messages only.
    fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let path = path.to_owned();
        let table: toml::Table = match toml::from_str(text) {
            Ok(table) => table,
            Err(source) => return Err(Error::Syntax { path, source: source.into() }),
        };
        let known = known_keys();
        let mut given = Vec::new();
        keys_of(&table, "", &mut given);
        for key in given {
            let is_section = known.iter().any(|k| k.starts_with(&format!("{key}.")));
            if !known.contains(&key) && !is_section {
                return Err(Error::UnknownKey { path, nearest: nearest(&key, &known), key });
            }
        }
        // From the text, not the table, so that the message shows the line.
        let config: Self = match toml::from_str(text) {
            Ok(config) => config,
            Err(source) => return Err(Error::Value { path, source: source.into() }),
        };
        for (key, value) in [
            ("fetch.connections", config.fetch.connections),
            ("fuse.threads", config.fuse.threads),
            ("fuse.max_faults", config.fuse.max_faults),
            ("fuse.max_background", config.fuse.max_background.into()),
        ] {
            if value == 0 {
                return Err(Error::Zero { path, key });
            }
        }
        Ok(config)
    }
}

/// Dotted names of all keys, from the defaults.
fn known_keys() -> Vec<String> {
    let mut keys = Vec::new();
    if let Ok(table) = toml::Table::try_from(Config::default()) {
        keys_of(&table, "", &mut keys);
    }
    keys
}

fn keys_of(table: &toml::Table, prefix: &str, keys: &mut Vec<String>) {
    for (name, value) in table {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            toml::Value::Table(inner) if !inner.is_empty() => keys_of(inner, &key, keys),
            _ => keys.push(key),
        }
    }
}

/// The known key most like `key`, by the whole dotted name and by its last part.
fn nearest(key: &str, known: &[String]) -> String {
    let last = |k: &str| k.rsplit('.').next().unwrap_or(k).to_owned();
    known
        .iter()
        .map(|k| (strsim::jaro_winkler(key, k) + strsim::jaro_winkler(&last(key), &last(k)), k))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or_else(String::new, |(_, k)| k.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANNOTATED: &str = include_str!("../../../install/skimmerd.toml");

    fn parse(text: &str) -> Result<Config, Error> {
        Config::parse(Path::new("skimmerd.toml"), text)
    }

    #[test]
    fn annotated_file_holds_every_key_at_its_default() {
        assert_eq!(parse(ANNOTATED).unwrap(), Config::default());
        let mut listed = Vec::new();
        keys_of(&toml::from_str(ANNOTATED).unwrap(), "", &mut listed);
        listed.sort();
        let mut known = known_keys();
        known.sort();
        assert_eq!(listed, known);
    }

    #[test]
    fn every_key_is_explained_by_a_comment_above_it() {
        let mut lines = ANNOTATED.lines().peekable();
        while let Some(line) = lines.next() {
            if let Some(next) = lines.peek()
                && next.contains(" = ")
                && !next.starts_with('#')
            {
                assert!(line.starts_with('#'), "no comment above {next:?}");
            }
        }
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_key_is_named_with_its_nearest() {
        for (text, key, nearest) in [
            ("rot = '/x'", "rot", "root"),
            ("[cache]\nquota = 1", "cache.quota", "cache.quota_bytes"),
            ("[snapshot]\naddress = '/x'", "snapshot.address", "snapshots.address"),
            ("[fetch]\ndead_line = '1s'", "fetch.dead_line", "fetch.deadline"),
        ] {
            match parse(text) {
                Err(Error::UnknownKey { key: k, nearest: n, .. }) => {
                    assert_eq!((k.as_str(), n.as_str()), (key, nearest), "{text}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn bad_values_are_errors() {
        assert!(matches!(parse("["), Err(Error::Syntax { .. })));
        for text in [
            "root = 1",
            "[fetch]\ndeadline = 'soon'",
            "[mount]\nmode = 'magic'",
            "[cache]\nquota_bytes = -1",
        ] {
            assert!(matches!(parse(text), Err(Error::Value { .. })), "{text}");
        }
        assert!(matches!(
            parse("[fuse]\nthreads = 0"),
            Err(Error::Zero { key: "fuse.threads", .. })
        ));
    }
}
