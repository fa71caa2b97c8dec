//! Bytes that change on disk after they were verified.

use std::fs::{self, File, OpenOptions};
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use skimmer_cache::{Blob, Cache, Class, LayerData, Rot};
use skimmer_proto::{Digest, PieceTable};
use tokio::task::spawn_blocking;

use crate::twin::{Twin, bytes, open, pulled, table};

/// Four pieces.
const LEN: usize = 1 << 20;
const PIECE: u64 = 256 << 10;

/// A byte at `offset` of a file that may be read-only, as a bad disk flips it.
fn flip(path: &Path, offset: u64) {
    let mode = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[!byte[0]], offset).unwrap();
    fs::set_permissions(path, mode).unwrap();
}

async fn check(blob: &Arc<Blob>, table: Option<Arc<PieceTable>>) -> Rot {
    let blob = Arc::clone(blob);
    let job = move || blob.check(table.as_ref(), &mut |_| ControlFlow::Continue(()));
    spawn_blocking(job).await.unwrap().unwrap()
}

struct Node {
    root: tempfile::TempDir,
    twin: Arc<Twin>,
    content: Vec<u8>,
    digest: Digest,
}

impl Node {
    fn new() -> Self {
        let (root, twin, content) = (tempfile::tempdir().unwrap(), Twin::honest(), bytes(LEN, 5));
        let digest = twin.add(&content).digest;
        Self { root, twin, content, digest }
    }

    fn data(&self) -> PathBuf {
        self.root.path().join("blobs-v1").join(self.digest.hex()).join("data")
    }

    fn table(&self) -> Arc<PieceTable> {
        Arc::new(table(&self.content))
    }

    fn open(&self) -> (Cache, Arc<Blob>) {
        let cache = open(self.root.path(), &self.twin);
        let blob = cache.blob(self.twin.add(&self.content)).unwrap();
        (cache, blob)
    }

