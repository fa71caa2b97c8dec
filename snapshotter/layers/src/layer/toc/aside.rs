//! FUSE mounts of an earlier process that show a layer by its TOC: an index has taken over since.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::spawn_blocking;

use super::open::{Error, open_aside};
use crate::layer::{Cause, Layer, LayerSpec, Open};
use crate::mount::{Left, Subject, error_chain};

/// Between attempts to get a TOC that readers wait for.
const PAUSE: Duration = Duration::from_secs(2);

impl Layer {
    /// Serves a mount that an earlier process left. In its own time, as bytes of the blob may have to be fetched;
    /// readers wait.
    pub(in crate::layer) fn take_over_aside(self: &Arc<Self>, left: Left, subject: Subject) {
        self.spawn(|this| async move {
            let spec = this.spec();
            let opened = this.open_aside(&spec, subject).await;
            let _turn = this.mounting.lock().await;
            let (layer, mount) = (spec.blob.digest, left.id);
            let open = match opened {
                Ok(open) if !this.is_absent() => open,
                Ok(_) => return this.shared.mounts.discard(left),
                Err(error) => {
                    tracing::error!(%layer, image = spec.image, mount, error = error_chain(&error),
                        "a mount of an earlier process shows the layer by another index, containers that use it get errors");
                    return this.shared.mounts.discard(left);
                }
            };
            let server = Arc::clone(&this);
            let serve = move || server.enter_left(server.serve(left, &open)?, false);
            let served = spawn_blocking(serve).await.unwrap_or(Err(Cause::Interrupted));
            if let Err(error @ Cause::Mount { .. }) = served {
                tracing::error!(%layer, image = spec.image, mount, error = error_chain(&error),
                    "a mount of an earlier process not taken over");
            }
        });
    }

    /// Opens the layer by the TOC that makes it `subject`, trying again until the deadline: readers wait.
    async fn open_aside(&self, spec: &LayerSpec, subject: Subject) -> Result<Open, Error> {
        let (started, deadline) = (Instant::now(), self.shared.config.deadline);
        loop {
            match open_aside(&self.shared, spec, subject).await {
                Err(Error::Fetch { .. }) if started.elapsed() + PAUSE < deadline => {
                    tokio::time::sleep(PAUSE).await;
                }
                opened => return opened,
            }
        }
    }
}
