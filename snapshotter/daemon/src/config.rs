//! The daemon's configuration: a TOML file, every key with a default.
//!
//! `install/skimmerd.toml` lists and explains every key; a test keeps the two equal.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skimmer_service::log::Log;
use skimmer_service::settings::{self, Error};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Everything the daemon keeps: snapshots, cache, metadata.
    pub root: PathBuf,
    pub snapshots: Snapshots,
    pub containerd: Containerd,
    pub cri: Cri,
    pub registry: Registry,
    pub control_plane: ControlPlane,
    pub node: Node,
    pub identity: Identity,
    pub swarm: Swarm,
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
    /// When blobs are put into its content store unasked.
    pub materialize: Materialize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Materialize {
    Never,
    /// Once every layer of an image is complete.
    OnComplete,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cri {
    /// Unix socket for kubelet's `imageServiceEndpoint`; empty: none.
    pub address: PathBuf,
    /// Whether blobs are brought into containerd's store before it pulls.
    pub full: bool,
    /// How long the credentials of pulls are remembered.
    #[serde(with = "humantime_serde")]
    pub remember_credentials: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Registry {
    /// containerd's `certs.d`.
    pub config_path: PathBuf,
    /// Docker's `config.json`.
    pub docker_config: PathBuf,
    /// kubelet's CredentialProviderConfig; empty: none.
    pub credential_provider_config: PathBuf,
    /// The programs that it names.
    pub credential_provider_bin_dir: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ControlPlane {
    /// The manager's `host:port`; empty: this node stands alone.
    pub address: String,
    /// Holds the join token.
    pub token_file: PathBuf,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Where the node is, for the scheduler: traffic between zones is spared.
    pub zone: String,
    /// For people; empty: the host's name.
    pub name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Identity {
    /// How long after their end certificates are accepted while the control plane is away.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Swarm {
    /// A multiaddr.
    pub listen: String,
    /// 0: as much as the network takes.
    pub upload_bytes_per_second: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cache {
    /// 0: 80 % of the file system that holds `root`.
    pub quota_bytes: u64,
    /// How often everything cached is checked for bit rot; zero: never.
    #[serde(with = "humantime_serde")]
    pub scrub_interval: Duration,
    /// How fast; 0: as fast as the disk is idle.
    pub scrub_bytes_per_second: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Index {
    /// Smaller layers are pulled through even if they have an index.
    pub min_layer_bytes: u64,
    /// Whether a table of contents inside a blob is believed before the blob was read to its end.
    pub trust_toc: bool,
    /// Memory that the tree of one layer may take while its index is built.
    pub max_metadata_bytes: u64,
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
    /// The SELinux context of the files in mounted layers; empty for that of the file system's type.
    pub selinux_context: String,
    /// Who keeps the descriptors of mounts while no daemon runs.
    pub keeper: MountKeeper,
    /// Where `skimmerd hold` listens.
    pub holder_address: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountMode {
    Auto,
    Fuse,
    Kernel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountKeeper {
    Auto,
    Systemd,
    Holder,
    None,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Fuse {
    /// Threads that read requests, for each mount.
    pub threads: usize,
    /// Reads ahead that the kernel may have outstanding, for each mount.
    pub max_background: u16,
    /// The kernel's read-ahead, for each mount whose bytes are all here.
    pub read_ahead_kib: u32,
    /// The kernel's read-ahead, for each other mount.
    pub lazy_read_ahead_kib: u32,
    /// Reads that may wait for bytes at once, over all mounts.
    pub max_faults: usize,
    /// Whether the kernel may be asked to send again what a dead process left unanswered.
    pub resend: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// Where `/metrics`, `/ready` and `/live` are served; empty: nowhere.
    pub address: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/skimmer".into(),
            snapshots: Snapshots::default(),
            containerd: Containerd::default(),
            cri: Cri::default(),
            registry: Registry::default(),
            control_plane: ControlPlane::default(),
            node: Node::default(),
            identity: Identity::default(),
            swarm: Swarm::default(),
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
        Self { address: "/run/containerd/containerd.sock".into(), materialize: Materialize::Never }
    }
}

impl Default for Cri {
    fn default() -> Self {
        Self {
            address: PathBuf::new(),
            full: false,
            remember_credentials: Duration::from_secs(7 * 24 * 3600),
        }
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            config_path: "/etc/containerd/certs.d".into(),
            docker_config: "/root/.docker/config.json".into(),
            credential_provider_config: PathBuf::new(),
            credential_provider_bin_dir: "/usr/local/bin".into(),
        }
    }
}

impl Default for ControlPlane {
    fn default() -> Self {
        Self { address: String::new(), token_file: "/etc/skimmer/token".into() }
    }
}

impl Default for Identity {
    fn default() -> Self {
        Self { grace: Duration::from_secs(24 * 3600) }
    }
}

impl Default for Swarm {
    fn default() -> Self {
        Self { listen: "/ip4/0.0.0.0/tcp/4001".into(), upload_bytes_per_second: 0 }
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            quota_bytes: 0,
            scrub_interval: Duration::from_secs(14 * 24 * 3600),
            scrub_bytes_per_second: 20 << 20,
        }
    }
}

impl Default for Index {
    fn default() -> Self {
        Self { min_layer_bytes: 1 << 20, trust_toc: false, max_metadata_bytes: 2 << 30 }
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
        Self {
            mode: MountMode::Auto,
            selinux_context: String::new(),
            keeper: MountKeeper::Auto,
            holder_address: "/run/skimmer/hold.sock".into(),
        }
    }
}

impl Default for Fuse {
    fn default() -> Self {
        Self {
            threads: 1,
            max_background: 1024,
            read_ahead_kib: 1024,
            lazy_read_ahead_kib: 128,
            max_faults: 256,
            resend: true,
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self { address: "127.0.0.1:4002".into() }
    }
}

impl Config {
    /// # Errors
    /// If the file can't be read, or a key or a value isn't right; the message names it.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let config: Self = settings::load(path)?;
        config.check(path)?;
        Ok(config)
    }

    /// `path` is for messages only.
    fn check(&self, path: &Path) -> Result<(), Error> {
        settings::at_least_one(
            path,
            &[
                ("fetch.connections", self.fetch.connections),
                ("fuse.threads", self.fuse.threads),
                ("fuse.max_faults", self.fuse.max_faults),
                ("fuse.max_background", self.fuse.max_background.into()),
                (
                    "index.max_metadata_bytes",
                    usize::try_from(self.index.max_metadata_bytes).unwrap_or(usize::MAX),
                ),
            ],
        )?;
        let context = &self.mount.selinux_context;
        if context.is_empty() || is_selinux_context(context) {
            return Ok(());
        }
        let (key, expected) = ("mount.selinux_context", "user:role:type[:level]");
        Err(Error::Form { path: path.to_owned(), key, expected })
    }
}

/// Whether it has the form of one; which there are only the kernel's policy knows.
fn is_selinux_context(text: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"')
    };
    text.split(':').count() >= 3 && text.split(':').all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Error> {
        let path = Path::new("skimmerd.toml");
        let config: Config = settings::parse(path, text)?;
        config.check(path).map(|()| config)
    }

    #[test]
    fn the_annotated_file_is_the_defaults_explained() {
        let text = include_str!("../../../install/skimmerd.toml");
        settings::check_annotated::<Config>(text).unwrap();
    }

    #[test]
    fn an_unknown_key_is_named_with_its_nearest() {
        for (text, key, nearest) in [
            ("rot = '/x'", "rot", "root"),
            ("[cache]\nquota = 1", "cache.quota", "cache.quota_bytes"),
            ("[snapshot]\naddress = '/x'", "snapshot.address", "snapshots.address"),
            ("[cri]\nadress = '/x'", "cri.adress", "cri.address"),
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
        for (context, is_one) in [
            ("system_u:object_r:container_ro_file_t:s0", true),
            ("system_u:object_r:container_file_t:s0:c1,c2", true),
            ("container_file_t", false),
            ("a:b:c d", false),
            ("a:b:\\\"c", false),
            ("a::c", false),
        ] {
            let parsed = parse(&format!("[mount]\nselinux_context = \"{context}\""));
            assert_eq!(parsed.is_ok(), is_one, "{context}: {parsed:?}");
        }
    }
}
