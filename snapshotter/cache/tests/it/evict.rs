//! What goes when the quota is reached, and what stays.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prometheus_client::registry::Registry;
use skimmer_cache::{Cache, Config, Prune, Sources, Spans};
use skimmer_proto::{Digest, Geometry, PieceTable};

use crate::twin::{Twin, bytes, config, open, pulled, table};

const MIB: u64 = 1 << 20;

/// A cache whose upkeep is quick.
fn small(root: &Path, twin: &Arc<Twin>, quota_bytes: u64) -> Cache {
    let config = Config {
        quota_bytes: Some(quota_bytes),
        checkpoint_interval: Duration::from_millis(5),
        eviction_delay: Duration::ZERO,
        ..config(root)
    };
    Cache::open(config, Sources::only(Arc::clone(twin) as _), &mut Registry::default()).unwrap()
}

async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if reached() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

/// A verified blob of 2 MiB, on disk.
async fn blob(cache: &Cache, twin: &Twin, seed: u64) -> Digest {
    let content = bytes(2 << 20, seed);
    let reference = twin.add(&content);
    let digest = reference.digest;
    let blob = cache.blob(reference).unwrap();
    pulled(&blob).await.unwrap();
    blob.prove(table(&content)).unwrap();
    cache.drain().await.unwrap();
    digest
}

/// A layer with 2 MiB of data, on disk.
async fn layer(cache: &Cache, name: &[u8]) -> Digest {
    let (blob, index) = (Digest::of(name), b"index");
    let geometry = Geometry::of(0).unwrap();
    let table = PieceTable::new(geometry, blob, blob, Digest::of(index), vec![]).unwrap();
    let files = cache.layer(blob).unwrap();
    files.store(index, &table, b"inodes").unwrap();
    let data = files.open_data(2 * MIB, 2).unwrap();
    data.file().write_all_at(&bytes(2 << 20, 1), 0).unwrap();
    data.mark(0);
    data.mark(1);
    drop(data);
    cache.drain().await.unwrap();
    blob
}

fn dir(root: &Path, kind: &str, digest: Digest) -> std::path::PathBuf {
    root.join(kind).join(digest.hex())
}

fn age(dir: &Path, hours: u64) {
    let then = SystemTime::now() - Duration::from_secs(hours * 3600);
    File::open(dir).unwrap().set_modified(then).unwrap();
}

#[tokio::test]
async fn blobs_go_before_layers_and_the_least_recently_used_first() {
    let (root, twin) = (tempfile::tempdir().unwrap(), Twin::honest());
    let root = root.path();
    let (old, new, unused, pinned);
    {
        let cache = open(root, &twin);
        old = blob(&cache, &twin, 1).await;
        new = blob(&cache, &twin, 2).await;
        unused = layer(&cache, b"unused").await;
        pinned = layer(&cache, b"pinned").await;
    }
    let has = |kind, digest, name: &str| dir(root, kind, digest).join(name).exists();
    age(&dir(root, "blobs-v1", old), 1);
    age(&dir(root, "layers-v1", unused), 9);
    age(&dir(root, "layers-v1", pinned), 10);
    {
        let cache = small(root, &twin, 7 * MIB);
        until("the old blob is evicted", || !has("blobs-v1", old, "data")).await;
        until("usage is known", || cache.usage().used_bytes.abs_diff(6 * MIB) < MIB / 4).await;
        assert!(has("blobs-v1", new, "data") && has("layers-v1", unused, "data"));
    }
    let cache = small(root, &twin, 3 * MIB);
    let pin = cache.pin_layer(pinned);
    until("the unused layer is evicted", || !has("layers-v1", unused, "data")).await;
    assert!(!has("blobs-v1", new, "data"));
    assert!(has("layers-v1", unused, "index"), "indexes are small");
    assert!(has("layers-v1", pinned, "data"));
    until("usage is known", || cache.usage().used_bytes.abs_diff(2 * MIB) < MIB / 4).await;
    cache.prune(Prune::Unused).await.unwrap();
    assert!(!dir(root, "layers-v1", unused).exists());
    let files = cache.layer(pinned).unwrap();
    assert!(files.open_data(2 * MIB, 2).unwrap().complete());
    drop(pin);
    cache.prune(Prune::Unused).await.unwrap();
    assert!(!dir(root, "layers-v1", pinned).exists());
    assert!(cache.usage().used_bytes < MIB);
    assert!(!files.open_data(2 * MIB, 2).unwrap().has(0));
}

