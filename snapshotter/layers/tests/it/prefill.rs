//! The kernel serves layers before they are complete: it asks for what is missing, and nobody ever reads a hole.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use skimmer_cache::source::memory::Memory;
use skimmer_keeper::Lasts;
use skimmer_layers::mount::Mounts;
use skimmer_layers::mount::prefill::Prefill;
use skimmer_layers::{LayerSpec, MountMode, State, error_chain};

use crate::folders::Folder;
use crate::keeper::Keeper;
use crate::node::{Node, is_mounted, mounted_as, noise, read, tar};

const MIB: usize = 1 << 20;

pub const PATIENCE: Duration = Duration::from_secs(20);

/// Where the kernel can't, there is nothing to test.
pub fn kernel_asks() -> bool {
    let Err(error) = Prefill::probe(&std::env::temp_dir()) else { return true };
    eprintln!("skipped: the kernel doesn't ask before it reads: {}", error_chain(&error));
    false
}

/// A source with a layer of `files`, and its index.
async fn indexed(files: &[(&str, Vec<u8>)]) -> (Arc<Memory>, LayerSpec, Vec<u8>) {
    let first = Node::new();
    let spec = first.layer(&tar(files));
    first.layers.begin(spec.clone()).ready().await.unwrap();
    let bundle = first.layers.export(spec.blob.digest).unwrap();
    first.source.served.store(0, Ordering::Relaxed);
    (Arc::clone(&first.source), spec, bundle)
}

/// A node with the index of a layer, whose kernel serves it before any of its bytes is there.
async fn lazy(files: &[(&str, Vec<u8>)]) -> (Node, Arc<Keeper>, LayerSpec, PathBuf) {
    let (source, spec, bundle) = indexed(files).await;
    let keeper = Keeper::new(Lasts::Process);
    let node = Node::in_kernel(source, &keeper);
    node.layers.import(bundle).await.unwrap();
    let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
    assert_eq!(mounted_as(&path).as_deref(), Some("erofs"));
    assert_eq!(node.source.served(), 0);
    (node, keeper, spec, path)
}

/// Begins to read a file.
fn reader(path: &Path) -> tokio::task::JoinHandle<std::io::Result<Vec<u8>>> {
    let path = path.to_owned();
    tokio::spawn(async move { read(&path).await })
}

