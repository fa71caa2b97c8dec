//! Images of which every layer is complete, put into containerd's content store.
//!
//! Owns: which images that was done for, and when containerd's images are looked at.
//! Does not own: when layers become complete and images are recorded (they say so), how blobs are put there.
//!
//! Invariant: what can't be put is tried again, as long as containerd has the image.

mod done;
mod looks;

use std::pin::pin;
use std::time::Duration;

use futures::TryStreamExt as _;
use skimmer_layers::{LayerSpec, Layers, Mode};
use skimmer_snapshots::inventory::{self, Installed};
use skimmer_snapshots::materialize::{Contents, Error};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

use crate::node::{LEASE_TIME, Node, convert};

use done::Done;
use looks::Looks;

/// Until containerd is listened to again, when it has gone.
const AGAIN: Duration = Duration::from_secs(5);

/// Puts what is complete into the content store, for as long as the daemon runs.
pub async fn materialize(node: Node) {
    let news = Notify::new();
    tokio::select! {
        () = look_forever(&node, &news) => {}
        () = hear_completed(&node, &news) => {}
        () = hear_recorded(&node, &news) => {}
    }
}

async fn look_forever(node: &Node, news: &Notify) {
    let mut done = Done::default();
    let mut looks = Looks::new(Instant::now());
    loop {
        tokio::select! {
            () = news.notified() => looks.heard(Instant::now()),
            () = sleep_until(looks.next()) => {
                look(node, &mut done).await;
                looks.looked(Instant::now());
            }
        }
    }
}

async fn hear_completed(node: &Node, news: &Notify) {
    let mut completed = node.layers.completed();
    while completed.changed().await.is_ok() {
        news.notify_one();
    }
}

/// An image may be new whose layers have been complete for long. What is recorded while nobody listens is found by the
/// looks that need no news.
async fn hear_recorded(node: &Node, news: &Notify) {
    loop {
        let mut recorded = pin!(node.containerd.recorded_images());
        while let Ok(Some(_)) = recorded.try_next().await {
            news.notify_one();
        }
        sleep(AGAIN).await;
    }
}

async fn look(node: &Node, done: &mut Done) {
    let images = match inventory::images(&node.containerd, "").await {
        Ok(images) => images,
        Err(error) => {
            let error = convert::words(&error);
            tracing::info!(error, "containerd's images can't be looked at");
            return;
        }
    };
    for image in done.missing(images) {
        if !is_complete(&node.layers, &image).await {
            continue;
        }
        match put(node, &image).await {
            Ok(()) => done.insert(&image),
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