/// Chunk `n` is the MiB number `n`.
struct Mebibytes;

impl Spans for Mebibytes {
    fn spans(&self, chunk: usize) -> Vec<Range<u64>> {
        let start = chunk as u64 * MIB;
        std::iter::once(start..start + MIB).collect()
    }
}

#[tokio::test]
async fn chunks_that_nobody_reads_of_a_layer_in_use_go_last() {
    let (root, twin) = (tempfile::tempdir().unwrap(), Twin::honest());
    let cache = small(root.path(), &twin, 12 * MIB);
    let unused = layer(&cache, b"unused").await;
    let used = Digest::of(b"used");
    let _pin = cache.pin_layer(used);
    let data = cache.layer(used).unwrap().open_data(20 * MIB, 20).unwrap();
    let spans: Arc<dyn Spans> = Arc::new(Mebibytes);
    data.allow_punching(Arc::downgrade(&spans));
    data.touch(0);
    let content = bytes(16 << 20, 8);
    data.file().write_all_at(&content, 0).unwrap();
    (0..16).for_each(|chunk| data.mark(chunk));
    until("within the quota", || {
        !dir(root.path(), "layers-v1", unused).join("data").exists() && data.present() < 13
    })
    .await;
    until("usage is known", || cache.usage().used_bytes <= 12 * MIB).await;
    assert!(data.present() >= 9, "no more than had to go: {}", data.present());
    assert!(data.has(0), "somebody reads that");
    for chunk in (0..16).filter(|chunk| data.has(*chunk)) {
        let mut back = vec![0; 1 << 20];
        data.file().read_exact_at(&mut back, chunk as u64 * MIB).unwrap();
        assert!(back == content[chunk << 20..(chunk + 1) << 20], "chunk {chunk}");
    }
    let before = data.present();
    cache.prune(Prune::Unused).await.unwrap();
    assert_eq!(data.present(), before, "it is in use");
}

#[tokio::test]
async fn what_holds_no_byte_goes_too() {
    let (root, twin) = (tempfile::tempdir().unwrap(), Twin::honest());
    let cache = open(root.path(), &twin);
    // As a process leaves it that dies when it has just begun.
    let left: Vec<_> = ["blobs-v1", "layers-v1"]
        .map(|part| dir(root.path(), part, Digest::of(part.as_bytes())))
        .to_vec();
    for dir in &left {
        std::fs::create_dir_all(dir).unwrap();
        File::create(dir.join("data")).unwrap().set_len(2 * MIB).unwrap();
    }
    cache.prune(Prune::Unused).await.unwrap();
    assert!(left.iter().all(|dir| !dir.exists()), "{left:?}");
}

