//! Bytes of layers that change on disk: nobody reads them once that has been noticed.

use std::fs::{self, File, OpenOptions};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use skimmer_layers::{Checked, LayerSpec, State};
use skimmer_proto::Digest;

use crate::node::{Node, mounted_as, noise, read, tar};

const MIB: usize = 1 << 20;

fn files() -> Vec<(&'static str, Vec<u8>)> {
    // Zeros too: a hole must not be taken for what was there.
    vec![("a", noise(6 * MIB, 1)), ("zeros", vec![0; 3 * MIB]), ("b", noise(6 * MIB, 2))]
}

fn layer_dir(node: &Node, blob: Digest) -> PathBuf {
    node.directory.path().join("cache/layers-v1").join(blob.hex())
}

fn blob_dir(node: &Node, blob: Digest) -> PathBuf {
    node.directory.path().join("cache/blobs-v1").join(blob.hex())
}

/// Overwrites a part of a file, as a bad disk does: behind everybody's back.
fn spoil(path: &Path, offset: u64, len: usize) {
    let mode = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&vec![0xa5; len], offset).unwrap();
    fs::set_permissions(path, mode).unwrap();
}

async fn check(node: &Node, blob: Digest) -> Checked {
    let layers = node.layers.clone();
    let job = move || layers.check(blob, &mut |_| ControlFlow::Continue(()));
    tokio::task::spawn_blocking(job).await.unwrap().unwrap()
}

fn found(checked: Checked) -> (u64, u64, u64, u64) {
    (checked.pieces, checked.chunks, checked.rewritten, checked.objects)
}

/// A node with the whole layer, pulled through, mounted or not.
async fn whole() -> (Node, LayerSpec, Vec<u8>) {
    let node = Node::new();
    let tar = tar(&files());
    let spec = node.layer(&tar);
    node.layers.begin(spec.clone()).ready().await.unwrap();
    node.cache.drain().await.unwrap();
    (node, spec, tar)
}

/// The same in another life, in which nobody uses it yet, without the blob.
async fn without_blob() -> (Node, LayerSpec, Vec<u8>) {
    let (node, spec, tar) = whole().await;
    node.layers.release(spec.blob.digest).await;
    let node = node.restart().await;
    fs::remove_dir_all(blob_dir(&node, spec.blob.digest)).unwrap();
    (node, spec, tar)
}

/// Reads every file of what is mounted at `path`.
async fn all_is_right(path: &Path) {
    for (name, bytes) in files() {
        assert!(read(&path.join(name)).await.unwrap() == bytes, "{name}");
    }
}

