//! What a new process finds after the old one died at some instant.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use skimmer_cache::{BlobRef, Class};
use skimmer_proto::PieceTable;

use crate::twin::{Twin, bytes, open, pulled, table};

const LEN: usize = 3 << 20;

struct Node {
    dir: tempfile::TempDir,
    twin: Arc<Twin>,
    content: Vec<u8>,
    reference: BlobRef,
}

impl Node {
    fn new() -> Self {
        let (dir, twin, content) = (tempfile::tempdir().unwrap(), Twin::honest(), bytes(LEN, 11));
        let reference = twin.add(&content);
        Self { dir, twin, content, reference }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("blobs-v1").join(self.reference.digest.hex()).join(name)
    }

    /// A process that ensures the first half, says so on disk, and dies.
    async fn half(&self) {
        let cache = open(self.dir.path(), &self.twin);
        let blob = cache.blob(self.reference.clone()).unwrap();
        blob.set_table(Arc::new(table(&self.content))).unwrap();
        blob.ensure(0..LEN as u64 / 2, Class::Background).await.unwrap();
        cache.drain().await.unwrap();
    }

    /// The next process: reads everything; the bytes that it had to fetch.
    async fn read_all(&self) -> u64 {
        let before = self.twin.bytes_asked();
        let cache = open(self.dir.path(), &self.twin);
        let blob = cache.blob(self.reference.clone()).unwrap();
        blob.set_table(Arc::new(table(&self.content))).unwrap();
        blob.ensure(0..LEN as u64, Class::Fault).await.unwrap();
        let mut buffer = vec![0; LEN];
        blob.read_at(&mut buffer, 0).unwrap();
        assert!(buffer == self.content);
        self.twin.bytes_asked() - before
    }
}

#[tokio::test]
async fn what_was_recorded_is_not_fetched_again() {
    let node = Node::new();
    node.half().await;
    assert_eq!(node.read_all().await, LEN as u64 / 2);
}

/// What happens between two processes, and how many halves of the blob it costs.
type Damage = (fn(&Node), u64);

#[tokio::test]
async fn a_stale_missing_or_damaged_bitmap_costs_a_fetch_and_nothing_else() {
    let damages: [Damage; 6] = [
        (|node| fs::remove_file(node.path("pieces")).unwrap(), 2),
        (|node| fs::write(node.path("pieces"), b"").unwrap(), 2),
        (
            |node| {
                let mut bytes = fs::read(node.path("pieces")).unwrap();
                bytes[70] ^= 0xff;
                fs::write(node.path("pieces"), bytes).unwrap();
            },
            2,
        ),
        (|node| fs::remove_file(node.path("data")).unwrap(), 2),
        (
            |node| {
                let file = fs::OpenOptions::new().write(true).open(node.path("data")).unwrap();
                file.set_len(1000).unwrap();
            },
            2,
        ),
        (|node| fs::write(node.path("pieces.tmp"), b"half written").unwrap(), 1),
    ];
    for (number, (damage, halves)) in damages.into_iter().enumerate() {
        let node = Node::new();
        node.half().await;
        damage(&node);
        assert_eq!(node.read_all().await, halves * LEN as u64 / 2, "damage {number}");
    }
}

#[tokio::test]
async fn unverified_bytes_of_an_earlier_attempt_are_checked_before_use() {
    let node = Node::new();
    {
        let cache = open(node.dir.path(), &node.twin);
        let blob = cache.blob(node.reference.clone()).unwrap();
        pulled(&blob).await.unwrap();
        cache.drain().await.unwrap();
    }
    let file = fs::OpenOptions::new().write(true).open(node.path("data")).unwrap();
    file.write_all_at(b"not what was here", 300_000).unwrap();
    assert_eq!(node.read_all().await, 1 << 18, "the piece that was spoiled");
}

#[tokio::test]
async fn bytes_verified_against_another_table_count_for_nothing() {
    let node = Node::new();
    node.half().await;
    let file = fs::OpenOptions::new().write(true).open(node.path("data")).unwrap();
    file.write_all_at(b"not what was here", 300_000).unwrap();
    let cache = open(node.dir.path(), &node.twin);
    let blob = cache.blob(node.reference.clone()).unwrap();
    let foreign = bytes(LEN, 12);
    let error = blob.set_table(Arc::new(table(&foreign))).unwrap_err();
    assert!(matches!(error, skimmer_cache::blob::Error::ForeignTable { .. }), "{error}");
    assert!(blob.table().is_none());
}