#[tokio::test]
async fn what_is_open_stays() {
    let (root, twin) = (tempfile::tempdir().unwrap(), Twin::honest());
    let cache = open(root.path(), &twin);
    let digest = blob(&cache, &twin, 1).await;
    let other = blob(&cache, &twin, 2).await;
    let read = layer(&cache, b"read").await;
    let data = cache.layer(read).unwrap().open_data(2 * MIB, 2).unwrap();
    let held = cache.blob(twin.add(&bytes(2 << 20, 1))).unwrap();
    let gone = cache.prune(Prune::Unused).await.unwrap();
    let freed: u64 = gone.iter().map(|gone| gone.bytes).sum();
    assert!((2 * MIB..3 * MIB).contains(&freed), "{freed}");
    assert!(dir(root.path(), "blobs-v1", digest).exists());
    assert!(!dir(root.path(), "blobs-v1", other).exists());
    assert!(dir(root.path(), "layers-v1", read).join("data").exists());
    drop((data, held));
    cache.prune(Prune::Unused).await.unwrap();
    assert!(!dir(root.path(), "blobs-v1", digest).exists());
    // What was evicted is fetched again, as if it had never been there.
    let blob = cache.blob(twin.add(&bytes(2 << 20, 1))).unwrap();
    assert_eq!(blob.bytes_present(), 0);
    assert!(pulled(&blob).await.unwrap() == bytes(2 << 20, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_is_pinned_just_before_its_eviction_stays() {
    let (root, twin) = (tempfile::tempdir().unwrap(), Twin::honest());
    let cache = open(root.path(), &twin);
    let blob = layer(&cache, b"layer").await;
    let (files, pinning) = (cache.layer(blob).unwrap(), cache.clone());
    let new = dir(root.path(), "layers-v1", blob).join("data.new");
    let job = tokio::task::spawn_blocking(move || {
        for round in 0..2000 {
            let pin = pinning.pin_layer(blob);
            files.new_data().unwrap().write_all_at(b"decoded", 0).unwrap();
            std::thread::yield_now();
            assert!(new.exists(), "round {round}");
            files.discard_new_data().unwrap();
            drop(pin);
        }
    });
    while !job.is_finished() {
        cache.prune(Prune::Unused).await.unwrap();
    }
    job.await.unwrap();
}

#[tokio::test]
async fn writes_beyond_the_quota_evict_while_they_go_on() {
    let (root, twin) = (tempfile::tempdir().unwrap(), Twin::honest());
    let cache = small(root.path(), &twin, 10 * MIB);
    for seed in 0..20 {
        blob(&cache, &twin, seed).await;
    }
    until("within the quota", || cache.usage().used_bytes <= 10 * MIB).await;
    let blobs = || std::fs::read_dir(root.path().join("blobs-v1")).unwrap().count();
    until("few are left", || (1..=5).contains(&blobs())).await;
    // The disk, not the cache's own word.
    assert_eq!(std::fs::read_dir(root.path().join("evicted")).unwrap().count(), 0);
}

#[tokio::test]
async fn make_room_evicts_under_the_quota() {
    let (root, twin) = (tempfile::tempdir().unwrap(), Twin::honest());
    let cache = open(root.path(), &twin);
    let digest = blob(&cache, &twin, 1).await;
    cache.make_room().await;
    assert!(!dir(root.path(), "blobs-v1", digest).exists());
}

#[tokio::test]
async fn the_data_of_abandoned_layers_goes_when_nobody_has_it_open() {
    let (root, twin) = (tempfile::tempdir().unwrap(), Twin::honest());
    let root = root.path();
    let cache = small(root, &twin, 1 << 40);
    let [idle, open, wanted] = [
        layer(&cache, b"idle").await,
        layer(&cache, b"open").await,
        layer(&cache, b"wanted").await,
    ];
    let is_there = |blob| dir(root, "layers-v1", blob).join("data").exists();
    let files = cache.layer(open).unwrap();
    let data = files.open_data(2 * MIB, 2).unwrap();
    // While somebody looks at them, nothing goes; that doesn't mean that anybody needs them.
    let looked_at = [idle, wanted].map(|blob| cache.pin_layer_untouched(blob));
    for blob in [idle, open, wanted] {
        cache.abandon_layer(blob);
    }
    drop(cache.pin_layer(wanted));
    drop(looked_at);
    until("the idle one's data goes", || !is_there(idle)).await;
    assert!(is_there(open) && is_there(wanted));
    assert!(files.has_objects() && cache.layer(idle).unwrap().has_objects());
    assert!(data.has(0) && data.has(1));
    drop(data);
    until("the other's goes when it is closed", || !is_there(open)).await;
    assert!(is_there(wanted));
    until("what went isn't counted", || cache.usage().used_bytes < 3 * MIB).await;
}
