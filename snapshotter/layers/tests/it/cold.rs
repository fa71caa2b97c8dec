//! Chunks of mounted layers that nobody reads make room for others, and come back.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use skimmer_layers::State;

use crate::node::{Node, noise, read, tar};

const MIB: usize = 1 << 20;

/// A node that knows the layer of `files` and has most of it, which nobody has read in this life.
async fn mostly_there(files: &[(&str, Vec<u8>)]) -> (Node, skimmer_layers::LayerSpec) {
    let first = Node::new();
    let spec = first.layer(&tar(files));
    first.layers.begin(spec.clone()).ready().await.unwrap();
    let bundle = first.layers.export(spec.blob.digest).unwrap();
    let node = Node::over(first.source.clone());
    node.layers.import(bundle).await.unwrap();
    let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
    for (name, bytes) in &files[1..] {
        assert!(read(&path.join(name)).await.unwrap() == *bytes);
    }
    (node.restart().await, spec)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_get_the_right_bytes_while_chunks_go() {
    let names = ["never", "a", "b", "c"];
    let files: Vec<_> =
        names.iter().zip(40..).map(|(name, seed)| (*name, noise(10 * MIB, seed))).collect();
    let (node, spec) = mostly_there(&files).await;
    let layer = node.layers.begin(spec.clone());
    let path = layer.mount().await.unwrap().path;
    let present = || node.layers.status(&spec).unwrap().data_bytes_present;
    let before = present();
    assert!(before > 28 << 20, "{before}");
    node.cache.make_room().await;
    assert!(present() < before, "{before}: chunks went first");

    let done = Arc::new(AtomicBool::new(false));
    let (cache, stop) = (node.cache.clone(), Arc::clone(&done));
    let punching = tokio::spawn(async move {
        while !stop.load(Ordering::Relaxed) {
            cache.make_room().await;
        }
    });
    let readers: Vec<_> = files[1..]
        .iter()
        .map(|(name, bytes)| {
            let (path, bytes) = (path.join(name), bytes.clone());
            tokio::task::spawn_blocking(move || {
                let file = std::fs::File::open(path).unwrap();
                let mut part = vec![0; 64 << 10];
                for step in 0..160 {
                    let at = step * 37 % 160 * part.len();
                    file.read_exact_at(&mut part, at as u64).unwrap();
                    assert!(part == bytes[at..at + part.len()], "at {at}");
                }
            })
        })
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    punching.await.unwrap();
    layer.complete().await.unwrap();
    assert!(matches!(layer.state(), State::Local));
    assert!(read(&path.join("never")).await.unwrap() == files[0].1);
}
