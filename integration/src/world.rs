//! A registry with an image, and nodes that have seen nothing of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::command::{self, PATIENCE};
use crate::containerd::Version;
use crate::image::Image;
use crate::network::Host;
use crate::node::{Node, Setup};
use crate::registry::{Auth, Registry};
use crate::scenario::Scenario;
use crate::skimmerd::MountMode;
use crate::{skimmerd, sweep};

/// What nodes reach.
pub struct World<'a> {
    pub scenario: &'a Scenario,
    pub registry: Registry,
    pub image: Image,
    pub reference: String,
    /// Who serves mounts on its nodes, if that isn't left to the whole run.
    pub mounts: Option<MountMode>,
    /// Smaller layers are pulled through.
    pub min_layer_bytes: u64,
    /// How long a layer is in use before it is completed.
    pub background: Option<Duration>,
    /// Whether a holder keeps the descriptors of mounts on its nodes.
    pub holder: bool,
    bits_per_second: Option<u64>,
    // After the registry that runs on it.
    _host: Option<Host>,
}

impl<'a> World<'a> {
    /// The registry is on this machine.
    pub fn near(scenario: &'a Scenario, image: Image) -> anyhow::Result<Self> {
        Self::new(scenario, image, None)
    }

    /// The registry is behind a link of that speed, if one is given.
    pub fn new(
        scenario: &'a Scenario,
        image: Image,
        bits_per_second: Option<u64>,
    ) -> anyhow::Result<Self> {
        let host = bits_per_second.map(|rate| Host::new(Some(rate))).transpose()?;
        let registry = Registry::start_with(scenario, "registry", &Auth::Anyone, host.as_ref())?;
        let reference = registry.add(&image)?;
        Ok(Self {
            scenario,
            registry,
            image,
            reference,
            mounts: None,
            min_layer_bytes: 1 << 20,
            background: Some(Duration::from_secs(60)),
            holder: false,
            bits_per_second,
            _host: host,
        })
    }

    /// A node with skimmerd's default configuration, on which nothing was ever pulled; the page cache is cold, except
    /// for the registry's blobs, which are another machine's business.
    pub fn cold_node(&self, indexes: Option<&Path>) -> anyhow::Result<Node> {
        for name in ["containerd", "skimmerd"] {
            sweep::remove(&self.scenario.path(name))?;
        }
        let node = Node::start_with(self.scenario, Version::V2, &self.setup())?;
        if let Some(folder) = indexes {
            node.skimmerd.import_indexes(folder)?;
        }
        drop_caches()?;
        for blob in self.image.blobs() {
            std::io::copy(&mut std::fs::File::open(&blob.path)?, &mut std::io::sink())
                .with_context(|| format!("read {}", blob.path.display()))?;
        }
        Ok(node)
    }

    /// The indexes of the image's layers, built by a node of its own that is gone afterwards.
    pub fn indexes(&self) -> anyhow::Result<PathBuf> {
        let folder = self.scenario.path("indexes");
        let node = self.cold_node(None)?;
        command::output_of(
            &mut node.skimmerd.skimmer(&["index", "build", &self.reference])?,
            PATIENCE * 5,
        )?;
        node.skimmerd.export_indexes(&self.image, &folder)?;
        Ok(folder)
    }

    /// The speed of the link to the registry, if it is shaped.
    pub fn bits_per_second(&self) -> Option<u64> {
        self.bits_per_second
    }

    /// skimmerd as it comes.
    fn setup(&self) -> Setup {
        let skimmerd = skimmerd::Setup {
            min_layer_bytes: self.min_layer_bytes,
            background: self.background,
            deadline: Duration::from_secs(300),
            mounts: self.mounts,
            holder: self.holder,
            ..skimmerd::Setup::default()
        };
        Setup { skimmerd, ..Setup::default() }
    }

    /// What is said about the circumstances.
    pub fn settings(&self) -> anyhow::Result<Value> {
        let daemon = self.setup().skimmerd;
        Ok(json!({
            "image": self.image.name, "layers": self.image.layers.len(),
            "compressed_bytes": self.image.compressed_bytes(),
            "link_mbit_s": self.bits_per_second.map(|rate| rate / 1_000_000),
            "containerd": Version::V2.number()?,
            "skimmerd": {
                "index.min_layer_bytes": daemon.min_layer_bytes,
                "background.delay_s": daemon.background.map(|delay| delay.as_secs()),
                "snapshots.prepare_wait_s": daemon.prepare_wait.as_secs(),
            },
        }))
    }
}

/// Makes the kernel forget all file contents, names and inodes that it can read again (proc(5), `drop_caches`).
pub fn drop_caches() -> anyhow::Result<()> {
    nix::unistd::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("drop the page cache")
}
