//! What is cached: shown, given up, checked.

use std::ops::ControlFlow;
use std::time::SystemTime;

use skimmer_cache::{Cache, Entry, Prune};
use skimmer_layers::{Checked, Layers, error_chain};
use skimmer_proto::Digest;
use skimmer_proto::node::{
    CacheEntry, CacheRot, PruneCacheResponse, ShowCacheResponse, VerifyCacheProgress,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Answers, blocking, convert};

/// What is found wrong is told of so many digests.
const MOST_FOUND: usize = 1000;
/// Progress is told each time so many bytes have been read.
const PROGRESS_BYTES: u64 = 64 << 20;

pub async fn show(cache: &Cache) -> Result<ShowCacheResponse, Status> {
    let (cache, quota_bytes) = (cache.clone(), cache.usage().quota_bytes);
    let documents_bytes = cache.documents().bytes();
    let found = blocking(move || cache.entries()).await?;
    let mut entries = found.map_err(|error| Status::internal(convert::words(&error)))?;
    entries.sort_by_key(|entry| (std::cmp::Reverse(entry.bytes), entry.digest, entry.what));
    let used_bytes = entries.iter().map(|entry| entry.bytes).sum();
    let entries = entries.into_iter().map(entry).collect();
    Ok(ShowCacheResponse { used_bytes, quota_bytes, documents_bytes, entries })
}

pub async fn prune(cache: &Cache, all: bool) -> Result<PruneCacheResponse, Status> {
    let freed = cache.prune(if all { Prune::All } else { Prune::Unused }).await;
    let freed = freed.map_err(|error| Status::internal(convert::words(&error)))?;
    let used_bytes = cache.usage().used_bytes;
    Ok(PruneCacheResponse { freed: freed.into_iter().map(entry).collect(), used_bytes })
}

/// Checks everything, as long as somebody listens.
pub fn verify(layers: Layers, cache: Cache) -> Answers<VerifyCacheProgress> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::task::spawn_blocking(move || match total(&cache) {
        Ok((all, total_bytes)) => check_all(&layers, &all, total_bytes, &sender),
        Err(error) => drop(sender.blocking_send(Err(Status::internal(convert::words(&error))))),
    });
    Box::pin(ReceiverStream::new(receiver))
}

fn total(cache: &Cache) -> Result<(Vec<Digest>, u64), skimmer_cache::cache::Error> {
    let total = cache.entries()?.iter().map(|entry| entry.bytes).sum();
    Ok((cache.on_disk()?, total))
}

fn check_all(
    layers: &Layers,
    all: &[Digest],
    total_bytes: u64,
    listener: &mpsc::Sender<Result<VerifyCacheProgress, Status>>,
) {
    let mut progress = VerifyCacheProgress { total_bytes, ..VerifyCacheProgress::default() };
    for digest in all {
        progress.digest = digest.to_string();
        let mut told = progress.checked_bytes;
        let mut pause = |bytes| {
            progress.checked_bytes += bytes;
            if progress.checked_bytes - told < PROGRESS_BYTES {
                return ControlFlow::Continue(());
            }
            told = progress.checked_bytes;
            tell(listener, &progress)
        };
        let found = layers.check(*digest, &mut pause);
        match found {
            Ok(found) => progress.found.extend(rot(*digest, &found)),
            Err(error) => {
                tracing::warn!(blob = %digest, error = error_chain(&error), "not checked");
                progress.failures += 1;
            }
        }
        progress.found.truncate(MOST_FOUND);
        if tell(listener, &progress).is_break() {
            return;
        }
    }
    progress.done = true;
    let _ = tell(listener, &progress);
}

fn tell(
    listener: &mpsc::Sender<Result<VerifyCacheProgress, Status>>,
    progress: &VerifyCacheProgress,
) -> ControlFlow<()> {
    match listener.blocking_send(Ok(progress.clone())) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_gone) => ControlFlow::Break(()),
    }
}

fn rot(digest: Digest, found: &Checked) -> Option<CacheRot> {
    let Checked { pieces, chunks, rewritten, objects, .. } = *found;
    let wrong = pieces + chunks + objects > 0;
    wrong.then(|| CacheRot { digest: digest.to_string(), pieces, chunks, rewritten, objects })
}

fn entry(entry: Entry) -> CacheEntry {
    let since = entry.last_use.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    CacheEntry {
        digest: entry.digest.to_string(),
        what: entry.what.to_owned(),
        bytes: entry.bytes,
        in_use: entry.in_use,
        last_use_s: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
    }
}
