//! A node: a containerd and the skimmerd that it asks for snapshots.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use crate::command::wait_for;
use crate::containerd::{self, Containerd, Version};
use crate::ctr::unique;
use crate::image::Image;
use crate::scenario::Scenario;
use crate::skimmerd::{self, Skimmerd};
use crate::snapshots::{Snapshots, View};

/// How a node is set up.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Set before the names of both daemons, where a scenario has several nodes.
    pub name: String,
    pub skimmerd: skimmerd::Setup,
    pub pause_image: Option<String>,
    pub annotations: bool,
    /// containerd leaves the ids of containers in user namespaces to skimmer.
    pub remap_ids: bool,
    /// CRI uses overlayfs.
    pub plain_pods: bool,
    /// Added to containerd's configuration.
    pub more: String,
}

/// Both daemons, running.
pub struct Node {
    // Dropped in this order: containers first, then what serves their files.
    pub containerd: Containerd,
    pub skimmerd: Skimmerd,
}

impl Node {
    pub fn start(scenario: &Scenario, version: Version) -> anyhow::Result<Self> {
        Self::start_with(scenario, version, &Setup::default())
    }

    pub fn start_with(
        scenario: &Scenario,
        version: Version,
        setup: &Setup,
    ) -> anyhow::Result<Self> {
        let (containerd, skimmerd) =
            (format!("{}containerd", setup.name), format!("{}skimmerd", setup.name));
        let address = containerd::address_of(scenario, &containerd);
        let skimmerd = Skimmerd::start(scenario, &skimmerd, &address, &setup.skimmerd)?;
        let setup = containerd::Setup {
            skimmer: Some(skimmerd.address()),
            pause_image: setup.pause_image.clone(),
            annotations: setup.annotations,
            remap_ids: setup.remap_ids,
            plain_pods: setup.plain_pods,
            more: setup.more.clone(),
            configuration: None,
        };
        let containerd = Containerd::start_with(scenario, &containerd, version, &setup)?;
        Ok(Self { containerd, skimmerd })
    }

    /// Waits until containerd reaches skimmerd again after a restart: it tries anew only every few seconds.
    pub fn wait_connected(&self) -> anyhow::Result<()> {
        wait_connected(&self.containerd.address())
    }

    /// The snapshots of `snapshotter` in containerd.
    pub fn snapshots(&self, snapshotter: &str) -> anyhow::Result<Snapshots> {
        Snapshots::connect(&self.containerd.address(), snapshotter)
    }

    /// Mounts a pulled image's root file system, read-only, at `target`.
    pub fn view(&self, image: &Image, target: &Path) -> anyhow::Result<View> {
        let chains = image.chain_ids();
        self.snapshots("skimmer")?.view(chains.last().map_or("", String::as_str), target)
    }
}

/// Waits until the containerd at `address` reaches its skimmerd.
pub fn wait_connected(address: &Path) -> anyhow::Result<()> {
    let snapshots = || Snapshots::connect(address, "skimmer");
    // containerd answers what it can by itself; a new snapshot it can't.
    let key = format!("probe-{}", unique());
    // Else a garbage collection that is due takes it.
    let stays = HashMap::from([("containerd.io/gc.root".to_owned(), "probe".to_owned())]);
    wait_for("containerd reaches skimmerd", Duration::from_secs(30), || {
        snapshots().ok()?.prepare(&key, "", stays.clone()).ok()
    })?;
    snapshots()?.remove(&key)
}
