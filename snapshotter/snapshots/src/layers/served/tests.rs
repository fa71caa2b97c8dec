//! Layers mounted for real, from a source in memory. As root only.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use prometheus_client::registry::Registry;
use skimmer_cache::{BlobKind, BlobRef, ByteStream, Cache, Class, FetchError, Source};
use skimmer_layers::{Config, Layers};
use skimmer_proto::Digest;
use skimmer_store::Store;

use super::Served;
use crate::implicit::{look, make, plan};
use crate::{Binding, LayerStore};

/// Serves these blobs.
struct Memory(Vec<Vec<u8>>);

#[async_trait]
impl Source for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    async fn fetch(
        &self,
        blob: &BlobRef,
        range: Range<u64>,
        _: Class,
    ) -> Result<ByteStream, FetchError> {
        let bytes = self.0.iter().find(|bytes| Digest::of(bytes) == blob.digest).unwrap();
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        Ok(Box::pin(stream::iter([Ok(bytes[range].to_vec().into())])))
    }
}

/// A tar of directories (mode, owner) and empty files.
fn tar(dirs: &[(&str, u32, u64)], files: &[&str]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(0);
    header.set_mtime(1_700_000_000);
    for (path, mode, owner) in dirs {
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(*mode);
        header.set_uid(*owner);
        header.set_gid(*owner);
        builder.append_data(&mut header, path, std::io::empty()).unwrap();
    }
    header.set_entry_type(tar::EntryType::Regular);
    for path in files {
        builder.append_data(&mut header, path, std::io::empty()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A mount that ends with the test.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_covered_mount_shows_the_directories_below() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let low = tar(&[("tmp", 0o1777, 0), ("home/app", 0o750, 70_000)], &["tmp/low"]);
    let own = tar(&[], &["tmp/own", "home/app/own", "new/own"]);
    let binding = |tar: &Vec<u8>| Binding {
        blob: BlobRef {
            digest: Digest::of(tar),
            len: tar.len() as u64,
            kind: BlobKind::Blob,
            origins: Vec::new(),
        },
        media_type: "application/vnd.oci.image.layer.v1.tar".to_owned(),
        diff_id: Digest::of(tar),
        image: "registry.test/a/b:latest".to_owned(),
        toc_digest: None,
    };
    let (low_layer, own_layer) = (binding(&low), binding(&own));
    let root = tempfile::tempdir().unwrap();
    let [cover, seen] = ["cover", "seen"].map(|name| root.path().join(name));
    std::fs::create_dir(&cover).unwrap();
    std::fs::create_dir(&seen).unwrap();

    let store = Store::open(&root.path().join("meta")).unwrap();
    let mut registry = Registry::default();
    let config = skimmer_cache::Config::new(root.path().join("cache"));
    let cache = Cache::open(
        config,
        skimmer_cache::Sources::only(Arc::new(Memory(vec![low, own]))),
        &mut registry,
    )
    .unwrap();
    let config = Config::new(root.path().join("m"));
    let layers = Layers::open(config, cache.clone(), &store, None, &mut registry).unwrap();
    let served = Served::new(layers, cache);
    let folders =
        [served.mount(&own_layer).await.unwrap(), served.mount(&low_layer).await.unwrap()];
    let implicit = served.implicit_dirs(&own_layer).await.unwrap();
    assert_eq!(implicit, ["home", "new", "tmp", "home/app"].map(PathBuf::from));

    let check = move || {
        let mut ask = |at: usize, path: &Path| look(&folders[at], path);
        make(&plan(&implicit, folders.len(), &mut ask).unwrap(), &cover).unwrap();
        let [own, low] = folders.map(|folder| folder.display().to_string());
        let options = format!("lowerdir={}:{own}:{low},index=off", cover.display());
        let read_only = MsFlags::MS_RDONLY;
        mount(Some("overlay"), &seen, Some("overlay"), read_only, Some(options.as_str())).unwrap();
        let _mounted = Mounted(seen.clone());
        let expected = [
            ("tmp", 0o1777, 0),
            ("home", 0o755, 0),
            ("home/app", 0o750, 70_000),
            ("new", 0o755, 0),
        ];
        for (path, mode, owner) in expected {
            let found = std::fs::symlink_metadata(seen.join(path)).unwrap();
            assert_eq!((found.mode() & 0o7777, found.uid()), (mode, owner), "{path}");
        }
        for file in ["tmp/low", "tmp/own", "home/app/own", "new/own"] {
            assert!(seen.join(file).exists(), "{file}");
        }
    };
    tokio::task::spawn_blocking(check).await.unwrap();
}
