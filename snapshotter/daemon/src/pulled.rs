//! Manifests and configurations of images that containerd pulls by itself, kept for other nodes.
//!
//! Owns: which images that was done for.
//! Does not own: where documents are kept, and who may have them.

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use skimmer_proto::Digest;
use skimmer_snapshots::Binding;
use skimmer_snapshots::identify::ContentError;
use skimmer_snapshots::inventory::{self, Installed};

use crate::node::{Node, convert};

/// Until containerd is listened to again, when it has gone.
const AGAIN: Duration = Duration::from_secs(5);
/// Images that are remembered as done; all are forgotten when there are more.
const MAX_DONE: usize = 10_000;

/// Keeps the documents of the images whose layers are ours, for as long as the daemon runs.
pub async fn keep_documents(node: Node) {
    let mut done = BTreeSet::new();
    loop {
        if let Err(error) = follow(&node, &mut done).await {
            let error = convert::words(&error);
            tracing::debug!(error, "containerd doesn't say which images it records");
        }
        tokio::time::sleep(AGAIN).await;
    }
}

type Done = BTreeSet<(String, Vec<Digest>)>;

async fn follow(node: &Node, done: &mut Done) -> Result<(), ContentError> {
    let containerd = &node.containerd;
    let recorded = containerd.recorded_images().and_then(async |(namespace, name)| {
        Ok(Vec::from_iter(inventory::image(containerd, &namespace, &name).await?))
    });
    // Listened to first, so that none is missed.
    let there = stream::once(inventory::images(containerd, ""));
    let mut images = pin!(stream::select(recorded, there));
    while let Some(found) = images.next().await {
        for image in found? {
            keep(node, &image, done).await?;
        }
    }
    Ok(())
}

async fn keep(node: &Node, image: &Installed, done: &mut Done) -> Result<(), ContentError> {
    let key = (image.namespace.clone(), image.manifests.clone());
    let ours = |layer: &Binding| !node.layers.get(layer.blob.digest).is_empty();
    if done.contains(&key) || !image.layers.iter().any(ours) {
        return Ok(());
    }
    node.documents.keep_installed(&node.containerd, image).await?;
    if done.len() >= MAX_DONE {
        done.clear();
    }
    done.insert(key);
    Ok(())
}
