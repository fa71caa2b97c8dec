//! Completing a lazily mounted layer: fetch what is missing, then verify the whole.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use skimmer_cache::{Blob, Class};
use skimmer_index::codec::Decoder;
use skimmer_index::index::{LayerIndex, Layout};
use skimmer_index::toc;
use skimmer_proto::Digest;

use super::{Cause, Failure, Layer, Open};
use crate::mount::error_chain;
use crate::state::{Event, State};

/// Chunks asked for at a time.
const RUN: usize = 16;

/// Read at a time when hashing.
const STEP_BYTES: usize = 1 << 20;

/// After a failure the background tries again: at first after this, then after twice as long.
const PAUSE: Duration = Duration::from_secs(30);
const LONGEST_PAUSE: Duration = Duration::from_secs(1800);

/// Why a complete layer isn't what it was taken for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read the blob")]
    ReadBlob { source: io::Error },
    #[error("read the data file")]
    ReadData { source: io::Error },
    #[error("decode the blob from end to end")]
    Decode { source: skimmer_index::codec::Error },
    #[error("the blob on disk has the digest {actual}: its piece table was wrong")]
    Digest { actual: Digest },
    #[error("the layer on disk has the DiffID {actual}, expected {expected}: its index was wrong")]
    DiffId { expected: Digest, actual: Digest },
    #[error("compare the table of contents by which it was mounted with its tar")]
    Toc { source: Box<toc::Error> },
    #[error("the table of contents by which it was mounted is not the one that is in the blob")]
    OtherToc,
}

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
            Ok(()) => {
                if !open.is_proved() {
                    self.publish(open.fill.blob().table());
                }
                self.apply(Event::Completed, None);
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
    pub(super) fn complete_later(self: &Arc<Self>) {
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

    /// Checks what is on disk against the digests of manifest and config, and remembers it.
    fn verify(&self, open: &Open) -> Result<(), Cause> {
        if !open.is_proved() {
            let failed = |source| Cause::Verify { source };
            let index = open.fill.index();
            let diff_id = match index.layout {
                Layout::Tar => hash_data(open.fill.data().file(), index).map_err(failed)?,
                Layout::Toc => hash_decoded(open.fill.blob(), index).map_err(failed)?,
            };
            let expected = self.spec().diff_id;
            if diff_id != expected {
                return Err(failed(Error::DiffId { expected, actual: diff_id }));
            }
            if open.fill.blob().is_complete() {
                check_blob(open.fill.blob()).map_err(failed)?;
            }
            self.shared.record_proved(self.digest())?;
        }
        open.checkpoint();
        Ok(())
    }

    /// Forgets a layer whose index, piece table or TOC was wrong.
    pub(crate) async fn purge(self: &Arc<Self>, open: &Open, cause: Cause) -> Failure {
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

/// SHA-256 of the data file's tar range.
fn hash_data(file: &File, index: &LayerIndex) -> Result<Digest, Error> {
    let read = |buffer: &mut [u8], at| file.read_exact_at(buffer, at);
    let mut hash = Sha256::new();
    each_step(index.tar_len, read, |bytes| hash.update(bytes))
        .map_err(|source| Error::ReadData { source })?;
    Ok(Digest::from_bytes(hash.finalize().into()))
}

/// SHA-256 of what the blob decodes to.
fn hash_decoded(blob: &Blob, index: &LayerIndex) -> Result<Digest, Error> {
    // A TOC layout leaves out what lies between files: headers and padding.
    let limit = index.tar_len.saturating_mul(4).saturating_add(1 << 30);
    let mut decoder = Decoder::new(limit);
    let mut hash = Sha256::new();
    let mut failed = None;
    let push = |bytes: &[u8]| {
        if failed.is_none() {
            failed = decoder.push(bytes, &mut |bytes| hash.update(bytes)).err();
        }
    };
    each_step(blob.len(), |buffer, at| blob.read_at(buffer, at), push)
        .map_err(|source| Error::ReadBlob { source })?;
    let decoded = failed.map_or(Ok(()), Err);
    decoded
        .and_then(|()| decoder.finish(&mut |bytes| hash.update(bytes)))
        .map_err(|source| Error::Decode { source })?;
    Ok(Digest::from_bytes(hash.finalize().into()))
}

/// Matches a blob whose bytes are all on disk with its digest.
fn check_blob(blob: &Blob) -> Result<(), Error> {
    let mut hash = Sha256::new();
    each_step(blob.len(), |buffer, at| blob.read_at(buffer, at), |bytes| hash.update(bytes))
        .map_err(|source| Error::ReadBlob { source })?;
    let actual = Digest::from_bytes(hash.finalize().into());
    if actual == blob.digest() { Ok(()) } else { Err(Error::Digest { actual }) }
}

/// Reads `0..len` with `read` and hands it to `take`, a step at a time.
fn each_step(
    len: u64,
    read: impl Fn(&mut [u8], u64) -> io::Result<()>,
    mut take: impl FnMut(&[u8]),
) -> io::Result<()> {
    let mut buffer = vec![0; STEP_BYTES];
    let mut at = 0;
    while at < len {
        let left = usize::try_from(len - at).unwrap_or(usize::MAX);
        let step = &mut buffer[..left.min(STEP_BYTES)];
        read(step, at)?;
        take(step);
        at += step.len() as u64;
    }
    Ok(())
}
