//! Sources that refuse, break off, lie or hang.

use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prometheus_client::registry::Registry;
use skimmer_cache::{Blob, Cache, Class, Config, Sources, blob};

use crate::twin::{Deed, Request, Twin, bytes, config, open, pulled, table};

const LEN: usize = 3 << 20;

/// A blob of 12 pieces with a table, at a source with this script, under this configuration.
async fn with_config(
    change: impl FnOnce(Config) -> Config,
    script: impl Fn(usize, &Request) -> Deed + Send + Sync + 'static,
) -> (tempfile::TempDir, Arc<Twin>, Arc<Blob>, Registry) {
    let (dir, twin, content) =
        (tempfile::tempdir().unwrap(), Twin::scripted(script), bytes(LEN, 7));
    let reference = twin.add(&content);
    let mut registry = Registry::default();
    let source = Arc::clone(&twin) as _;
    let cache =
        Cache::open(change(config(dir.path())), Sources::only(source), &mut registry).unwrap();
    let blob = cache.blob(reference).unwrap();
    blob.set_table(Arc::new(table(&content))).unwrap();
    (dir, twin, blob, registry)
}

async fn with(
    script: impl Fn(usize, &Request) -> Deed + Send + Sync + 'static,
) -> (tempfile::TempDir, Arc<Twin>, Arc<Blob>, Registry) {
    let quick = |config| Config { stall: Duration::from_millis(200), ..config };
    with_config(quick, script).await
}

#[tokio::test]
async fn what_passes_is_survived() {
    let fault: [fn(usize) -> Deed; 4] = [
        |n| if n < 2 { Deed::Fail } else { Deed::Serve },
        |n| if n < 4 { Deed::Truncate(300_000) } else { Deed::Serve },
        |n| if n < 2 { Deed::Corrupt(0) } else { Deed::Serve },
        |n| if n < 2 { Deed::Hang } else { Deed::Serve },
    ];
    for deed in fault {
        let (_dir, twin, blob, _) = with(move |n, _| deed(n)).await;
        blob.ensure(0..u64::MAX, Class::Fault).await.unwrap();
        let mut buffer = vec![0; LEN];
        blob.read_at(&mut buffer, 0).unwrap();
        assert!(buffer == bytes(LEN, 7), "{:?}", twin.requests());
    }
}

#[tokio::test]
async fn a_truncated_answer_is_resumed_where_it_broke_off() {
    let (_dir, twin, blob, _) =
        with(|n, _| if n == 0 { Deed::Truncate(600_000) } else { Deed::Serve }).await;
    blob.ensure(0..1 << 20, Class::Fault).await.unwrap();
    let ranges: Vec<_> = twin.requests().into_iter().map(|request| request.range).collect();
    assert_eq!(ranges, [0..1 << 20, 512 << 10..1 << 20]);
}

#[tokio::test]
async fn a_refusal_is_reported_at_once_with_its_cause() {
    let (_dir, twin, blob, _) = with(|_, _| Deed::Refuse).await;
    let error = blob.ensure(0..1, Class::Fault).await.unwrap_err();
    assert!(matches!(error, blob::Error::Fetch { .. }) && !error.is_retryable(), "{error}");
    let cause = error.source().and_then(|fetch| fetch.source()).unwrap();
    assert_eq!(cause.to_string(), "401 Unauthorized");
    assert_eq!(twin.requests().len(), 1);
    let mut pull = blob.pull_through(Class::PullThrough);
    assert!(matches!(pull.next().await, Err(blob::Error::Fetch { .. })));
}

