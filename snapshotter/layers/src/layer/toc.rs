//! A layer mounted by the table of contents (TOC) inside its blob, on the image author's word.
//!
//! Owns: the way from such a mount to the index that counts.
//! Does not own: how a layer is opened by its TOC ([`open`]), what an earlier process left of such mounts ([`aside`]),
//! what TOCs look like (see [`skimmer_index::toc`]).
//!
//! Invariants:
//! - A TOC makes no index: nothing of it outlives the mount but bytes that are checked once more. The
//!   layer's index is the one that its pull-through builds. What a later process is left of the mount it serves by the
//!   TOC again, beside the index.
//! - A reader gets a chunk only if it has the digest that the TOC gives; the layer counts as complete
//!   only if SHA-256, DiffID and the tar have proved the TOC right.
//! - Who was caught once is not believed again.

mod aside;
mod open;

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use skimmer_cache::Class;
use skimmer_index::tar::Limits;
use skimmer_index::toc::{self, FOOTER_LEN, Toc};
use skimmer_index::tree::Tree;
use skimmer_proto::Digest;
use tokio::task::spawn_blocking;

use super::complete::RUN;
use super::{Cause, Failure, Layer, Open, VerifyError};
use crate::mount::{Mount, error_chain};
use crate::state::Event;
use open::{Error, bytes_of, open_alone};

impl Layer {
    /// Opens a layer without an index by its TOC, if that is to be trusted and there is one.
    pub(super) async fn open_by_toc(&self) -> Option<Open> {
        let (config, spec) = (&self.shared.config, self.spec());
        if !config.trust_toc || spec.blob.len < config.min_layer_bytes {
            return None;
        }
        match open_alone(&self.shared, &spec).await {
            Ok(open) => open,
            Err(Error::Wrong) => None,
            Err(error) => {
                tracing::warn!(layer = %spec.blob.digest, image = spec.image, error = error_chain(&error),
                    "layer not mounted by the table of contents inside its blob, pulling it through");
                None
            }
        }
    }

    /// Pulls a layer through that is mounted by the TOC `toc`, and checks that. From then on the
    /// layer is mounted by its own index; what is mounted stays as it is.
    pub(super) async fn replace_toc(
        self: &Arc<Self>,
        lazy: &Open,
        toc: Digest,
    ) -> Result<(), Failure> {
        let spec = self.spec();
        let turn = self.shared.pulls.queue().come().await;
        let _turn = turn.ok_or_else(|| self.failure(Cause::Interrupted))?;
        let _writer = self.shared.writer(spec.blob.digest).await;
        let (open, tree) = match Open::pull(&self.shared, &spec, Class::Background).await {
            Ok(pulled) => pulled,
            Err(cause) if is_wrong_layer(&cause) => {
                self.shared.record_wrong_toc(spec.blob.digest);
                return Err(self.purge(lazy, cause).await);
            }
            Err(cause) => return Err(self.failure(cause)),
        };
        let open = Arc::new(open);
        let (proved, limits) = (Arc::clone(&open), self.shared.config.limits.clone());
        let checked = spawn_blocking(move || check(&proved, toc, &tree, limits)).await;
        match checked.unwrap_or(Err(Cause::Interrupted)) {
            Ok(()) => {
                let turn = self.mounting.lock().await;
                self.apply(Event::Completed, Some(open));
                drop(turn);
                self.outlive(lazy).await;
                Ok(())
            }
            // The index that was built is proved: the next to want the layer gets the truth.
            Err(cause) => {
                self.shared.record_wrong_toc(spec.blob.digest);
                lazy.condemn().await;
                Err(self.expose(cause))
            }
        }
    }

    /// What the kernel serves by a TOC that has been proved it serves alone from now on: the next process will know the
    /// layer by its index only. The blob is all here.
    async fn outlive(&self, lazy: &Open) {
        if !self.core().former.iter().any(Mount::is_lazy) {
            return;
        }
        let chunks = lazy.fill.index().chunks.len();
        for first in (0..chunks).step_by(RUN) {
            let run = first..chunks.min(first + RUN);
            if let Err(error) = lazy.fill.run(run, Class::Background).await {
                tracing::warn!(layer = %self.digest(), error = error_chain(&*error),
                    "containers that were started by a table of contents get errors once skimmerd has been started anew");
                return;
            }
        }
        let fill = Arc::clone(&lazy.fill);
        let synced = spawn_blocking(move || fill.data().file().sync_data()).await;
        if matches!(synced, Ok(Ok(()))) {
            let data = lazy.fill.data().file();
            self.core().former.iter_mut().for_each(|mount| mount.complete(data));
        }
    }
}

/// Bytes that aren't the blob say nothing of the layer.
fn is_wrong_layer(cause: &Cause) -> bool {
    matches!(cause, Cause::Pull { source } if source.is_wrong_layer() && !source.is_wrong_blob())
}

/// Checks that the TOC inside a proved blob is the one with the digest `toc`, and says what is in the
/// tar, whose tree is `tree`.
fn check(open: &Open, toc: Digest, tree: &Tree, limits: Limits) -> Result<(), Cause> {
    let failed = |source| Cause::Verify { source };
    let (blob, data) = (open.fill.blob(), open.fill.data().file());
    let read_failed = |source| failed(VerifyError::ReadBlob { source });
    let tail = bytes_of(blob, blob.len().saturating_sub(FOOTER_LEN)..blob.len());
    let place = toc::find(&tail.map_err(read_failed)?, blob.len());
    let place = place.ok_or_else(|| failed(VerifyError::OtherToc))?;
    let bytes = bytes_of(blob, place.blob.clone()).map_err(read_failed)?;
    let wrong = |source| failed(VerifyError::Toc { source: Box::new(source) });
    let found = toc::read(&place, &bytes).map_err(wrong)?;
    if found.digest() != toc {
        return Err(failed(VerifyError::OtherToc));
    }
    let toc = Toc::new(found, blob.len(), limits).map_err(wrong)?;
    toc.compare(tree, &mut |buffer, at| data.read_exact_at(buffer, at)).map_err(wrong)
}