fn data_is(node: &Node, spec: &LayerSpec, tar: &[u8]) -> bool {
    let mut now = vec![0; tar.len()];
    let file = File::open(layer_dir(node, spec.blob.digest).join("data")).unwrap();
    file.read_exact_at(&mut now, 0).unwrap();
    now == tar
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sound_layers_pass() {
    let (node, spec, _) = whole().await;
    let checked = check(&node, spec.blob.digest).await;
    assert_eq!(found(checked), (0, 0, 0, 0));
    assert!(checked.bytes > spec.blob.len + (15 << 20), "{checked:?}");
    node.layers.release(spec.blob.digest).await;
    assert_eq!(found(check(&node, spec.blob.digest).await), (0, 0, 0, 0));
    assert_eq!(found(check(&node, Digest::of(b"unknown")).await), (0, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_chunk_is_written_again_in_place() {
    let (node, spec, tar) = whole().await;
    let blob = spec.blob.digest;
    let data = layer_dir(&node, blob).join("data");
    // In the noise, and where the tar has zeros.
    spoil(&data, 3 << 20, 5000);
    spoil(&data, 7 << 20, 100);
    let asked = node.source.served();
    let (pieces, chunks, rewritten, objects) = found(check(&node, blob).await);
    assert_eq!((pieces, objects), (0, 0));
    assert!(chunks >= 2 && rewritten == chunks, "{chunks} wrong, {rewritten} rewritten");
    assert!(data_is(&node, &spec, &tar));
    assert_eq!(node.source.served(), asked, "the blob is here");
    assert_eq!(found(check(&node, blob).await), (0, 0, 0, 0));
    let path = node.layers.begin(spec).mount().await.unwrap().path;
    all_is_right(&path).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_data_and_a_wrong_blob_come_again() {
    let (node, spec, tar) = whole().await;
    let blob = spec.blob.digest;
    let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
    spoil(&layer_dir(&node, blob).join("data"), 1 << 20, 5000);
    spoil(&blob_dir(&node, blob).join("data"), 1 << 20, 5000);
    let (pieces, chunks, ..) = found(check(&node, blob).await);
    assert!(pieces >= 1 && chunks >= 1, "{pieces} pieces, {chunks} chunks");
    all_is_right(&path).await;
    let layer = node.layers.begin(spec.clone());
    layer.complete().await.unwrap();
    assert!(data_is(&node, &spec, &tar));
    assert_eq!(found(check(&node, blob).await), (0, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_blob_a_layer_in_use_is_fetched_to_find_out() {
    let (node, spec, tar) = without_blob().await;
    let blob = spec.blob.digest;
    let layer = node.layers.begin(spec.clone());
    let path = layer.mount().await.unwrap().path;
    assert!(matches!(layer.state(), State::Local));
    spoil(&layer_dir(&node, blob).join("data"), 1 << 20, 5000);
    let (_, chunks, ..) = found(check(&node, blob).await);
    assert!(chunks >= 1, "{chunks}");
    all_is_right(&path).await;
    assert!(data_is(&node, &spec, &tar));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_forgotten_of_a_local_layer_is_not_mounted_as_if_it_were_there() {
    let (node, spec, tar) = without_blob().await;
    let blob = spec.blob.digest;
    let layer = node.layers.begin(spec.clone());
    layer.ready().await.unwrap();
    assert!(matches!(layer.state(), State::Local));
    spoil(&layer_dir(&node, blob).join("data"), 1 << 20, 5000);
    node.source.down.store(true, Ordering::Relaxed);
    assert!(found(check(&node, blob).await).1 > 0);
    assert!(matches!(layer.state(), State::Lazy));
    node.source.down.store(false, Ordering::Relaxed);
    let path = layer.mount().await.unwrap().path;
    all_is_right(&path).await;
    layer.complete().await.unwrap();
    assert!(matches!(layer.state(), State::Local));
    assert!(data_is(&node, &spec, &tar));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_blob_a_layer_that_nobody_uses_goes() {
    let (node, spec, _) = without_blob().await;
    let blob = spec.blob.digest;
    spoil(&layer_dir(&node, blob).join("data"), 1 << 20, 1);
    assert!(found(check(&node, blob).await).1 > 0);
    assert!(!layer_dir(&node, blob).join("data").exists());
    let layer = node.layers.begin(spec);
    let path = layer.mount().await.unwrap().path;
    all_is_right(&path).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_blob_without_pieces_does_not_vouch_for_goes() {
    let (node, spec, tar) = whole().await;
    let blob = spec.blob.digest;
    node.layers.release(blob).await;
    let node = node.restart().await;
    fs::remove_file(blob_dir(&node, blob).join("pieces")).unwrap();
    spoil(&layer_dir(&node, blob).join("data"), 1 << 20, 1);
    let (pieces, chunks, rewritten, objects) = found(check(&node, blob).await);
    assert_eq!((pieces, rewritten, objects), (0, 0, 0));
    assert!(chunks > 0);
    assert_eq!(node.layers.status(&spec).unwrap().data_bytes_present, 0);
    let layer = node.layers.begin(spec.clone());
    let path = layer.mount().await.unwrap().path;
    all_is_right(&path).await;
    layer.complete().await.unwrap();
    assert!(data_is(&node, &spec, &tar));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_objects_are_made_again() {
    let (node, spec, _) = whole().await;
    let blob = spec.blob.digest;
    node.layers.release(blob).await;
    let node = node.restart().await;
    spoil(&layer_dir(&node, blob).join("inodes"), 700, 20);
    assert_eq!(found(check(&node, blob).await), (0, 0, 0, 1));
    assert_eq!(found(check(&node, blob).await), (0, 0, 0, 0));
    spoil(&layer_dir(&node, blob).join("index"), 30, 20);
    assert_eq!(found(check(&node, blob).await), (0, 0, 0, 1));
    assert_eq!(found(check(&node, blob).await), (0, 0, 0, 0));
    let path = node.layers.begin(spec).mount().await.unwrap().path;
    assert!(read(&path.join("b")).await.unwrap() == files()[2].1);
}

/// The kernel has cached a file as it was when its bytes had changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_kernel_serves_is_not_read_from_memory_once_it_was_wrong() {
    let node = Node::new();
    let spec = node.layer(&tar(&files()));
    let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
    if mounted_as(&path).as_deref() != Some("erofs") {
        return;
    }
    node.cache.drain().await.unwrap();
    let blob = spec.blob.digest;
    spoil(&layer_dir(&node, blob).join("data"), 3 << 20, 5000);
    let file = path.join("a");
    let right = files()[0].1.clone();
    let open = File::open(&file).unwrap();
    assert!(read(&file).await.unwrap() != right);
    let (_, chunks, rewritten, _) = found(check(&node, blob).await);
    assert!(chunks > 0 && rewritten == chunks, "{chunks} wrong, {rewritten} rewritten");
    assert!(read(&file).await.unwrap() == right);
    let read_open = move || {
        let mut bytes = vec![0; right.len()];
        open.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == right, "by who has it open");
    };
    tokio::task::spawn_blocking(read_open).await.unwrap();
}

/// Somebody begins to use the layer while it is looked through, and reads what is wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_mounted_during_a_check_is_read_again_too() {
    let (node, spec, _) = whole().await;
    let blob = spec.blob.digest;
    node.layers.release(blob).await;
    let node = node.restart().await;
    spoil(&layer_dir(&node, blob).join("data"), 3 << 20, 5000);
    let right = files()[0].1.clone();
    let (layers, runtime) = (node.layers.clone(), tokio::runtime::Handle::current());
    let job = move || {
        let (mut seen, mut path) = (0, None);
        let checked = layers.check(blob, &mut |bytes| {
            seen += bytes;
            // All of the blob, and some of the data.
            if seen > spec.blob.len + (1 << 20) && path.is_none() {
                let mounted = runtime.block_on(layers.begin(spec.clone()).mount()).unwrap().path;
                assert!(runtime.block_on(read(&mounted.join("a"))).unwrap() != right);
                path = Some(mounted);
            }
            ControlFlow::Continue(())
        });
        (checked.unwrap(), path.unwrap())
    };
    let (checked, path) = tokio::task::spawn_blocking(job).await.unwrap();
    let (_, chunks, rewritten, _) = found(checked);
    assert!(chunks > 0 && rewritten == chunks, "{chunks} wrong, {rewritten} rewritten");
    if mounted_as(&path).as_deref() == Some("erofs") {
        all_is_right(&path).await;
    }
}

/// The thread that does it all by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_due_is_checked_in_the_background() {
    let (node, spec, tar) = whole().await;
    spoil(&layer_dir(&node, spec.blob.digest).join("data"), 3 << 20, 5000);
    let how = skimmer_layers::Scrub {
        interval: std::time::Duration::from_secs(1),
        bytes_per_second: 200 << 20,
    };
    // A pass that began long ago and has ended.
    fs::write(node.directory.path().join("cache/scrub-v1"), "1000 end\n").unwrap();
    node.layers.scrub(how);
    for _ in 0..1000 {
        if data_is(&node, &spec, &tar) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("nobody noticed");
}