#[tokio::test]
async fn a_source_that_is_down_is_asked_until_the_deadline() {
    for deed in [Deed::Fail, Deed::Hang] {
        let quick = |config| Config {
            stall: Duration::from_millis(100),
            deadline: Duration::from_millis(1500),
            ..config
        };
        let (_dir, twin, blob, _) = with_config(quick, move |_, _| deed).await;
        let began = tokio::time::Instant::now();
        let error = blob.ensure(0..1, Class::Fault).await.unwrap_err();
        let blob::Error::Deadline { waited, source: Some(_), .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(*waited, Duration::from_millis(1500));
        let took = began.elapsed();
        assert!(took >= *waited && took < *waited + Duration::from_secs(1), "{took:?}");
        let requests = twin.requests().len();
        assert!((2..5).contains(&requests), "{requests}");
    }
}

#[tokio::test]
async fn a_source_that_lies_is_named_with_the_piece() {
    let (_dir, twin, blob, registry) = with(|_, _| Deed::Corrupt(300_000)).await;
    let error = blob.ensure(0..1 << 20, Class::Fault).await.unwrap_err();
    let expected = format!(
        "piece 1 of blob {} from twin doesn't match its digest, every time it was fetched",
        blob.digest()
    );
    assert_eq!(error.to_string(), expected);
    assert_eq!(twin.requests().len(), 3);
    blob.ensure(512 << 10..1 << 20, Class::Fault).await.unwrap();
    assert_eq!(twin.requests().len(), 3, "the right pieces of the answer were kept");
    assert_eq!(blob.bytes_present(), 3 << 18);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    assert!(text.contains("cache_wrong_pieces_total{source=\"twin\"} 3"), "{text}");
    assert!(text.contains("cache_runs_total{source=\"twin\",class=\"fault\"} 3"), "{text}");
}

#[tokio::test]
async fn a_slow_pull_through_lives_as_long_as_it_moves() {
    let (_dir, twin, blob, _) = with_config(
        |config| Config { deadline: Duration::from_millis(500), connections_per_blob: 1, ..config },
        |n, _| {
            if n % 2 == 0 {
                Deed::Slow(Duration::from_millis(200))
            } else {
                Deed::Truncate(270_000)
            }
        },
    )
    .await;
    assert!(pulled(&blob).await.unwrap() == bytes(LEN, 7), "{:?}", twin.requests());
}

#[tokio::test]
async fn who_stops_waiting_leaves_nothing_behind() {
    let gate = Arc::new(AtomicBool::new(false));
    let opened = Arc::clone(&gate);
    let (_dir, twin, blob, _) =
        with(move |_, _| if opened.load(Ordering::Relaxed) { Deed::Serve } else { Deed::Fail })
            .await;
    let wait = Duration::from_millis(20);
    assert!(tokio::time::timeout(wait, blob.ensure(0..1, Class::Fault)).await.is_err());
    let requests = twin.requests().len();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(twin.requests().len(), requests, "nobody waits, nobody asks");
    gate.store(true, Ordering::Relaxed);
    blob.ensure(0..1, Class::Fault).await.unwrap();
}

#[tokio::test]
async fn a_manifest_that_lies_about_the_length_is_refused_once_the_truth_is_known() {
    let (dir, twin, content) = (tempfile::tempdir().unwrap(), Twin::honest(), bytes(LEN, 8));
    let honest = twin.add(&content);
    let lie = skimmer_cache::BlobRef { len: 77, ..honest.clone() };
    let cache = open(dir.path(), &twin);
    drop(cache.blob(lie.clone()).unwrap());
    let blob = cache.blob(honest.clone()).unwrap();
    assert!(pulled(&blob).await.unwrap() == content);
    assert!(matches!(cache.blob(lie.clone()), Err(blob::Error::Length { .. })), "in use");
    blob.prove(table(&content)).unwrap();
    drop(blob);
    assert!(matches!(cache.blob(lie.clone()), Err(blob::Error::Length { .. })), "proved");
    cache.drain().await.unwrap();
    let cache = open(dir.path(), &twin);
    assert!(matches!(cache.blob(lie), Err(blob::Error::Length { .. })), "proved on disk");
    assert!(cache.blob(honest).unwrap().is_verified());
}
