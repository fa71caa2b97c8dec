//! Blobs: fetched, verified, streamed, remembered.

use std::sync::Arc;
use std::time::Duration;

use skimmer_cache::{Blob, Class, blob};

use crate::twin::{Deed, Twin, bytes, open, pulled, reference, table};

const MIB: usize = 1 << 20;

fn read(blob: &Blob, offset: u64, len: usize) -> Vec<u8> {
    let mut buffer = vec![0; len];
    blob.read_at(&mut buffer, offset).unwrap();
    buffer
}

#[tokio::test]
async fn ensure_fetches_what_a_range_touches_and_no_more() {
    let (dir, twin, content) = (tempfile::tempdir().unwrap(), Twin::honest(), bytes(2 * MIB, 1));
    let reference = twin.add(&content);
    let cache = open(dir.path(), &twin);
    let blob = cache.blob(reference).unwrap();
    blob.set_table(Arc::new(table(&content))).unwrap();
    blob.ensure(300_000..600_000, Class::Fault).await.unwrap();
    assert_eq!(read(&blob, 300_000, 300_000), content[300_000..600_000]);
    let requests = twin.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert_eq!((requests[0].range.clone(), requests[0].class), (262_144..786_432, Class::Fault));
    blob.ensure(300_000..600_000, Class::Fault).await.unwrap();
    assert_eq!(twin.requests().len(), 1, "what is there is not fetched again");
    assert_eq!(blob.bytes_present(), 524_288);
    assert_eq!(blob.fetched(), [524_288, 0, 0]);
    assert!(!blob.is_complete());
}

#[tokio::test]
async fn pull_through_delivers_the_whole_in_order_over_several_connections() {
    let content = bytes(20 * MIB + 12_345, 2);
    let (dir, twin) = (
        tempfile::tempdir().unwrap(),
        // The first requests are the slowest, so the order of arrival isn't that of the blob.
        Twin::scripted(|n, _| {
            Deed::Slow(Duration::from_millis(40_u64.saturating_sub(10 * n as u64)))
        }),
    );
    let reference = twin.add(&content);
    let cache = open(dir.path(), &twin);
    let blob = cache.blob(reference).unwrap();
    assert!(pulled(&blob).await.unwrap() == content);
    assert!(blob.is_complete() && !blob.is_verified());
    assert_eq!(twin.bytes_asked(), content.len() as u64, "each byte once");
    assert!(twin.requests().len() >= 4);
    blob.prove(table(&content)).unwrap();
    assert!(blob.is_verified());
    blob.ensure(0..u64::MAX, Class::Fault).await.unwrap();
    assert_eq!(twin.bytes_asked(), content.len() as u64, "nothing more after the proof");
}

#[tokio::test]
async fn an_empty_blob_is_complete_at_once() {
    let (dir, twin) = (tempfile::tempdir().unwrap(), Twin::honest());
    let reference = twin.add(b"");
    let blob = open(dir.path(), &twin).blob(reference).unwrap();
    assert_eq!(pulled(&blob).await.unwrap(), b"");
    assert!(blob.is_complete() && twin.requests().is_empty());
    blob.prove(table(b"")).unwrap();
}

#[tokio::test]
async fn many_readers_of_one_piece_cause_one_request() {
    let content = bytes(MIB, 3);
    let dir = tempfile::tempdir().unwrap();
    let twin = Twin::scripted(|_, _| Deed::Slow(Duration::from_millis(30)));
    let reference = twin.add(&content);
    let cache = open(dir.path(), &twin);
    let readers = (0..50).map(|n| {
        let blob = cache.blob(reference.clone()).unwrap();
        blob.set_table(Arc::new(table(&content))).unwrap();
        let class = Class::ALL[n % 3];
        tokio::spawn(async move { blob.ensure(0..1000, class).await })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap().unwrap();
    }
    assert_eq!(twin.bytes_asked(), 262_144);
}

#[tokio::test]
async fn without_a_table_nothing_can_be_ensured() {
    let (dir, twin) = (tempfile::tempdir().unwrap(), Twin::honest());
    let blob = open(dir.path(), &twin).blob(reference(skimmer_proto::Digest::of(b"x"), 1)).unwrap();
    let error = blob.ensure(0..1, Class::Fault).await.unwrap_err();
    assert!(matches!(error, blob::Error::NoTable { .. }), "{error}");
}

#[tokio::test]
async fn unverified_bytes_do_for_who_checks_them_and_can_be_forgotten() {
    let (dir, content) = (tempfile::tempdir().unwrap(), bytes(MIB, 4));
    let twin = Twin::scripted(|n, _| if n == 0 { Deed::Corrupt(300_000) } else { Deed::Serve });
    let reference = twin.add(&content);
    let blob = open(dir.path(), &twin).blob(reference).unwrap();
    blob.ensure_unverified(300_000..300_001, Class::Fault).await.unwrap();
    assert_ne!(read(&blob, 300_000, 1), content[300_000..300_001]);
    blob.forget(300_000..300_001);
    assert_eq!(blob.bytes_present(), 0);
    blob.ensure_unverified(300_000..300_001, Class::Fault).await.unwrap();
    assert_eq!(read(&blob, 300_000, 1), content[300_000..300_001]);
    assert_eq!((blob.bytes_present(), twin.requests().len()), (262_144, 2));
    assert!(!blob.is_verified());
    blob.set_table(Arc::new(table(&content))).unwrap();
    blob.ensure(262_144..524_288, Class::Fault).await.unwrap();
    blob.forget(262_144..524_288);
    assert_eq!(twin.requests().len(), 2, "checked, and not fetched again");
    assert_eq!(blob.bytes_present(), 262_144, "verified pieces are not forgotten");
}
