//! How layers stand: to ask is no use of them, and leaves no trace.

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use skimmer_layers::Mode;

use crate::node::{Node, noise, tar};

const MIB: usize = 1 << 20;

/// Everything that the cache has of blobs and layers, and when it was changed or last used.
fn on_disk(node: &Node) -> Vec<(PathBuf, SystemTime)> {
    let cache = node.directory.path().join("cache");
    let mut left = vec![cache.join("blobs-v1"), cache.join("layers-v1")];
    let mut found = Vec::new();
    while let Some(path) = left.pop() {
        let metadata = fs::metadata(&path).unwrap();
        if metadata.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        found.push((path, metadata.modified().unwrap()));
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn to_ask_is_no_use_and_leaves_no_trace() {
    let other = Node::new();
    let [whole, indexed, unknown] =
        [1, 2, 3].map(|seed| other.layer(&tar(&[("file", noise(2 * MIB, seed))])));
    other.layers.begin(indexed.clone()).ready().await.unwrap();
    let bundle = other.layers.export(indexed.blob.digest).unwrap();
    let node = Node::over(other.source.clone());
    node.layers.import(bundle).await.unwrap();
    node.layers.begin(whole.clone()).ready().await.unwrap();
    node.cache.drain().await.unwrap();
    let node = node.restart().await;
    let (before, served) = (on_disk(&node), node.source.served());
    let rows = [
        (&whole, Mode::Local, whole.blob.len),
        (&indexed, Mode::Lazy, 0),
        (&unknown, Mode::Absent, 0),
    ];
    for (spec, mode, present) in rows {
        let status = node.layers.status(spec).unwrap();
        assert_eq!((status.mode, status.blob_bytes_present), (mode, present));
        assert_eq!(status.data_bytes_present == status.data_bytes, mode != Mode::Lazy);
    }
    let mut lie = whole.clone();
    lie.blob.len += 1;
    node.layers.status(&lie).expect_err("the blob is whole, and not so long");
    assert!(on_disk(&node) == before);
    assert_eq!(node.source.served(), served);
}
