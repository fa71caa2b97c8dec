//! Looking from time to time which data files the page cache has let go of, so that what the kernel serves of them is
//! cached once instead of twice.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::{Layers, Owner};

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(10);

/// For as long as there are layers.
pub async fn run(owner: Weak<Owner>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(layers) = owner.upgrade().map(|owner| Layers { owner }) else { return };
        let looked = tokio::task::spawn_blocking(move || {
            let all: Vec<_> = layers.shared().layers().values().map(Arc::clone).collect();
            all.iter().for_each(|layer| layer.read_directly());
        });
        if let Err(error) = looked.await {
            tracing::error!(%error, "looking through the page cache was interrupted");
        }
    }
}