    /// Every byte is what it was, after fetching this much.
    async fn check_served(&self, blob: &Arc<Blob>, fetched: u64) {
        let before = self.twin.bytes_asked();
        blob.ensure(0..LEN as u64, Class::Fault).await.unwrap();
        let mut buffer = vec![0; LEN];
        blob.read_at(&mut buffer, 0).unwrap();
        assert!(buffer == self.content);
        assert_eq!(self.twin.bytes_asked() - before, fetched);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_piece_of_an_unfinished_blob_is_fetched_again() {
    let node = Node::new();
    let (cache, blob) = node.open();
    blob.set_table(node.table()).unwrap();
    blob.ensure(0..3 * PIECE, Class::Fault).await.unwrap();
    assert_eq!(check(&blob, Some(node.table())).await, Rot { bytes: 3 * PIECE, wrong: vec![] });
    flip(&node.data(), PIECE + 9);
    assert_eq!(check(&blob, Some(node.table())).await.wrong, [1]);
    assert!(!blob.has(1, Some(&node.table())) && blob.has(2, Some(&node.table())));
    // Also for the next process.
    cache.drain().await.unwrap();
    drop((cache, blob));
    let (_cache, blob) = node.open();
    blob.set_table(node.table()).unwrap();
    node.check_served(&blob, 2 * PIECE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_piece_of_a_finished_blob_is_replaced_and_its_file_is_not_touched() {
    let node = Node::new();
    let (cache, blob) = node.open();
    pulled(&blob).await.unwrap();
    blob.prove(table(&node.content)).unwrap();
    cache.drain().await.unwrap();
    assert_eq!(fs::metadata(node.data()).unwrap().mode() & 0o777, 0o444);
    // As containerd might share it.
    let shared = node.root.path().join("shared");
    fs::hard_link(node.data(), &shared).unwrap();
    flip(&node.data(), 2 * PIECE);
    let damaged = fs::read(&shared).unwrap();
    assert_eq!(check(&blob, Some(node.table())).await.wrong, [2]);
    node.check_served(&blob, PIECE).await;
    assert!(fs::read(&shared).unwrap() == damaged);
    cache.drain().await.unwrap();
    assert_eq!(fs::metadata(node.data()).unwrap().mode() & 0o777, 0o444);
    drop((cache, blob));
    let (_cache, blob) = node.open();
    assert!(blob.is_verified());
    assert_eq!(check(&blob, Some(node.table())).await.wrong, [0u32; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_table_the_whole_is_compared() {
    let node = Node::new();
    let (cache, blob) = node.open();
    pulled(&blob).await.unwrap();
    blob.prove(table(&node.content)).unwrap();
    cache.drain().await.unwrap();
    assert_eq!(check(&blob, None).await, Rot { bytes: LEN as u64, wrong: vec![] });
    flip(&node.data(), 1);
    assert_eq!(check(&blob, None).await.wrong, [0, 1, 2, 3]);
    node.check_served(&blob, LEN as u64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_was_cut_short_is_noticed() {
    let node = Node::new();
    let (cache, blob) = node.open();
    pulled(&blob).await.unwrap();
    blob.prove(table(&node.content)).unwrap();
    cache.drain().await.unwrap();
    fs::set_permissions(node.data(), fs::Permissions::from_mode(0o644)).unwrap();
    OpenOptions::new().write(true).open(node.data()).unwrap().set_len(PIECE).unwrap();
    assert_eq!(check(&blob, Some(node.table())).await.wrong, [1, 2, 3]);
    node.check_served(&blob, 3 * PIECE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_is_no_use_and_can_be_ended() {
    let node = Node::new();
    let (cache, blob) = node.open();
    pulled(&blob).await.unwrap();
    blob.prove(table(&node.content)).unwrap();
    cache.drain().await.unwrap();
    drop((cache, blob));
    let dir = node.data().parent().unwrap().to_owned();
    let then = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000);
    File::open(&dir).unwrap().set_modified(then).unwrap();
    let cache = open(node.root.path(), &node.twin);
    assert_eq!(cache.on_disk().unwrap(), [node.digest]);
    let held = cache.peek(node.digest).unwrap().unwrap();
    let table = node.table();
    let rot = spawn_blocking(move || {
        let mut read = 0;
        held.blob.check(Some(&table), &mut |bytes| {
            read += bytes;
            if read < 2 * PIECE { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
    });
    assert_eq!(rot.await.unwrap().unwrap().bytes, 2 * PIECE);
    assert_eq!(fs::metadata(&dir).unwrap().modified().unwrap(), then);
}

const CHUNK: u64 = 64 << 10;

fn chunk(number: usize) -> Range<u64> {
    number as u64 * CHUNK..(number as u64 + 1) * CHUNK
}

fn filled(cache: &Cache, blob: Digest) -> Arc<LayerData> {
    let data = cache.layer(blob).unwrap().open_data(4 * CHUNK, 4).unwrap();
    data.file().write_all_at(&bytes(4 << 16, 1), 0).unwrap();
    (0..4).for_each(|number| data.mark(number));
    data
}

#[tokio::test]
async fn distrusted_chunks_are_holes_and_stay_absent() {
    let root = tempfile::tempdir().unwrap();
    let blob = Digest::of(b"layer");
    let cache = open(root.path(), &Twin::honest());
    let data = filled(&cache, blob);
    data.checkpoint().unwrap();
    let spans = |chunks: &[usize]| -> Vec<_> {
        chunks.iter().map(|number| (*number, vec![chunk(*number)])).collect()
    };
    assert!(data.distrust(&spans(&[0, 2])).unwrap());
    assert_eq!(data.missing(0..4), [0, 2]);
    let mut buffer = vec![7; 64 << 10];
    for number in [0, 2] {
        data.file().read_exact_at(&mut buffer, chunk(number).start).unwrap();
        assert!(buffer.iter().all(|byte| *byte == 0), "chunk {number}");
    }
    // One that isn't there is nobody's: it may be in the making.
    data.file().write_all_at(&[7], chunk(2).start).unwrap();
    assert!(data.distrust(&spans(&[2])).unwrap());
    data.file().read_exact_at(&mut buffer, chunk(2).start).unwrap();
    assert_eq!(buffer[0], 7);
    {
        let _keep = data.keep();
        assert!(!data.distrust(&spans(&[1, 3])).unwrap(), "they may not go");
        assert!(data.has(1) && data.has(3));
    }
    // A process that died right then doesn't believe in it either.
    drop((data, cache));
    let cache = open(root.path(), &Twin::honest());
    let data = cache.layer(blob).unwrap().open_data(4 * CHUNK, 4).unwrap();
    assert_eq!(data.missing(0..4), [0, 2]);
}