fn is_lazy(path: &Path) -> bool {
    path.with_extension("lazy").exists()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_come_when_the_kernel_is_about_to_read_them() {
    if !kernel_asks() {
        return;
    }
    let (large, small) = (noise(24 * MIB + 77, 51), noise(1000, 52));
    let files = [("large", large.clone()), ("small", small.clone()), ("zeros", vec![0; MIB])];
    let (node, _keeper, spec, path) = lazy(&files).await;
    assert_eq!(read(&path.join("small")).await.unwrap(), small);
    assert!(node.source.served() <= 6 << 20, "{}", node.source.served());
    let file = File::open(path.join("large")).unwrap();
    let expected = large.clone();
    let odd = tokio::task::spawn_blocking(move || {
        let mut state = 1u64;
        for _ in 0..200 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let at = usize::try_from(state >> 33).unwrap() % (expected.len() - 5000);
            let mut bytes = vec![0; 1 + at % 4999];
            file.read_exact_at(&mut bytes, at as u64).unwrap();
            assert!(bytes == expected[at..at + bytes.len()], "other bytes at {at}");
        }
    });
    let readers: Vec<_> = (0..4).map(|_| reader(&path.join("large"))).collect();
    for reader in readers {
        assert!(reader.await.unwrap().unwrap() == large);
    }
    odd.await.unwrap();
    assert!(read(&path.join("zeros")).await.unwrap() == vec![0; MIB]);
    assert!(node.source.served() <= spec.blob.len + (1 << 20), "fetched once, whoever asks");
    node.layers.release(spec.blob.digest).await;
    assert!(!is_mounted(&path) && !is_lazy(&path));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_fails_only_after_the_deadline_and_works_again_later() {
    if !kernel_asks() {
        return;
    }
    let content = noise(8 * MIB, 53);
    let (node, _keeper, _spec, path) = lazy(&[("file", content.clone())]).await;
    node.source.down.store(true, Ordering::Relaxed);
    let started = Instant::now();
    let error = read(&path.join("file")).await.expect_err("the source is down");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(started.elapsed() >= Duration::from_millis(1900), "{:?}", started.elapsed());
    node.source.down.store(false, Ordering::Relaxed);
    assert!(read(&path.join("file")).await.unwrap() == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_complete_layer_is_read_without_us_from_where_it_is_mounted() {
    if !kernel_asks() {
        return;
    }
    let content = noise(6 * MIB, 54);
    let (node, keeper, spec, path) = lazy(&[("file", content.clone())]).await;
    assert!(is_lazy(&path));
    assert_eq!(keeper.names().len(), 3, "group, journal and data: {:?}", keeper.names());
    let layer = node.layers.begin(spec.clone());
    layer.complete().await.unwrap();
    assert!(matches!(layer.state(), State::Local));
    assert!(!is_lazy(&path));
    assert_eq!(keeper.names().len(), 2, "{:?}", keeper.names());
    assert_eq!(layer.mount().await.unwrap().path, path, "nobody mounts it a second time");
    drop(layer);
    // Nobody would answer.
    node.layers.leave();
    assert!(read(&path.join("file")).await.unwrap() == content);
    let node = node.succeed().await;
    node.layers.resume([spec.clone()]);
    assert_eq!(node.layers.begin(spec).mount().await.unwrap().path, path);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_flight_is_answered_by_the_next_process() {
    if !kernel_asks() {
        return;
    }
    let content = noise(8 * MIB, 55);
    let files = [("a", content.clone()), ("b", content.clone())];
    let (node, _keeper, spec, path) = lazy(&files).await;
    node.source.down.store(true, Ordering::Relaxed);
    let early = reader(&path.join("a"));
    // The read is taken, and nothing comes.
    tokio::time::sleep(Duration::from_millis(300)).await;
    node.layers.leave();
    let late = reader(&path.join("b"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!early.is_finished() && !late.is_finished(), "nobody could have answered");
    node.source.down.store(false, Ordering::Relaxed);
    let node = node.succeed().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!early.is_finished() && !late.is_finished(), "the layer is not open yet");
    node.layers.resume([spec.clone()]);
    assert!(early.await.unwrap().unwrap() == content);
    assert!(late.await.unwrap().unwrap() == content);
    let layer = node.layers.begin(spec);
    layer.complete().await.unwrap();
    assert_eq!(layer.mount().await.unwrap().path, path);
    assert!(!is_lazy(&path));
}

/// A reader waits for a layer, which its node's next process can open neither by an index nor from the source.
struct Shut {
    node: Node,
    _keeper: Arc<Keeper>,
    spec: LayerSpec,
    path: PathBuf,
    content: Vec<u8>,
    waiting: tokio::task::JoinHandle<std::io::Result<Vec<u8>>>,
}

impl Shut {
    async fn new(seed: u64) -> Self {
        let content = noise(8 * MIB, seed);
        let (node, keeper, spec, path) = lazy(&[("file", content.clone())]).await;
        node.layers.leave();
        let waiting = reader(&path.join("file"));
        let shut = Self { node, _keeper: keeper, spec, path, content, waiting };
        let [index, elsewhere] = shut.indexes();
        fs::rename(index, elsewhere).unwrap();
        shut.node.source.down.store(true, Ordering::Relaxed);
        let shut = Self { node: shut.node.succeed().await, ..shut };
        shut.node.layers.resume([shut.spec.clone()]);
        let layer = shut.node.layers.get(shut.spec.blob.digest).pop().unwrap();
        layer.ready().await.expect_err("neither an index nor a source");
        shut
    }

    /// Where the index belongs, and where it is.
    fn indexes(&self) -> [PathBuf; 2] {
        let layers = self.node.directory.path().join("cache/layers-v1");
        ["index", "elsewhere"].map(|name| layers.join(self.spec.blob.digest.hex()).join(name))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_readers_wait_for_is_opened_again_until_it_can_be() {
    if !kernel_asks() {
        return;
    }
    let shut = Shut::new(62).await;
    let [index, elsewhere] = shut.indexes();
    fs::rename(elsewhere, index).unwrap();
    assert!(!shut.waiting.is_finished(), "nobody could have answered");
    shut.node.source.down.store(false, Ordering::Relaxed);
    assert!(shut.waiting.await.unwrap().unwrap() == shut.content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_left_of_a_layer_that_could_not_be_opened_goes_with_it() {
    if !kernel_asks() {
        return;
    }
    let Shut { node, _keeper, spec, path, content, waiting } = Shut::new(63).await;
    node.layers.release(spec.blob.digest).await;
    waiting.await.unwrap().expect_err("nobody serves it any more");
    assert!(!is_mounted(&path));
    // It comes back.
    node.source.down.store(false, Ordering::Relaxed);
    let path = node.layers.begin(spec).mount().await.unwrap().path;
    assert!(reader(&path.join("file")).await.unwrap().unwrap() == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_reads_zeros_if_it_is_not_known_which_file_was_about_to_be_read() {
    if !kernel_asks() {
        return;
    }
    let (content, other) = (noise(4 * MIB, 60), noise(4 * MIB, 61));
    let (node, keeper, spec, path) = lazy(&[("file", content.clone())]).await;
    let second = node.layer(&tar(&[("other", other.clone())]));
    let first = Node::over(node.source.clone());
    first.layers.begin(second.clone()).ready().await.unwrap();
    let bundle = first.layers.export(second.blob.digest).unwrap();
    node.layers.import(bundle).await.unwrap();
    let second_path = node.layers.begin(second.clone()).mount().await.unwrap().path;
    assert!(is_lazy(&second_path));
    node.source.down.store(true, Ordering::Relaxed);
    let readers = [reader(&path.join("file")), reader(&second_path.join("other"))];
    tokio::time::sleep(Duration::from_millis(300)).await;
    node.layers.leave();
    keeper.forget_files();
    node.source.down.store(false, Ordering::Relaxed);
    let node = node.succeed().await;
    node.layers.resume([spec, second]);
    let [file, second_file] = readers;
    assert!(file.await.unwrap().unwrap() == content);
    assert!(second_file.await.unwrap().unwrap() == other);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_what_nobody_wants_any_more_are_told() {
    if !kernel_asks() {
        return;
    }
    let (node, _keeper, _spec, path) = lazy(&[("file", noise(4 * MIB, 56))]).await;
    node.source.down.store(true, Ordering::Relaxed);
    let waiting = reader(&path.join("file"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let node = node.succeed().await;
    node.layers.resume([]);
    let error = waiting.await.unwrap().expect_err("the layer is gone");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(!is_mounted(&path) && !is_lazy(&path));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_open_is_served_after_the_release() {
    if !kernel_asks() {
        return;
    }
    let content = noise(8 * MIB, 57);
    let (node, keeper, spec, path) = lazy(&[("file", content.clone())]).await;
    let file = File::open(path.join("file")).unwrap();
    node.layers.release(spec.blob.digest).await;
    assert!(!is_mounted(&path));
    let expected = content.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let mut bytes = vec![0; expected.len()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == expected);
    });
    reading.await.unwrap();
    let gone = async {
        while keeper.names().len() > 2 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.expect("the file stays marked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_mounted_again_while_it_is_still_used_survives_too() {
    if !kernel_asks() {
        return;
    }
    let content = noise(8 * MIB, 62);
    let (node, keeper, spec, path) = lazy(&[("file", content.clone())]).await;
    let file = File::open(path.join("file")).unwrap();
    node.layers.release(spec.blob.digest).await;
    assert!(!is_mounted(&path));
    let again = node.layers.begin(spec.clone()).mount().await.unwrap().path;
    assert!(again != path && is_lazy(&again));
    assert_eq!(keeper.names().len(), 3, "group, journal and file: {:?}", keeper.names());
    node.source.down.store(true, Ordering::Relaxed);
    let waiting = reader(&again.join("file"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    node.layers.leave();
    node.source.down.store(false, Ordering::Relaxed);
    let node = node.succeed().await;
    node.layers.resume([spec]);
    assert!(waiting.await.unwrap().unwrap() == content);
    let mut bytes = vec![0; content.len()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_cache_takes_nothing_from_what_the_kernel_reads() {
    if !kernel_asks() {
        return;
    }
    let content = noise(8 * MIB, 58);
    let files = [("a", content.clone()), ("b", content.clone())];
    let (node, _keeper, _spec, path) = lazy(&files).await;
    assert!(read(&path.join("a")).await.unwrap() == content);
    node.cache.prune(skimmer_cache::Prune::All).await.unwrap();
    node.source.down.store(true, Ordering::Relaxed);
    nix::fcntl::posix_fadvise(
        File::open(path.join("a")).unwrap(),
        0,
        0,
        nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )
    .unwrap();
    assert!(read(&path.join("a")).await.unwrap() == content);
    node.source.down.store(false, Ordering::Relaxed);
    assert!(read(&path.join("b")).await.unwrap() == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_that_nobody_kept_is_guarded_again() {
    if !kernel_asks() {
        return;
    }
    let content = noise(8 * MIB, 59);
    let (node, keeper, spec, path) = lazy(&[("file", content.clone())]).await;
    node.layers.leave();
    keeper.lose_everything();
    let node = node.succeed().await;
    node.layers.resume([spec.clone()]);
    node.layers.begin(spec).mount().await.unwrap();
    assert!(read(&path.join("file")).await.unwrap() == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_where_the_descriptors_are_safe() {
    if !kernel_asks() {
        return;
    }
    for (mode, lasts, expected) in [
        (MountMode::Fuse, Some(Lasts::Machine), Some(false)),
        (MountMode::Auto, Some(Lasts::Machine), Some(true)),
        (MountMode::Auto, Some(Lasts::Process), Some(false)),
        (MountMode::Auto, Some(Lasts::UntilStop), Some(false)),
        (MountMode::Auto, None, Some(false)),
        (MountMode::Kernel, Some(Lasts::Machine), Some(true)),
        (MountMode::Kernel, Some(Lasts::Process), Some(true)),
        (MountMode::Kernel, Some(Lasts::UntilStop), None),
        (MountMode::Kernel, None, None),
    ] {
        let directory = Folder::new();
        let keeping = lasts.map(|lasts| Keeper::new(lasts).keeping());
        let opened = Mounts::open(directory.path(), mode, keeping);
        let lazily = opened.map(|mounts| mounts.lazily().is_ok()).ok();
        assert_eq!(lazily, expected, "{mode:?} with {lasts:?}");
    }
}
