//! Layers mounted by the TOC inside their blob: those that it describes, and those that it lies about.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use skimmer_cache::source::memory::Memory;
use skimmer_keeper::Lasts;
use skimmer_layers::layer::VerifyError;
use skimmer_layers::{Cause, LayerSpec, Mode, State, pull};
use skimmer_proto::Digest;

use crate::keeper::Keeper;
use crate::node::{Node, gzip, is_mounted, mounted_as, noise, read, spec, tar};
use crate::prefill::kernel_asks;

const MIB: usize = 1 << 20;

/// A file of an eStargz layer: its name, its contents, and what its TOC says that they hash to.
type File<'a> = (&'a str, &'a [u8], Digest);

fn honest<'a>(name: &'a str, content: &'a [u8]) -> File<'a> {
    (name, content, Digest::of(content))
}

/// An eStargz blob and its DiffID. All files have the mode 0644 in the tar and `mode` in the TOC.
fn estargz(files: &[File<'_>], mode: u32) -> (Vec<u8>, Digest) {
    let (mut blob, mut stream, mut entries) = (Vec::new(), Vec::new(), Vec::new());
    let mut member = |blob: &mut Vec<u8>, bytes: &[u8]| {
        blob.extend(gzip(bytes));
        stream.extend_from_slice(bytes);
    };
    for (name, content, digest) in files {
        let entry = tar(&[(name, content.to_vec())]);
        member(&mut blob, &entry[..512]);
        entries.push(format!(
            r#"{{"name":"{name}","type":"reg","mode":{mode},"modtime":"2023-11-14T22:13:20Z",
               "size":{},"offset":{},"chunkDigest":"{digest}"}}"#,
            content.len(),
            blob.len()
        ));
        member(&mut blob, &entry[512..512 + content.len().next_multiple_of(512)]);
    }
    let at = blob.len();
    let toc = format!(r#"{{"version":1,"entries":[{}]}}"#, entries.join(","));
    member(&mut blob, &tar(&[("stargz.index.json", toc.into_bytes())]));
    blob.extend(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0");
    blob.extend(format!("{at:016x}STARGZ\x01\0\0").bytes());
    blob.extend(b"\xff\xff\0\0\0\0\0\0\0\0");
    (blob, Digest::of(&stream))
}

fn serve(node: &Node, (blob, diff_id): (Vec<u8>, Digest)) -> LayerSpec {
    let spec = spec(&blob, diff_id);
    node.source.put(spec.blob.digest, blob);
    spec
}

async fn retry() {
    tokio::time::sleep(skimmer_layers::state::RETRY_AFTER).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_toc_mounts_at_once_and_gives_way_to_the_index() {
    let (large, small) = (noise(12 * MIB, 11), noise(1000, 12));
    let layer = estargz(&[honest("large", &large), honest("small", &small)], 0o100_644);
    let node = Node::trusting(Arc::default());
    let spec = serve(&node, layer);
    let toc = node.layers.begin(spec.clone());
    let first = toc.mount().await.unwrap();
    assert!(matches!(toc.state(), State::Lazy));
    assert!(read(&first.path.join("small")).await.unwrap() == small);
    assert!(node.source.served() <= MIB as u64, "{}", node.source.served());
    assert_eq!(node.layers.status(&spec).unwrap().index_bytes, 0);
    node.layers.show(spec.blob.digest).expect_err("a TOC is no index");

    // Another life goes on from what was fetched.
    drop(toc);
    let node = node.restart().await;
    let toc = node.layers.begin(spec.clone());
    let first = toc.mount().await.unwrap();
    assert!(read(&first.path.join("small")).await.unwrap() == small);

    toc.complete().await.unwrap();
    assert!(matches!(toc.state(), State::Local));
    // Which pieces there were wasn't recorded at the end of the first life.
    assert!(node.source.served() <= spec.blob.len + MIB as u64, "{}", node.source.served());
    let second = toc.mount().await.unwrap();
    assert_ne!(second, first, "by the index");
    for path in [&first.path, &second.path] {
        assert!(read(&path.join("large")).await.unwrap() == large, "{}", path.display());
    }
    let json = |path: &std::path::Path| path.join("stargz.index.json");
    assert_eq!(read(&json(&first.path)).await.unwrap(), read(&json(&second.path)).await.unwrap());
    node.layers.release(spec.blob.digest).await;
    assert!(!is_mounted(&first.path) && !is_mounted(&second.path));

    let sober = Node::over(node.source.clone());
    sober.layers.begin(spec.clone()).ready().await.unwrap();
    let [ours, theirs] = [&node, &sober].map(|n| n.layers.export(spec.blob.digest).unwrap());
    assert!(ours == theirs, "one index, whoever builds it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_not_the_blob_say_nothing_against_its_toc() {
    let (early, late) = (noise(6 * MIB, 17), noise(6 * MIB, 18));
    let layer = estargz(&[honest("early", &early), honest("late", &late)], 0o100_644);
    let node = Node::trusting(Arc::default());
    let spec = serve(&node, layer);
    let toc = node.layers.begin(spec.clone());
    let path = toc.mount().await.unwrap().path;
    assert!(read(&path.join("early")).await.unwrap() == early);
    node.source.lies.store(true, Ordering::Relaxed);
    let failure = toc.complete().await.expect_err("the source lies");
    assert!(
        matches!(&failure.cause, Cause::Pull { source } if source.is_wrong_blob()),
        "{failure:?}"
    );
    assert!(matches!(toc.state(), State::Lazy));
    node.source.lies.store(false, Ordering::Relaxed);
    for (name, content) in [("early", &early), ("late", &late)] {
        assert!(read(&path.join(name)).await.unwrap() == *content, "{name}");
    }
    toc.complete().await.unwrap();
    assert!(matches!(toc.state(), State::Local));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_kernel_serves_by_a_toc_is_taken_over() {
    if !kernel_asks() {
        return;
    }
    let (a, b) = (noise(6 * MIB, 15), noise(6 * MIB, 16));
    let layer = estargz(&[honest("a", &a), honest("b", &b)], 0o100_644);
    let node = Node::trusting_in_kernel(Arc::default(), &Keeper::new(Lasts::Process));
    let spec = serve(&node, layer);
    let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
    assert_eq!(mounted_as(&path).as_deref(), Some("erofs"));
    let reader = |name: &str| {
        let file = path.join(name);
        tokio::spawn(async move { read(&file).await })
    };
    node.source.down.store(true, Ordering::Relaxed);
    let early = reader("a");
    tokio::time::sleep(Duration::from_millis(300)).await;
    node.layers.leave();
    let late = reader("b");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!early.is_finished() && !late.is_finished(), "nobody could have answered");
    node.source.down.store(false, Ordering::Relaxed);
    let node = node.succeed().await;
    node.layers.resume([spec.clone()]);
    assert!(early.await.unwrap().unwrap() == a);
    assert!(late.await.unwrap().unwrap() == b);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_kernel_serves_by_a_toc_stays_when_the_index_has_taken_over() {
    if !kernel_asks() {
        return;
    }
    let (a, b) = (noise(6 * MIB, 17), noise(6 * MIB, 18));
    let layer = estargz(&[honest("a", &a), honest("b", &b)], 0o100_644);
    let node = Node::trusting_in_kernel(Arc::default(), &Keeper::new(Lasts::Process));
    let spec = serve(&node, layer);
    let layer = node.layers.begin(spec.clone());
    let path = layer.mount().await.unwrap().path;
    assert!(read(&path.join("a")).await.unwrap() == a);
    layer.complete().await.unwrap();
    drop(layer);
    let node = node.succeed().await;
    node.layers.resume([spec.clone()]);
    node.layers.begin(spec).mount().await.unwrap();
    assert!(read(&path.join("b")).await.unwrap() == b);
    assert!(read(&path.join("a")).await.unwrap() == a);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_is_built_of_what_a_toc_mounts() {
    let node = Node::trusting(Arc::default());
    let spec = serve(&node, estargz(&[honest("file", &noise(MIB, 13))], 0o100_644));
    node.layers.build(vec![spec.clone()]).await.unwrap();
    node.layers.show(spec.blob.digest).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_trust_tocs_never_sees_what_they_say() {
    let content = noise(2 * MIB, 14);
    let node = Node::new();
    let spec = serve(&node, estargz(&[("file", &content, Digest::of(b"lie"))], 0o104_755));
    let layer = node.layers.begin(spec);
    let path = layer.mount().await.unwrap().path;
    assert!(matches!(layer.state(), State::Local));
    assert!(read(&path.join("file")).await.unwrap() == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lie_about_contents_never_reaches_a_reader() {
    let (content, other) = (noise(4 * MIB, 15), noise(1000, 16));
    let node = Node::trusting(Arc::default());
    let files = [("file", content.as_slice(), Digest::of(b"lie")), honest("other", &other)];
    let spec = serve(&node, estargz(&files, 0o100_644));
    let layer = node.layers.begin(spec.clone());
    let path = layer.mount().await.unwrap().path;
    let error = read(&path.join("file")).await.expect_err("other contents than the TOC says");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(read(&path.join("other")).await.unwrap() == other);
    exposed(&node, &spec, "content").await;
    let path = node.layers.begin(spec).mount().await.unwrap().path;
    assert!(read(&path.join("file")).await.unwrap() == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lie_about_a_mode_fails_the_layer_when_it_is_complete() {
    let node = Node::trusting(Arc::default());
    let spec = serve(&node, estargz(&[honest("file", &noise(MIB, 17))], 0o104_755));
    exposed(&node, &spec, "mode").await;
}

/// The lie shows when the layer is complete, the layer fails, and the next to want it gets the truth.
async fn exposed(node: &Node, spec: &LayerSpec, what: &str) {
    let layer = node.layers.begin(spec.clone());
    layer.mount().await.unwrap();
    let failure = layer.complete().await.expect_err("a lie");
    let Cause::Verify { source: VerifyError::Toc { source } } = &failure.cause else {
        panic!("{failure:?}")
    };
    assert!(source.to_string().contains(what), "{source}");
    assert!(matches!(layer.state(), State::Failed { .. }));
    retry().await;
    layer.ready().await.unwrap();
    assert_eq!(node.layers.status(spec).unwrap().mode, Mode::Local);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_images_diff_id_is_found_out_and_refused_from_then_on() {
    let node = Node::trusting(Arc::default());
    let (blob, _) = estargz(&[honest("file", &noise(MIB, 18))], 0o100_644);
    let spec = serve(&node, (blob, Digest::of(b"another image's layer")));
    let layer = node.layers.begin(spec);
    layer.mount().await.unwrap();
    let claim = |cause: &Cause| match cause {
        Cause::Pull { source } => matches!(**source, pull::Error::DiffId { .. }),
        _ => false,
    };
    let failure = layer.complete().await.expect_err("a lie");
    assert!(claim(&failure.cause), "{failure:?}");
    retry().await;
    let failure = layer.ready().await.expect_err("its TOC is not believed again");
    assert!(claim(&failure.cause), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_toc_that_the_manifest_does_not_mean_is_not_used() {
    let node = Node::trusting(Arc::default());
    let mut spec = serve(&node, estargz(&[honest("file", &noise(MIB, 19))], 0o100_644));
    spec.toc_digest = Some(Digest::of(b"another TOC"));
    let layer = node.layers.begin(spec);
    layer.ready().await.unwrap();
    assert!(matches!(layer.state(), State::Local));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_damaged_on_their_way_are_fetched_again() {
    let content = noise(8 * MIB, 20);
    let source = Arc::<Memory>::default();
    let node = Node::trusting(Arc::clone(&source));
    let (blob, diff_id) = estargz(&[honest("file", &content)], 0o100_644);
    let spec = serve(&node, (blob.clone(), diff_id));
    let mut damaged = blob.clone();
    damaged[4 * MIB] ^= 1;
    source.put(spec.blob.digest, damaged);
    let layer = node.layers.begin(spec.clone());
    let path = layer.mount().await.unwrap().path.join("file");
    assert_eq!(read(&path).await.expect_err("damaged").raw_os_error(), Some(libc::EIO));
    source.put(spec.blob.digest, blob);
    // That they were wrong, twice, is remembered for a while.
    let (served, started) = (source.served(), Instant::now());
    let again = read(&path).await;
    if started.elapsed() < Duration::from_secs(5) {
        again.expect_err("not asked again so soon");
        assert!(source.served() - served < 4 << 20, "{}", source.served() - served);
    }
    let back = loop {
        match read(&path).await {
            Ok(back) => break back,
            Err(_) => assert!(started.elapsed() < Duration::from_secs(60), "never"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    assert!(back == content);
    layer.complete().await.unwrap();
}
