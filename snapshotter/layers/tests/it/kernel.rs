//! Complete layers are served by the kernel, where it can.

use std::sync::Arc;

use skimmer_layers::mount::version;
use skimmer_layers::{LayerSpec, State};

use crate::node::{Node, is_mounted, mounted_as, noise, read, tar};

const MIB: usize = 1 << 20;

/// Whether this machine's kernel can; where it can't, FUSE is what is tested.
fn kernel_serves() -> bool {
    let name = nix::sys::utsname::uname().unwrap();
    version(&name.release().to_string_lossy()) >= (6, 4)
}

fn expected() -> Option<String> {
    Some(if kernel_serves() { "erofs" } else { "fuse.skimmer" }.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pulled_through_layer_needs_no_server() {
    let (node, content) = (Node::new(), noise(3 * MIB + 77, 31));
    let spec = node.layer(&tar(&[("dir/file", content.clone())]));
    let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
    assert_eq!(mounted_as(&path), expected());
    assert!(read(&path.join("dir/file")).await.unwrap() == content);
    node.layers.release(spec.blob.digest).await;
    assert!(!is_mounted(&path) && !path.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fuse_serves_everything_if_it_is_told_to() {
    let node = Node::without_kernel(Arc::default());
    let spec = node.layer(&tar(&[("file", noise(MIB, 32))]));
    let path = node.layers.begin(spec).mount().await.unwrap().path;
    assert_eq!(mounted_as(&path).as_deref(), Some("fuse.skimmer"));
}

/// A node with the index of a layer, and not its bytes.
async fn lazy(content: &[u8]) -> (Node, LayerSpec) {
    let first = Node::new();
    let spec = first.layer(&tar(&[("file", content.to_vec())]));
    first.layers.begin(spec.clone()).ready().await.unwrap();
    let bundle = first.layers.export(spec.blob.digest).unwrap();
    let node = Node::over(first.source.clone());
    node.layers.import(bundle).await.unwrap();
    (node, spec)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lazy_layer_graduates_for_those_who_mount_it_later() {
    let content = noise(4 * MIB, 33);
    let (node, spec) = lazy(&content).await;
    let layer = node.layers.begin(spec.clone());
    let before = layer.mount().await.unwrap();
    assert_eq!(mounted_as(&before.path).as_deref(), Some("fuse.skimmer"));
    assert_eq!(layer.mount().await.unwrap(), before, "while it is lazy, that is its mount");
    layer.complete().await.unwrap();
    assert!(matches!(layer.state(), State::Local));
    let after = layer.mount().await.unwrap();
    assert_eq!(mounted_as(&after.path), expected());
    assert_eq!(after.path != before.path, kernel_serves());
    assert_eq!(layer.mount().await.unwrap(), after, "and stays so");
    for mount in [&before, &after] {
        assert!(read(&mount.path.join("file")).await.unwrap() == content);
    }
    node.layers.release(spec.blob.digest).await;
    assert!(!is_mounted(&before.path) && !is_mounted(&after.path));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kernels_mount_outlives_the_process_and_is_found_again() {
    if !kernel_serves() {
        return;
    }
    let (node, content) = (Node::new(), noise(2 * MIB, 34));
    let spec = node.layer(&tar(&[("file", content.clone())]));
    let other = node.layer(&tar(&[("other", noise(MIB, 35))]));
    let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
    let unused = node.layers.begin(other).mount().await.unwrap().path;
    let node = node.succeed().await;
    assert!(is_mounted(&path) && is_mounted(&unused));
    assert!(read(&path.join("file")).await.unwrap() == content, "nobody has to serve it");
    node.layers.resume([spec.clone()]);
    assert!(!is_mounted(&unused), "no snapshot uses it");
    assert_eq!(node.layers.begin(spec.clone()).mount().await.unwrap().path, path);
    let third = node.layer(&tar(&[("third", noise(MIB, 36))]));
    assert_ne!(node.layers.begin(third).mount().await.unwrap().path, path);
    node.layers.release(spec.blob.digest).await;
    assert!(!is_mounted(&path));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fuse_mount_that_nobody_keeps_does_not_outlive_the_process() {
    let (node, spec) = lazy(&noise(MIB, 37)).await;
    let path = node.layers.begin(spec).mount().await.unwrap().path;
    let _node = node.succeed().await;
    assert!(!is_mounted(&path));
}
