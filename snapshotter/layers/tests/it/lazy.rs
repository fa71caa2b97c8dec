//! A layer whose index exists is mounted before its bytes are there.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use skimmer_cache::Class;
use skimmer_layers::mount::Mounts;
use skimmer_layers::{FuseConfig, Mode, MountMode, State};

use crate::node::{Node, is_mounted, noise, read, tar};

const MIB: usize = 1 << 20;

/// A node with `layer` imported, not its bytes; the other node's source serves both.
pub async fn with_index(files: &[(&str, Vec<u8>)]) -> (Node, skimmer_layers::LayerSpec) {
    let first = Node::new();
    let spec = first.layer(&tar(files));
    first.layers.begin(spec.clone()).ready().await.unwrap();
    let bundle = first.layers.export(spec.blob.digest).unwrap();
    let node = Node::over(first.source.clone());
    assert_eq!(node.layers.import(bundle).await.unwrap(), spec.blob.digest);
    node.source.served.store(0, Ordering::Relaxed);
    (node, spec)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_come_when_they_are_read() {
    let (large, small) = (noise(24 * MIB, 1), noise(1000, 2));
    let files = [("large", large.clone()), ("small", small.clone())];
    let (node, spec) = with_index(&files).await;
    let layer = node.layers.begin(spec.clone());
    let mounted = layer.mount().await.unwrap();
    assert!(matches!(layer.state(), State::Lazy));
    assert_eq!(node.source.served(), 0);
    assert_eq!(read(&mounted.path.join("small")).await.unwrap(), small);
    assert!(node.source.served() <= 6 << 20, "{}", node.source.served());
    let status = node.layers.status(&spec).unwrap();
    assert_eq!(status.mode, Mode::Lazy);
    assert!(status.data_bytes_present < status.data_bytes && status.data_bytes > 24 << 20);
    let path = mounted.path.join("large");
    let readers: Vec<_> = (0..4)
        .map(|_| {
            tokio::spawn({
                let path = path.clone();
                async move { read(&path).await.unwrap() }
            })
        })
        .collect();
    for reader in readers {
        assert!(reader.await.unwrap() == large);
    }
    assert!(node.source.served() <= spec.blob.len + (1 << 20), "fetched once, whoever asks");
    layer.complete().await.unwrap();
    assert!(matches!(layer.state(), State::Local));
    assert_eq!(node.layers.status(&spec).unwrap().mode, Mode::Local);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_fails_only_after_the_deadline_and_works_again_later() {
    let content = noise(8 * MIB, 3);
    let (node, spec) = with_index(&[("file", content.clone())]).await;
    let layer = node.layers.begin(spec);
    let path = layer.mount().await.unwrap().path.join("file");
    node.source.down.store(true, Ordering::Relaxed);
    let started = Instant::now();
    let error = read(&path).await.expect_err("the source is down");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(started.elapsed() >= Duration::from_millis(1900), "{:?}", started.elapsed());
    assert!(matches!(layer.state(), State::Lazy), "one failed read does not fail the layer");
    node.source.down.store(false, Ordering::Relaxed);
    assert!(read(&path).await.unwrap() == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_outlasts_the_background_that_it_waits_for() {
    let content = noise(8 * MIB, 6);
    let (node, spec) = with_index(&[("file", content.clone())]).await;
    let layer = node.layers.begin(spec);
    let path = layer.mount().await.unwrap().path.join("file");
    node.source.down.store(true, Ordering::Relaxed);
    let background = tokio::spawn({
        let layer = Arc::clone(&layer);
        async move { layer.complete().await.is_ok() }
    });
    // The reader has a second more.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let reader = tokio::task::spawn_blocking(move || {
        // The kernel would ask again for what it failed to read ahead.
        let mut file = File::options().read(true).custom_flags(libc::O_DIRECT).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map(|_| bytes)
    });
    assert!(!background.await.unwrap(), "the source is down");
    tokio::time::sleep(Duration::from_millis(200)).await;
    node.source.down.store(false, Ordering::Relaxed);
    assert!(reader.await.unwrap().expect("it has a second more") == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_for_a_turn_counts_to_the_deadline() {
    // The deadline is 2 s. Three rounds would take 6 s.
    wait_in_vain(libc::O_DIRECT, Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kernel_holds_no_reads_back() {
    // What was read ahead in vain it asks for again by itself, once or twice. If it held back all but 64, there would be
    // five rounds of that.
    wait_in_vain(0, Duration::from_secs(9)).await;
}

/// More readers than have their turn at once are told of an error before `limit`, and can read later.
async fn wait_in_vain(open: i32, limit: Duration) {
    // 128 of one layer wait for bytes at once: this is more than two rounds of them.
    const READERS: u64 = 300;
    let content = noise(8 * MIB, 8);
    let (node, spec) = with_index(&[("file", content.clone())]).await;
    let path = node.layers.begin(spec).mount().await.unwrap().path.join("file");
    node.source.down.store(true, Ordering::Relaxed);
    let shared = path.clone();
    let crowd = tokio::task::spawn_blocking(move || {
        let file = File::options().read(true).custom_flags(open).open(shared).unwrap();
        // Each a page of its own.
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
        let read = |at| {
            let started = Instant::now();
            let error = file.read_at(&mut [0; 4096], at).err();
            (error.and_then(|error| error.raw_os_error()), started.elapsed())
        };
        thread::scope(|scope| {
            let read = &read;
            let offsets = (0..READERS).map(|n| n * 4096);
            let readers: Vec<_> = offsets.map(|at| scope.spawn(move || read(at))).collect();
            readers.into_iter().map(|reader| reader.join().unwrap()).collect::<Vec<_>>()
        })
    });
    let answers = crowd.await.unwrap();
    node.source.down.store(false, Ordering::Relaxed);
    assert!(answers.iter().all(|(error, _)| *error == Some(libc::EIO)), "{answers:?}");
    let longest = answers.iter().map(|(_, waited)| *waited).max().unwrap();
    assert!(longest < limit, "{longest:?}");
    // They have given their places back. The source is asked again after a pause.
    let (started, mut again) = (Instant::now(), read(&path).await);
    while again.is_err() && started.elapsed() < Duration::from_secs(60) {
        again = read(&path).await;
    }
    assert!(again.unwrap() == content);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kernel_reads_far_ahead_where_nothing_has_to_be_fetched() {
    let (node, spec) = with_index(&[("file", noise(8 * MIB, 7))]).await;
    let read_ahead_kib = async || {
        let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
        let job = move || {
            let device = std::fs::metadata(path).unwrap().dev();
            let device = format!("{}:{}", libc::major(device), libc::minor(device));
            std::fs::read_to_string(format!("/sys/class/bdi/{device}/read_ahead_kb")).unwrap()
        };
        tokio::task::spawn_blocking(job).await.unwrap().trim().parse::<u32>().unwrap()
    };
    let config = FuseConfig::default();
    assert_eq!(read_ahead_kib().await, config.lazy_read_ahead_kib);
    node.layers.release(spec.blob.digest).await;
    let blob = node.cache.blob(spec.blob.clone()).unwrap();
    blob.ensure(0..spec.blob.len, Class::Background).await.unwrap();
    assert_eq!(read_ahead_kib().await, config.read_ahead_kib);
    assert_eq!(node.layers.status(&spec).unwrap().data_bytes_present, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_fetched_survives_a_restart() {
    let content = noise(16 * MIB, 4);
    let (node, spec) = with_index(&[("a", content.clone()), ("b", content.clone())]).await;
    let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
    assert!(read(&path.join("a")).await.unwrap() == content);
    let node = node.restart().await;
    assert!(!is_mounted(&path));
    node.source.down.store(true, Ordering::Relaxed);
    let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
    assert!(read(&path.join("a")).await.unwrap() == content);
    node.source.down.store(false, Ordering::Relaxed);
    assert!(read(&path.join("b")).await.unwrap() == content);
    let before = node.source.served();
    node.layers.begin(spec).complete().await.unwrap();
    assert!(node.source.served() - before < 4 << 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_released_layer_is_unmounted_and_can_come_back() {
    let (node, spec) = with_index(&[("file", noise(MIB, 5))]).await;
    let layer = node.layers.begin(spec.clone());
    let path = layer.mount().await.unwrap().path;
    assert!(is_mounted(&path));
    node.layers.release(spec.blob.digest).await;
    assert!(!is_mounted(&path) && !path.exists());
    assert!(node.layers.get(spec.blob.digest).is_empty());
    layer.ready().await.expect_err("it was released");
    let again = node.layers.begin(spec).mount().await.unwrap().path;
    assert_ne!(again, path);
    assert_eq!(read(&again.join("file")).await.unwrap(), noise(MIB, 5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_unmounted_when_the_owner_goes() {
    let (node, spec) = with_index(&[("file", noise(1000, 6))]).await;
    let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
    assert!(is_mounted(&path));
    let Node { layers, directory, .. } = node;
    drop(layers);
    assert!(!is_mounted(&path));
    drop(directory);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_predecessor_left_mounted_goes_at_the_start() {
    let (node, spec) = with_index(&[("file", noise(1000, 7))]).await;
    let path = node.layers.begin(spec).mount().await.unwrap().path;
    std::fs::create_dir(node.mounts().join("not-ours")).unwrap();
    let mounts = node.mounts();
    tokio::task::spawn_blocking(move || Mounts::open(&mounts, MountMode::Auto, None).unwrap())
        .await
        .unwrap();
    assert!(!is_mounted(&path) && !path.exists());
    assert!(node.mounts().join("not-ours").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_layers_begin_at_once_and_each_is_fetched_once() {
    let node = Node::new();
    let layers: Vec<_> = (0..12).map(|n| (n, noise(MIB, 100 + n))).collect();
    let specs: Vec<_> =
        layers.iter().map(|(_, b)| node.layer(&tar(&[("file", b.clone())]))).collect();
    let begun: Vec<_> = specs.iter().chain(&specs).map(|s| node.layers.begin(s.clone())).collect();
    for layer in &begun {
        layer.ready().await.unwrap();
    }
    assert_eq!(node.source.served(), specs.iter().map(|spec| spec.blob.len).sum::<u64>());
    for (layer, (_, content)) in begun.iter().zip(&layers) {
        let path = layer.mount().await.unwrap().path;
        assert!(read(&path.join("file")).await.unwrap() == *content);
    }
}

/// Resident memory of this process, KiB.
fn resident_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_mounts_take_little_memory_also_the_second_time() {
    let node = Node::without_kernel(Arc::default());
    let specs: Vec<_> =
        (0..50).map(|n| node.layer(&tar(&[("file", noise(2000, 200 + n))]))).collect();
    let mount_all = async || {
        for spec in &specs {
            let path = node.layers.begin(spec.clone()).mount().await.unwrap().path;
            read(&path.join("file")).await.unwrap();
        }
    };
    let before = resident_kib();
    mount_all().await;
    for spec in &specs {
        node.layers.release(spec.blob.digest).await;
    }
    mount_all().await;
    let grown = resident_kib().saturating_sub(before);
    // Other tests run meanwhile in this process. A mistake shows as 800 MiB and more.
    assert!(grown < 300 << 10, "50 mounts took {grown} KiB");
}