#[tokio::test]
async fn a_pull_through_resumes() {
    let node = Node::new();
    {
        let cache = open(node.dir.path(), &node.twin);
        let blob = cache.blob(node.reference.clone()).unwrap();
        let mut pull = blob.pull_through(Class::PullThrough);
        pull.next().await.unwrap().unwrap();
        while blob.bytes_present() < LEN as u64 / 2 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        cache.drain().await.unwrap();
    }
    let before = node.twin.bytes_asked();
    let cache = open(node.dir.path(), &node.twin);
    let blob = cache.blob(node.reference.clone()).unwrap();
    assert!(blob.bytes_present() >= LEN as u64 / 2);
    assert!(pulled(&blob).await.unwrap() == node.content);
    assert!(node.twin.bytes_asked() - before <= LEN as u64 / 2);
    assert_eq!(blob.fetched()[1], node.twin.bytes_asked() - before);
}

#[tokio::test]
async fn a_distrusted_blob_is_empty_then_and_after_a_crash() {
    let node = Node::new();
    let cache = open(node.dir.path(), &node.twin);
    let blob = cache.blob(node.reference.clone()).unwrap();
    pulled(&blob).await.unwrap();
    cache.drain().await.unwrap();
    blob.distrust().await.unwrap();
    assert_eq!((blob.bytes_present(), blob.table()), (0, None));
    assert!(!node.path("pieces").exists());
    assert_eq!(node.read_all().await, LEN as u64);
    assert!(pulled(&blob).await.unwrap() == node.content);
}

#[tokio::test]
async fn a_verified_blob_is_read_only_and_stays_verified() {
    let node = Node::new();
    {
        let cache = open(node.dir.path(), &node.twin);
        let blob = cache.blob(node.reference.clone()).unwrap();
        pulled(&blob).await.unwrap();
        let error = cache.blob(node.reference.clone()).unwrap().prove(table(b"other"));
        assert!(error.is_err());
        blob.prove(table(&node.content)).unwrap();
        cache.drain().await.unwrap();
    }
    let mode = fs::metadata(node.path("data")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444);
    assert_eq!(node.read_all().await, 0);
}

#[tokio::test]
async fn a_complete_blob_is_repaired_by_replacing_its_file() {
    let node = Node::new();
    {
        let cache = open(node.dir.path(), &node.twin);
        let blob = cache.blob(node.reference.clone()).unwrap();
        // Proved by a table that was wrong about the bytes: another content's values.
        let wrong = bytes(LEN, 12);
        pulled(&blob).await.unwrap();
        blob.prove(retold(&node.content, &wrong)).unwrap();
        cache.drain().await.unwrap();
    }
    let file = fs::File::open(node.path("data")).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o644)).unwrap();
    let writer = fs::OpenOptions::new().write(true).open(node.path("data")).unwrap();
    writer.write_all_at(b"spoiled", 0).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o444)).unwrap();
    assert_eq!(node.read_all().await, LEN as u64);
    let mut shared = [0; 7];
    file.read_exact_at(&mut shared, 0).unwrap();
    assert_eq!(&shared, b"spoiled", "the old inode isn't ours to change");
}

#[tokio::test]
async fn a_read_only_file_without_its_bitmap_is_replaced_not_written() {
    let node = Node::new();
    {
        let cache = open(node.dir.path(), &node.twin);
        let blob = cache.blob(node.reference.clone()).unwrap();
        pulled(&blob).await.unwrap();
        blob.prove(table(&node.content)).unwrap();
        cache.drain().await.unwrap();
    }
    let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(node.path("data")).unwrap());
    let before = inode();
    let _shared = fs::File::open(node.path("data")).unwrap();
    fs::remove_file(node.path("pieces")).unwrap();
    assert_eq!(node.read_all().await, LEN as u64);
    assert_ne!(inode(), before);
}

/// The table of `values`' pieces under the digest of `bytes`.
fn retold(bytes: &[u8], values: &[u8]) -> PieceTable {
    let (mut encoded, honest) = (table(values).encode(), table(bytes));
    encoded[16..48].copy_from_slice(honest.blob.as_bytes());
    PieceTable::decode(&encoded).unwrap()
}
