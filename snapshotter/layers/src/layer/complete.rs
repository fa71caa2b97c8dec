//! Completing a lazily mounted layer: fetch what is missing, then verify the whole.

use std::sync::Arc;
use std::time::Duration;

use skimmer_cache::Class;

use super::verify::Whole;
use super::{Cause, Failure, Layer};
use crate::mount::error_chain;
use crate::state::{Event, State};

/// Chunks asked for at a time.
pub(super) const RUN: usize = 32;

/// After a failure the background tries again: at first after this, then after twice as long.
const PAUSE: Duration = Duration::from_secs(30);
const LONGEST_PAUSE: Duration = Duration::from_secs(1800);

impl Layer {
    /// Fetches every chunk that is missing, in the background class, and verifies the whole. A
    /// layer that turns out wrong is purged and fails.
    pub async fn complete(self: &Arc<Self>) -> Result<(), Failure> {
        self.ready().await?;
        let _turn = self.completing.lock().await;
        if matches!(self.state(), State::Local) {
            return Ok(());
        }
        let open = self.opened().ok_or_else(|| self.failure(Cause::Released))?;
        if let Some(toc) = open.toc {
            return self.replace_toc(&open, toc).await;
        }
        // Until it has been verified.
        let _keep = open.fill.data().keep();
        let chunks = open.fill.index().chunks.len();
        for first in (0..chunks).step_by(RUN) {
            let run = first..chunks.min(first + RUN);
            let filled = open.fill.run(run, Class::Background).await;
            filled.map_err(|source| self.failure(Cause::Fill { source }))?;
        }
        let (this, verified) = (Arc::clone(self), Arc::clone(&open));
        let verified = tokio::task::spawn_blocking(move || this.verify(&verified)).await;
        match verified.unwrap_or(Err(Cause::Interrupted)) {
            Ok(whole) => {
                if whole == Whole::Rebuilt {
                    self.publish(open.fill.blob().table());
                }
                self.apply(Event::Completed, None);
                self.hand_over();
                self.read_far_ahead();
                Ok(())
            }
            Err(cause @ Cause::Verify { .. }) => {
                if let Some(indexes) = self.shared.indexes.get() {
                    indexes.mismatch(&self.spec().blob);
                }
                Err(self.purge(&open, cause).await)
            }
            Err(cause) => Err(self.failure(cause)),
        }
    }

    /// Completes a layer that is too small to be worth its readers' waits.
    pub(super) fn complete_now(self: &Arc<Self>) {
        let layer = Arc::clone(self);
        self.shared.runtime.spawn(async move {
            if let Err(failure) = layer.complete().await {
                tracing::info!(layer = %failure.layer, image = failure.image, error = error_chain(&*failure),
                    "small layer not fetched at once; its bytes come when they are read");
            }
        });
    }

    /// Once the layer's first container has run for long enough, completes the layer.
    pub(crate) fn complete_later(self: &Arc<Self>) {
        let Some(delay) = self.shared.config.background_delay else { return };
        if matches!(self.state(), State::Local) {
            return;
        }
        let layer = Arc::downgrade(self);
        let turns = Arc::clone(&self.shared.background);
        self.shared.runtime.spawn(async move {
            let (mut pause, mut next) = (delay, PAUSE);
            loop {
                tokio::time::sleep(pause).await;
                let Ok(_turn) = turns.acquire().await else { return };
                let Some(layer) = layer.upgrade() else { return };
                if layer.mounted().is_none() {
                    return;
                }
                let Err(failure) = layer.complete().await else { return };
                if !layer.state().is_ready() {
                    return;
                }
                tracing::warn!(layer = %failure.layer, image = failure.image, error = error_chain(&*failure),
                    again_in_s = next.as_secs(), "layer not completed");
                (pause, next) = (next, (next * 2).min(LONGEST_PAUSE));
            }
        });
    }

    /// Forgets a layer whose index, piece table or TOC was wrong.
    pub(crate) async fn purge(self: &Arc<Self>, open: &super::Open, cause: Cause) -> Failure {
        open.purge(&self.shared).await;
        self.expose(cause)
    }

    /// Fails a layer that containers use and that is not what it was taken for.
    pub(super) fn expose(self: &Arc<Self>, cause: Cause) -> Failure {
        let failure = self.failure(cause);
        tracing::error!(layer = %failure.layer, image = failure.image, error = error_chain(&*failure),
            "a layer in use is not what it was taken for; containers may have read wrong bytes");
        self.apply(Event::Failed(Arc::clone(&failure)), None);
        failure
    }
}
