//! Images of which every layer has become complete, put into containerd's content store.
//!
//! Owns: which images that was done for.
//! Does not own: when layers become complete (they say so), how blobs are put there.

use std::collections::BTreeSet;
use std::time::Duration;

use skimmer_layers::{LayerSpec, Layers, Mode};
use skimmer_proto::Digest;
use skimmer_snapshots::inventory::{self, Installed};
use skimmer_snapshots::materialize::{Contents, Error};

use crate::node::{LEASE_TIME, Node, convert};

/// When containerd's images are looked at after a layer became complete: a pull records its image after the last one.
const LOOKS: [Duration; 3] =
    [Duration::from_secs(2), Duration::from_secs(10), Duration::from_secs(60)];

/// Puts what is complete into the content store, for as long as the daemon runs.
pub async fn materialize(node: Node) {
    let mut completed = node.layers.completed();
    let mut done = BTreeSet::new();
    loop {
        // What came while nobody looked counts as well, that before the last stop included.
        completed.mark_unchanged();
        for pause in LOOKS {
            tokio::time::sleep(pause).await;
            look(&node, &mut done).await;
        }
        if completed.changed().await.is_err() {
            return;
        }
    }
}

type Done = BTreeSet<(String, Digest)>;

async fn look(node: &Node, done: &mut Done) {
    let images = match inventory::images(&node.containerd, "").await {
        Ok(images) => images,
        Err(error) => {
            let error = convert::words(&error);
            tracing::info!(error, "containerd's images can't be looked at");
            return;
        }
    };
    let key = |image: &Installed| (image.namespace.clone(), image.manifest);
    let there: Done = images.iter().map(key).collect();
    done.retain(|known| there.contains(known));
    for image in images {
        if done.contains(&key(&image)) || !is_complete(&node.layers, &image).await {
            continue;
        }
        match put(node, &image).await {
            Ok(()) => {
                done.insert(key(&image));
            }
            Err(error) => {
                let (image, error) = (image.name, convert::words(&error));
                tracing::warn!(image, error, "a complete image is not in the content store");
            }
        }
    }
}

/// Whether nothing would have to be fetched for it: layers, and the blobs that they came from.
async fn is_complete(layers: &Layers, image: &Installed) -> bool {
    let specs: Vec<LayerSpec> = image.layers.iter().cloned().map(LayerSpec::from).collect();
    let every_blob = specs.len() == image.blobs.len() && !specs.is_empty();
    let layers = layers.clone();
    let complete = tokio::task::spawn_blocking(move || {
        specs.iter().all(|spec| {
            let status = layers.status(spec);
            status.is_ok_and(|s| s.mode == Mode::Local && s.blob_bytes_present == s.size)
        })
    });
    every_blob && complete.await.unwrap_or(false)
}

async fn put(node: &Node, image: &Installed) -> Result<(), Error> {
    let contents = Contents::of_installed(&node.containerd, image).await?;
    let kept = node.materializer.put(&image.namespace, &contents, LEASE_TIME).await?;
    kept.release().await
}
