//! From the pull to a container's first line of output, on a node that has nothing of the image.

use std::time::{Duration, Instant};

use crate::ctr::Pull;
use crate::debian::COMMAND;
use crate::node::Node;
use crate::world::World;

/// Who holds the image's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Skimmer,
    Overlayfs,
}

impl Way {
    /// containerd's name for it.
    pub fn snapshotter(self) -> &'static str {
        match self {
            Self::Skimmer => "skimmer",
            Self::Overlayfs => "overlayfs",
        }
    }
}

/// What a cold start took.
pub struct Start {
    pub pull: Duration,
    /// From the beginning of the pull.
    pub first_line: Duration,
    /// What the registry sent, all told.
    pub bytes: u64,
}

/// Pulls the world's image on a node that has nothing of it, and runs [`COMMAND`].
///
/// # Errors
/// Also if the container says anything else than it should, or somebody else fetched the layers.
pub fn measure(world: &World<'_>, node: &Node, way: Way) -> anyhow::Result<Start> {
    let (answered, sent) = (world.registry.requests().len(), world.registry.sent_of(&world.image));
    let start = Instant::now();
    node.containerd.pull(&Pull::new(&world.reference, way.snapshotter()))?;
    let pull = start.elapsed();
    let line =
        node.containerd.first_line(&world.reference, way.snapshotter(), "first", &COMMAND)?;
    let first_line = start.elapsed().min(pull + line.after);
    anyhow::ensure!(line.text == "1", "the container printed {:?} instead of 1", line.text);
    world.registry.settle()?;
    let fetched = world.registry.sent_of(&world.image);
    let (all, ours) = (fetched.bytes - sent.bytes, fetched.by_daemon - sent.by_daemon);
    match way {
        Way::Skimmer => {
            anyhow::ensure!(ours == all, "containerd fetched {} bytes of layers", all - ours)
        }
        Way::Overlayfs => anyhow::ensure!(ours == 0, "skimmerd fetched {ours} bytes of layers"),
    }
    Ok(Start { pull, first_line, bytes: world.registry.sent_since(answered) })
}
