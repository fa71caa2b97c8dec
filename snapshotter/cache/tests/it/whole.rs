//! Whole blobs: what may be shared under another name.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use skimmer_cache::{Class, Prune, blob};
use skimmer_proto::Digest;

use crate::twin::{Deed, Twin, bytes, open, pulled, table};

const MIB: usize = 1 << 20;

fn data(root: &Path, digest: Digest) -> PathBuf {
    root.join("blobs-v1").join(digest.hex()).join("data")
}

#[tokio::test]
async fn a_whole_blob_is_its_bytes_in_a_file_that_nobody_writes() {
    let (dir, twin, content) =
        (tempfile::tempdir().unwrap(), Twin::honest(), bytes(3 * MIB + 17, 1));
    let reference = twin.add(&content);
    let cache = open(dir.path(), &twin);
    let blob = cache.blob(reference.clone()).unwrap();
    let whole = blob.whole(Class::PullThrough).await.unwrap();
    assert_eq!((whole.digest(), whole.size()), (reference.digest, content.len() as u64));
    let file = data(dir.path(), reference.digest);
    let metadata = fs::metadata(&file).unwrap();
    assert_eq!((metadata.mode() & 0o777, metadata.len()), (0o444, content.len() as u64));
    assert_eq!(metadata.ino(), whole.file().metadata().unwrap().ino());
    assert_eq!(fs::read(&file).unwrap(), content);
    let asked = twin.bytes_asked();
    drop((whole, blob));
    // Known after a restart: nothing is fetched, and nothing read.
    drop(cache);
    let cache = open(dir.path(), &twin);
    let again = cache.blob(reference).unwrap().whole(Class::PullThrough).await.unwrap();
    assert_eq!(twin.bytes_asked(), asked);
    assert!(again.file().write_at(b"x", 0).is_err(), "it was opened for writing");
}

#[tokio::test]
async fn repair_and_eviction_leave_what_was_shared_as_it_was() {
    let (dir, twin, content) = (tempfile::tempdir().unwrap(), Twin::honest(), bytes(MIB, 2));
    let reference = twin.add(&content);
    let cache = open(dir.path(), &twin);
    let blob = cache.blob(reference.clone()).unwrap();
    blob.whole(Class::PullThrough).await.unwrap();
    let (file, shared) = (data(dir.path(), reference.digest), dir.path().join("shared"));
    fs::hard_link(&file, &shared).unwrap();
    blob.distrust().await.unwrap();
    assert_ne!(fs::metadata(&file).unwrap().ino(), fs::metadata(&shared).unwrap().ino());
    assert_eq!(pulled(&blob).await.unwrap(), content);
    blob.whole(Class::PullThrough).await.unwrap();
    drop(blob);
    cache.prune(Prune::Unused).await.unwrap();
    assert!(!file.exists());
    assert_eq!(fs::read(&shared).unwrap(), content);
}

#[tokio::test]
async fn a_blob_that_has_another_name_is_not_evicted_for_room_that_it_would_not_give() {
    let (dir, twin, content) = (tempfile::tempdir().unwrap(), Twin::honest(), bytes(MIB, 3));
    let reference = twin.add(&content);
    let cache = open(dir.path(), &twin);
    cache.blob(reference.clone()).unwrap().whole(Class::PullThrough).await.unwrap();
    let (file, shared) = (data(dir.path(), reference.digest), dir.path().join("shared"));
    fs::hard_link(&file, &shared).unwrap();
    assert!(cache.prune(Prune::Unused).await.unwrap().is_empty());
    fs::remove_file(&shared).unwrap();
    let gone = cache.prune(Prune::Unused).await.unwrap();
    assert!(gone.iter().map(|entry| entry.bytes).sum::<u64>() >= content.len() as u64);
    assert!(!file.exists());
}

#[tokio::test]
async fn wrong_bytes_are_fetched_once_more_and_then_refused() {
    for (wrong, right) in [(1, true), (9, false)] {
        let deed = move |n, _: &_| if n < wrong { Deed::Corrupt(5) } else { Deed::Serve };
        let (dir, twin) = (tempfile::tempdir().unwrap(), Twin::scripted(deed));
        let reference = twin.add(&bytes(1000, 4));
        let cache = open(dir.path(), &twin);
        let blob = cache.blob(reference.clone()).unwrap();
        match blob.whole(Class::PullThrough).await {
            Ok(_) => assert!(right),
            Err(blob::Error::Digest { digest, actual }) => {
                assert!(!right && digest == reference.digest && actual != digest);
                assert_eq!(fs::metadata(data(dir.path(), digest)).unwrap().mode() & 0o222, 0o200);
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_proved_blob_is_not_read_again() {
    let (dir, twin, content) = (tempfile::tempdir().unwrap(), Twin::honest(), bytes(MIB, 5));
    let reference = twin.add(&content);
    let cache = open(dir.path(), &twin);
    let blob = cache.blob(reference.clone()).unwrap();
    pulled(&blob).await.unwrap();
    blob.prove(table(&content)).unwrap();
    // Bytes that would not match show that they are not looked at.
    let file = fs::OpenOptions::new().write(true).open(data(dir.path(), reference.digest)).unwrap();
    file.write_all_at(&[content[0] ^ 1], 0).unwrap();
    blob.whole(Class::PullThrough).await.unwrap();
}
