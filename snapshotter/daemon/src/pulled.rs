//! Manifests and configurations of images that containerd pulls by itself, kept for other nodes.
//!
//! Owns: which images that was done for.
//! Does not own: where documents are kept, and who may have them.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::time::{Duration, Instant};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use skimmer_proto::Digest;
use skimmer_snapshots::Binding;
use skimmer_snapshots::identify::ContentError;
use skimmer_snapshots::inventory::{self, Installed};
use tokio::time::timeout;

use crate::node::{Node, convert};

/// Until containerd is listened to again, when it has gone; and until images are looked at again whose layers aren't
/// ours yet.
const AGAIN: Duration = Duration::from_secs(5);
/// How long they are: containerd's client records an image before it unpacks it.
const UNPACKED: Duration = Duration::from_secs(600);
/// Images that are remembered as done, or to be looked at again; all are forgotten when there are more.
const MAX_IMAGES: usize = 10_000;

/// Keeps the documents of the images whose layers are ours, for as long as the daemon runs.
pub async fn keep_documents(node: Node) {
    let mut images = Images::default();
    loop {
        if let Err(error) = follow(&node, &mut images).await {
            let error = convert::words(&error);
            tracing::debug!(error, "containerd doesn't say which images it records");
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// See [`Installed::key`].
type Key = (String, Vec<Digest>);

#[derive(Default)]
struct Images {
    done: BTreeSet<Key>,
    /// With the time when they were first seen.
    others: BTreeMap<Key, (Instant, Installed)>,
}

async fn follow(node: &Node, images: &mut Images) -> Result<(), ContentError> {
    let containerd = &node.containerd;
    let recorded = containerd.recorded_images().and_then(async |(namespace, name)| {
        Ok(Vec::from_iter(inventory::image(containerd, &namespace, &name).await?))
    });
    // Listened to first, so that none is missed.
    let there = stream::once(inventory::images(containerd, ""));
    let mut found = pin!(stream::select(recorded, there));
    loop {
        match timeout(AGAIN, found.next()).await {
            Ok(None) => return Ok(()),
            Ok(Some(found)) => {
                for image in found? {
                    images.look(node, image, Instant::now()).await;
                }
            }
            Err(_elapsed) => images.look_again(node).await,
        }
    }
}

impl Images {
    async fn look_again(&mut self, node: &Node) {
        for (since, image) in std::mem::take(&mut self.others).into_values() {
            if since.elapsed() < UNPACKED {
                self.look(node, image, since).await;
            }
        }
    }

    /// `since`: when it was first seen.
    async fn look(&mut self, node: &Node, image: Installed, since: Instant) {
        let key = image.key();
        if self.done.contains(&key) {
            return;
        }
        if self.done.len() + self.others.len() >= MAX_IMAGES {
            (self.done, self.others) = (BTreeSet::new(), BTreeMap::new());
        }
        let ours = |layer: &Binding| !node.layers.get(layer.blob.digest).is_empty();
        if !image.layers.iter().any(ours) {
            self.others.insert(key, (since, image));
            return;
        }
        if let Err(error) = node.documents.keep_installed(&node.containerd, &image).await {
            let (image, error) = (image.name, convert::words(&error));
            tracing::info!(image, error, "an image's documents are not kept for other nodes");
        }
        self.done.insert(key);
    }
}
