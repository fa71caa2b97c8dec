//! Layers that are not what they claim to be.

use std::os::unix::fs::FileExt;

use skimmer_layers::{Cause, State, pull};
use skimmer_proto::{Digest, PieceTable};

use crate::node::{Node, gzip, noise, read, spec, tar};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_bytes_than_the_digest_says_are_refused_and_forgotten() {
    let node = Node::new();
    let tar = tar(&[("file", noise(3 << 20, 1))]);
    let good = gzip(&tar);
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    let spec = spec(&good, Digest::of(&tar));
    node.source.put(spec.blob.digest, bad);
    let layer = node.layers.begin(spec.clone());
    let failure = layer.ready().await.expect_err("the bytes are wrong");
    let Cause::Pull { source } = &failure.cause else { panic!("{failure:?}") };
    assert!(matches!(**source, pull::Error::Digest { .. }), "{source}");
    assert!(failure.to_string().contains(&spec.blob.digest.to_string()));
    assert!(failure.to_string().contains("registry.test/a/b:latest"));
    // The registry is repaired: the next use, a while later, succeeds.
    node.source.put(spec.blob.digest, good);
    tokio::time::sleep(skimmer_layers::state::RETRY_AFTER).await;
    layer.ready().await.unwrap();
    let path = layer.mount().await.unwrap().path;
    assert!(read(&path.join("file")).await.unwrap() == noise(3 << 20, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_images_diff_id_is_refused_and_leaves_the_honest_image_alone() {
    let node = Node::new();
    let honest = node.layer(&tar(&[("file", noise(100_000, 2))]));
    let mut liar = honest.clone();
    liar.diff_id = Digest::of(b"another image's layer");
    // Nothing is known of the blob: it is pulled through, and the claim fails.
    let failure = node.layers.begin(liar.clone()).ready().await.expect_err("a lie");
    let Cause::Pull { source } = &failure.cause else { panic!("{failure:?}") };
    assert!(matches!(**source, pull::Error::DiffId { .. }), "{source}");
    let layer = node.layers.begin(honest);
    let path = layer.mount().await.unwrap().path;
    // Now there is a trusted index: the claim fails by it.
    tokio::time::sleep(skimmer_layers::state::RETRY_AFTER).await;
    let failure = node.layers.begin(liar).ready().await.expect_err("a lie");
    assert!(matches!(failure.cause, Cause::DiffId { .. }), "{failure:?}");
    assert_eq!(read(&path.join("file")).await.unwrap(), noise(100_000, 2));
    assert!(matches!(layer.state(), State::Local));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_lies_about_the_diff_id_is_purged_on_completion() {
    let first = Node::new();
    let honest = first.layer(&tar(&[("file", noise(3 << 20, 3))]));
    first.layers.begin(honest.clone()).ready().await.unwrap();
    let shown = first.layers.show(honest.blob.digest).unwrap();
    let node = Node::over(first.source.clone());
    let mut lie = honest.clone();
    lie.diff_id = Digest::of(b"another layer");
    let encoded = shown.table.encode();
    let values: Vec<[u8; 32]> = encoded[8 + 8 + 4 * 32..].as_chunks().0.to_vec();
    let table = PieceTable::new(
        shown.table.geometry,
        lie.blob.digest,
        lie.diff_id,
        shown.table.index,
        values,
    )
    .unwrap()
    .encode();
    let length = (table.len() as u64).to_le_bytes();
    let bundle = [b"SKBUNDL1".as_slice(), &length, &table, &shown.encoded].concat();
    node.layers.import(bundle).await.unwrap();
    let layer = node.layers.begin(lie);
    let path = layer.mount().await.unwrap().path.join("file");
    // A container that goes on using what is unmounted.
    let open = tokio::task::spawn_blocking(move || {
        let file = std::fs::File::open(path).unwrap();
        file.read_exact_at(&mut [0; 10], 0).unwrap();
        file
    });
    let open = open.await.unwrap();
    let failure = layer.complete().await.expect_err("a lie");
    assert!(matches!(failure.cause, Cause::Verify { .. }), "{failure:?}");
    let read = tokio::task::spawn_blocking(move || open.read_exact_at(&mut [0; 10], 2 << 20));
    let error = read.await.unwrap().expect_err("wrong bytes");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(matches!(layer.state(), State::Failed { .. }));
    assert!(node.layers.show(honest.blob.digest).is_err(), "it was purged");
    node.layers.begin(honest).ready().await.unwrap();
}

/// Every byte of the layer is right, and every piece; but files have others' names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_lies_about_files_is_purged_on_completion() {
    let first = Node::new();
    let tars = ["right", "wrong"].map(|name| tar(&[(name, noise(3 << 20, 5))]));
    // Not compressed, so that the same chunks fit both.
    let [honest, other] = tars.map(|tar| {
        let spec = spec(&tar, Digest::of(&tar));
        first.source.put(spec.blob.digest, tar);
        spec
    });
    let mut shown = Vec::new();
    for spec in [&honest, &other] {
        first.layers.begin(spec.clone()).ready().await.unwrap();
        shown.push(first.layers.show(spec.blob.digest).unwrap());
    }
    let (table, index) = (&shown[0].table, &shown[1].encoded);
    let values = (0..table.geometry.pieces()).map(|piece| *table.value(piece).unwrap()).collect();
    let table =
        PieceTable::new(table.geometry, table.blob, table.diff_id, Digest::of(index), values);
    let table = table.unwrap().encode();
    let length = (table.len() as u64).to_le_bytes();
    let bundle = [b"SKBUNDL1".as_slice(), &length, &table, index].concat();
    let node = Node::over(first.source.clone());
    node.layers.import(bundle).await.unwrap();
    let layer = node.layers.begin(honest.clone());
    let path = layer.mount().await.unwrap().path;
    assert!(read(&path.join("wrong")).await.is_ok(), "the lie is believed until then");
    let failure = layer.complete().await.expect_err("a lie");
    assert!(matches!(failure.cause, Cause::Verify { .. }), "{failure:?}");
    assert!(node.layers.show(honest.blob.digest).is_err(), "it was purged");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_tar_fails_with_the_reason() {
    let node = Node::new();
    for (name, blob) in [
        ("text", b"<html>no such page</html>".repeat(100)),
        ("cut gzip", {
            let mut b = gzip(&tar(&[("f", noise(1 << 20, 4))]));
            b.truncate(500_000);
            b
        }),
        ("gzip of text", gzip(&b"<html>no such page</html>".repeat(100))),
        ("nothing", Vec::new()),
    ] {
        let spec = spec(&blob, Digest::of(name.as_bytes()));
        node.source.put(spec.blob.digest, blob);
        let failure = node.layers.begin(spec).ready().await.expect_err(name);
        assert!(matches!(failure.cause, Cause::Pull { .. }), "{name}: {failure:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_that_takes_too_much_memory_is_refused_and_the_key_named() {
    let names: Vec<String> = (0..1000).map(|n| format!("file-{n}")).collect();
    let files: Vec<_> = names.iter().map(|name| (name.as_str(), Vec::new())).collect();
    let node = Node::limited(std::sync::Arc::default(), 100_000);
    let small = node.layer(&tar(&files[..100]));
    node.layers.begin(small).ready().await.unwrap();
    let failure = node.layers.begin(node.layer(&tar(&files))).ready().await.expect_err("1000");
    let text = skimmer_layers::mount::error_chain(&*failure);
    assert!(text.contains("index.max_metadata_bytes"), "{text}");
}
