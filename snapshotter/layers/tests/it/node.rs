//! A node's cache and layers in a directory of its own, and layers to put on it.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use prometheus_client::registry::Registry;
use skimmer_cache::source::memory::Memory;
use skimmer_cache::{BlobKind, BlobRef, Cache, Origin};
use skimmer_layers::{Config, LayerSpec, Layers, MountMode};
use skimmer_proto::Digest;
use skimmer_store::Store;

use crate::folders::Folder;
use crate::keeper::Keeper;

pub struct Node {
    // Before the directory: unmounts when dropped, also in a panic.
    pub layers: Layers,
    pub cache: Cache,
    pub source: Arc<Memory>,
    pub directory: Folder,
    trust_toc: bool,
    kernel: Option<Arc<Keeper>>,
}

impl Node {
    pub fn new() -> Self {
        Self::over(Arc::default())
    }

    /// A node whose source others may have, too.
    pub fn over(source: Arc<Memory>) -> Self {
        Self::with(source, false, |_| {})
    }

    /// A node that mounts by TOCs.
    pub fn trusting(source: Arc<Memory>) -> Self {
        Self::with(source, true, |_| {})
    }

    /// A node that serves all its mounts itself.
    pub fn without_kernel(source: Arc<Memory>) -> Self {
        Self::with(source, false, |config| config.mode = MountMode::Fuse)
    }

    /// A node whose mounts are the kernel's, complete or not.
    pub fn in_kernel(source: Arc<Memory>, keeper: &Arc<Keeper>) -> Self {
        Self::kept(source, Folder::new(), false, Some(Arc::clone(keeper)), |_| {})
    }

    /// The same, which mounts by TOCs.
    pub fn trusting_in_kernel(source: Arc<Memory>, keeper: &Arc<Keeper>) -> Self {
        Self::kept(source, Folder::new(), true, Some(Arc::clone(keeper)), |_| {})
    }

    /// A node whose layers may take so much memory while they are indexed.
    pub fn limited(source: Arc<Memory>, metadata_bytes: u64) -> Self {
        Self::with(source, false, |config| {
            config.limits.metadata_bytes = metadata_bytes;
        })
    }

    fn with(source: Arc<Memory>, trust_toc: bool, change: impl FnOnce(&mut Config)) -> Self {
        Self::kept(source, Folder::new(), trust_toc, None, change)
    }

    fn kept(
        source: Arc<Memory>,
        directory: Folder,
        trust_toc: bool,
        kernel: Option<Arc<Keeper>>,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let deadline = Duration::from_secs(2);
        let root = directory.path();
        let store = Store::open(&root.join("meta")).unwrap();
        let mut registry = Registry::default();
        let mut config = skimmer_cache::Config::new(root.join("cache"));
        config.deadline = deadline;
        config.quota_bytes = Some(4 << 30);
        config.eviction_delay = Duration::ZERO;
        let cache =
            Cache::open(config, skimmer_cache::Sources::only(source.clone()), &mut registry)
                .unwrap();
        let mut config = Config::new(root.join("m"));
        config.deadline = deadline;
        config.min_layer_bytes = 0;
        config.background_delay = None;
        config.trust_toc = trust_toc;
        if kernel.is_some() {
            config.mode = MountMode::Kernel;
        }
        change(&mut config);
        let keeping = kernel.as_ref().map(Keeper::keeping);
        let layers = Layers::open(config, cache.clone(), &store, keeping, &mut registry).unwrap();
        Self { layers, cache, source, directory, trust_toc, kernel }
    }

    /// A second life over the same files.
    pub async fn restart(self) -> Self {
        self.layers.drain();
        self.succeed().await
    }

    /// A second life over the same files and over what can be left mounted.
    pub async fn succeed(self) -> Self {
        let Self { layers, cache, source, directory, trust_toc, kernel } = self;
        layers.leave();
        drop((layers, cache));
        // RocksDB lets one process in at a time: wait until what still runs has let go of it.
        let lock = directory.path().join("meta");
        for _ in 0..200 {
            if Store::open(&lock).is_ok() {
                return Self::kept(source, directory, trust_toc, kernel, |_| {});
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the first life does not end");
    }

    pub fn mounts(&self) -> std::path::PathBuf {
        self.directory.path().join("m")
    }

    /// Serves `tar`, gzipped, and describes it.
    pub fn layer(&self, tar: &[u8]) -> LayerSpec {
        let blob = gzip(tar);
        let spec = spec(&blob, Digest::of(tar));
        self.source.put(spec.blob.digest, blob);
        spec
    }
}

pub fn spec(blob: &[u8], diff_id: Digest) -> LayerSpec {
    let origins = vec![Origin { host: "registry.test".to_owned(), repository: "a/b".to_owned() }];
    LayerSpec {
        blob: BlobRef {
            digest: Digest::of(blob),
            len: blob.len() as u64,
            kind: BlobKind::Blob,
            origins,
        },
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
        diff_id,
        image: "registry.test/a/b:latest".to_owned(),
        toc_digest: None,
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(6));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A tar of regular files.
pub fn tar(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        builder.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Bytes that gzip can't shorten much.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[4]
        })
        .collect()
}

/// Reads a file off the runtime: the mount is served by this very process.
pub async fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || std::fs::read(path)).await.unwrap()
}

pub fn is_mounted(path: &Path) -> bool {
    mounted_as(path).is_some()
}

/// The type of file system that is mounted at `path`.
pub fn mounted_as(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = text.lines().rfind(|line| line.split(' ').nth(4) == path.to_str())?;
    let kind = line.split(" - ").nth(1)?.split(' ').next()?;
    Some(kind.to_owned())
}
