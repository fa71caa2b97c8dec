//! The whole snapshotter on a real disk, with layers and content store in memory.

mod covers;
mod lost;
mod mapped;
mod rebuilt;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use prometheus_client::registry::Registry;
use skimmer_proto::Digest;
use skimmer_store::Store;
use tempfile::TempDir;

use super::{Config, Error, Prepared, Rebuilt, Snapshotter};
use crate::chain;
use crate::identify::tests::{Shelf, chain_id};
use crate::layers::{LayerBlame, LayerError, LayerStore};
use crate::records::{Change, Memory, Records, Stored};
use crate::snapshot::{REFERENCE_LABEL, REQUIRED_LABEL};
use crate::{Binding, Kind, Labels, Usage};

/// Layers in memory: each blob is ready, pending or failed, as the test says.
#[derive(Default)]
struct Layers {
    folder: PathBuf,
    states: Mutex<BTreeMap<Digest, State>>,
    implicit: Mutex<BTreeMap<Digest, Vec<PathBuf>>>,
    begun: Mutex<Vec<Digest>>,
    released: Mutex<Vec<Digest>>,
    lost: BTreeSet<Digest>,
}

#[derive(Clone, Copy)]
enum State {
    Pending,
    Failed(LayerBlame),
}

impl Layers {
    fn set(&self, blob: &str, state: State) {
        self.states.lock().unwrap().insert(Digest::of(blob.as_bytes()), state);
    }

    fn heal(&self, blob: &str) {
        self.states.lock().unwrap().remove(&Digest::of(blob.as_bytes()));
    }
}

#[async_trait]
impl LayerStore for Layers {
    fn resume(&self, _: Vec<Binding>) -> BTreeSet<Digest> {
        self.lost.clone()
    }

    fn begin(&self, layer: &Binding) {
        let mut begun = self.begun.lock().unwrap();
        if !begun.contains(&layer.blob.digest) {
            begun.push(layer.blob.digest);
        }
    }

    async fn ready(&self, layer: &Binding) -> Result<(), LayerError> {
        let state = self.states.lock().unwrap().get(&layer.blob.digest).copied();
        match state {
            None => Ok(()),
            Some(State::Pending) => std::future::pending().await,
            Some(State::Failed(blame)) => {
                Err(LayerError { blame, reason: "wrong DiffID", source: "for the test".into() })
            }
        }
    }

    async fn mount(&self, layer: &Binding) -> Result<PathBuf, LayerError> {
        self.ready(layer).await?;
        let folder = self.folder.join(layer.blob.digest.hex());
        std::fs::create_dir_all(&folder).unwrap();
        Ok(folder)
    }

    fn place(&self, layer: &Binding) -> PathBuf {
        self.folder.join(layer.blob.digest.hex())
    }

    async fn implicit_dirs(&self, layer: &Binding) -> Result<Vec<PathBuf>, LayerError> {
        Ok(self.implicit.lock().unwrap().get(&layer.blob.digest).cloned().unwrap_or_default())
    }

    async fn usage(&self, layer: &Binding) -> Result<Usage, LayerError> {
        Ok(Usage { bytes: layer.blob.len, inodes: 3 })
    }

    fn keep(&self, _: &Digest) {}

    async fn release(&self, blob: &Digest) {
        self.released.lock().unwrap().push(*blob);
    }
}

struct Bench {
    root: TempDir,
    layers: Arc<Layers>,
    shelf: Arc<Shelf>,
    records: Arc<dyn Records>,
    snapshotter: Snapshotter,
    rebuilt: Rebuilt,
}

impl Bench {
    fn new() -> Self {
        Self::on(tempfile::tempdir().unwrap(), Arc::new(Memory::default()))
    }

    fn on(root: TempDir, records: Arc<dyn Records>) -> Self {
        Self::without(BTreeSet::new(), root, records)
    }

    /// After a start that found the mounts of the layers of `lost` served by nobody.
    fn without(lost: BTreeSet<Digest>, root: TempDir, records: Arc<dyn Records>) -> Self {
        let layers = Layers { folder: root.path().join("m"), lost, ..Layers::default() };
        let (layers, shelf) = (Arc::new(layers), Arc::new(Shelf::default()));
        let config = Config {
            root: root.path().to_owned(),
            prepare_wait: Duration::from_millis(50),
            deadline: Duration::from_millis(50),
            registry_config: None,
        };
        let (snapshotter, rebuilt) = Snapshotter::open(
            config,
            Arc::clone(&records),
            Arc::clone(&layers) as Arc<dyn LayerStore>,
            Arc::clone(&shelf) as _,
            &mut Registry::default(),
        )
        .unwrap();
        Self { root, layers, shelf, records, snapshotter, rebuilt }
    }

    /// The next start of the daemon, with this database.
    fn restart(self, records: Arc<dyn Records>) -> Self {
        Self::on(self.root, records)
    }

    async fn prepare(&self, key: &str, parent: &str) {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        self.snapshotter.prepare(key, parent, Labels::new()).await.unwrap();
    }

    async fn commit(&self, name: &str, key: &str) {
        let (name, key) = (name.to_owned(), key.to_owned());
        self.snapshotter.commit(name, key, Labels::new(), String::new()).await.unwrap();
    }

    /// What containerd does for one layer of an image.
    async fn pull(&self, diffs: &[&str], parent: &str) -> Result<Prepared, Error> {
        let reference = chain_id(diffs).to_string();
        let key = format!("default/9/extract-1 {reference}");
        let labels = Labels::from([(REFERENCE_LABEL.to_owned(), reference)]);
        self.snapshotter.prepare(key, parent.to_owned(), labels).await
    }

    async fn pulled(&self, diffs: &[&str], parent: &str) -> String {
        match self.pull(diffs, parent).await.unwrap() {
            Prepared::Exists(name) => name,
            Prepared::Mounts(mounts) => panic!("not lazy: {mounts:?}"),
        }
    }

    async fn list(&self, filters: &[String]) -> Vec<String> {
        let mut pages = self.snapshotter.list(filters).unwrap();
        let mut names = Vec::new();
        while let Some(page) = pages.recv().await {
            names.extend(page.unwrap().into_iter().map(|snapshot| snapshot.name));
        }
        names
    }
}

fn folders(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.parse::<u64>().is_ok());
    names.sort();
    names
}

#[tokio::test]
async fn provides_a_layer_instead_of_mounts() {
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a"), ("B", "b")], &[("r.io", "x")]);
    let base = bench.pulled(&["a"], "").await;
    let begun = bench.layers.begun.lock().unwrap().clone();
    assert_eq!(
        begun,
        [Digest::of(b"A"), Digest::of(b"B")],
        "all layers begin at the first Prepare"
    );
    let top = bench.pulled(&["a", "b"], &base).await;
    assert_eq!(bench.pulled(&["a", "b"], &base).await, top, "answered from the record");

    // containerd looks it up by label and parent, then stats it.
    let reference = chain_id(&["a", "b"]);
    let filter = format!("labels.\"{REFERENCE_LABEL}\"=={reference},parent==\"{base}\"");
    assert_eq!(bench.list(&[filter]).await, [top.as_str()]);
    let found = bench.snapshotter.stat(top.clone()).await.unwrap();
    assert_eq!((found.kind, found.parent.as_str()), (Kind::Committed, base.as_str()));
    assert_eq!(found.reference(), Some(reference.to_string().as_str()));
    let usage = bench.snapshotter.usage(top.clone()).await.unwrap();
    assert_eq!(usage, Usage { bytes: 1, inodes: 3 });

    bench.prepare("container", &top).await;
    let mounts = bench.snapshotter.mounts("container".to_owned()).await.unwrap();
    let lower = |blob: &str| bench.layers.folder.join(Digest::of(blob.as_bytes()).hex());
    let lower = format!("lowerdir={}:{}", lower("B").display(), lower("A").display());
    assert!(mounts[0].options.contains(&lower), "{mounts:?}");
}

#[tokio::test]
async fn leaves_to_containerd_what_it_cannot_provide() {
    let bench = Bench::new();
    let is_mounts = |prepared| matches!(prepared, Ok(Prepared::Mounts(_)));
    // Nobody knows the image.
    assert!(is_mounts(bench.pull(&["a"], "").await));
    bench.shelf.add(&[("B", "b")], &[("r.io", "x")]);
    bench.layers.set("B", State::Failed(LayerBlame::Source));
    assert!(is_mounts(bench.pull(&["b"], "").await));
}

#[tokio::test]
async fn a_bad_layer_fails_its_pull_and_no_other() {
    let bench = Bench::new();
    bench.shelf.add(&[("poison", "a")], &[("r.io", "evil")]);
    bench.layers.set("poison", State::Failed(LayerBlame::Content));
    let error = bench.pull(&["a"], "").await.unwrap_err();
    let status = crate::convert::status(&error);
    let poison = Digest::of(b"poison").to_string();
    for part in ["r.io/evil", poison.as_str(), "wrong DiffID: for the test"] {
        assert!(status.message().contains(part), "{}", status.message());
    }
    assert!(bench.list(&[]).await.is_empty());
    // The honest image has the same chain ID.
    bench.shelf.add(&[("honest", "a")], &[("r.io", "x")]);
    bench.pulled(&["a"], "").await;
    // And so it goes when the bad image is the newer one.
    bench.shelf.add(&[("poison", "a"), ("C", "c")], &[("r.io", "evil")]);
    bench.pulled(&["a"], "").await;
}

#[tokio::test]
async fn a_slow_bad_layer_gives_way_to_a_good_one() {
    let bench = Bench::new();
    bench.shelf.add(&[("poison", "a")], &[("r.io", "evil")]);
    bench.layers.set("poison", State::Pending);
    let base = bench.pulled(&["a"], "").await;
    bench.layers.set("poison", State::Failed(LayerBlame::Content));
    assert!(bench.pull(&["a"], "").await.is_err());
    bench.shelf.add(&[("honest", "a")], &[("r.io", "x")]);
    // Slow itself, it doesn't take the place of another.
    bench.layers.set("honest", State::Pending);
    assert_eq!(bench.pulled(&["a"], "").await, base);
    let bound = |snapshot: crate::Snapshot| snapshot.layer.unwrap().blob.digest;
    let stat = || bench.snapshotter.stat(base.clone());
    assert_eq!(bound(stat().await.unwrap()), Digest::of(b"poison"));
    bench.layers.heal("honest");
    assert_eq!(bench.pulled(&["a"], "").await, base);
    assert_eq!(bound(stat().await.unwrap()), Digest::of(b"honest"));
    bench.snapshotter.cleanup().await.unwrap();
    assert_eq!(*bench.layers.released.lock().unwrap(), [Digest::of(b"poison")]);
    bench.snapshotter.view("v".to_owned(), base, Labels::new()).await.unwrap();
}

#[tokio::test]
async fn a_slow_layer_is_pending_and_mounts_wait() {
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a")], &[("r.io", "x")]);
    bench.prepare("before", "").await;
    bench.layers.set("A", State::Pending);
    let base = bench.pulled(&["a"], "").await;
    // Snapshots on it are made; where it will be is said, but isn't there.
    let layer = bench.layers.folder.join(Digest::of(b"A").hex());
    let view = bench.snapshotter.view("v".to_owned(), base.clone(), Labels::new()).await.unwrap();
    assert_eq!(Path::new(&view[0].source), layer);
    let made = bench.snapshotter.prepare("c".to_owned(), base.clone(), Labels::new()).await;
    let Ok(Prepared::Mounts(early)) = made else { panic!("{made:?}") };
    let upper = bench.root.path().join("4/fs");
    assert!(!layer.exists() && !upper.exists(), "{early:?}");
    assert_eq!(bench.snapshotter.usage("c".to_owned()).await.unwrap(), Usage::default());
    for key in ["v", "c"] {
        let waited = bench.snapshotter.mounts(key.to_owned()).await;
        assert!(matches!(waited, Err(Error::Pending { .. })), "{waited:?}");
    }
    bench.layers.heal("A");
    assert_eq!(bench.snapshotter.mounts("v".to_owned()).await.unwrap(), view);
    assert_eq!(bench.snapshotter.mounts("c".to_owned()).await.unwrap(), early);
    assert!(layer.exists() && upper.exists());
}

#[tokio::test]
async fn a_snapshot_on_slow_layers_may_be_committed_and_built_on() {
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a")], &[("r.io", "x")]);
    bench.layers.set("A", State::Pending);
    let base = bench.pulled(&["a"], "").await;
    bench.prepare("c", &base).await;
    bench.commit("mine", "c").await;
    bench.layers.heal("A");
    let view = bench.snapshotter.view("v".to_owned(), "mine".to_owned(), Labels::new()).await;
    let lower = view.unwrap()[0].options[0].clone();
    let lower: Vec<_> =
        lower.trim_start_matches("lowerdir=").split(':').map(PathBuf::from).collect();
    assert_eq!(lower.len(), 2);
    assert!(lower.iter().all(|folder| folder.exists()), "{lower:?}");
}

#[tokio::test]
async fn a_required_layer_that_cannot_be_had_is_an_error() {
    let bench = Bench::new();
    let required = async |diffs: &[&str]| {
        let reference = chain_id(diffs).to_string();
        let key = format!("default/9/extract-1 {reference}");
        let labels = [(REFERENCE_LABEL, reference), (REQUIRED_LABEL, "true".to_owned())];
        let labels = labels.map(|(key, value)| (key.to_owned(), value)).into();
        let error = bench.snapshotter.prepare(key, String::new(), labels).await.unwrap_err();
        crate::convert::status(&error).message().to_owned()
    };
    let unknown = required(&["a"]).await;
    assert!(unknown.contains("no image in namespace default"), "{unknown}");
    bench.shelf.add(&[("B", "b")], &[("r.io", "x")]);
    for blame in [LayerBlame::Source, LayerBlame::Local, LayerBlame::Content] {
        bench.layers.set("B", State::Failed(blame));
        let failed = required(&["b"]).await;
        let blob = Digest::of(b"B").to_string();
        for part in ["r.io/x", &blob, "for the test"] {
            assert!(failed.contains(part), "{failed}");
        }
    }
    assert!(bench.list(&[]).await.is_empty());
}

#[tokio::test]
async fn the_last_snapshot_of_a_layer_releases_it() {
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a"), ("A", "a")], &[("r.io", "x")]);
    let base = bench.pulled(&["a"], "").await;
    let top = bench.pulled(&["a", "a"], &base).await;
    let refused = bench.snapshotter.remove(base.clone()).await;
    assert!(matches!(refused, Err(Error::Chain(chain::Error::HasChildren(_)))));
    bench.snapshotter.remove(top).await.unwrap();
    bench.snapshotter.cleanup().await.unwrap();
    assert!(bench.layers.released.lock().unwrap().is_empty());
    bench.snapshotter.remove(base).await.unwrap();
    bench.snapshotter.cleanup().await.unwrap();
    assert_eq!(*bench.layers.released.lock().unwrap(), [Digest::of(b"A")]);
}

#[tokio::test]
async fn a_layer_on_its_way_to_another_image_is_not_released() {
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a")], &[("r.io", "x")]);
    let base = bench.pulled(&["a"], "").await;
    // Another image with the same blob has begun and is not there yet.
    bench.shelf.add(&[("B", "b"), ("A", "a")], &[("r.io", "y")]);
    bench.pulled(&["b"], "").await;
    bench.snapshotter.remove(base).await.unwrap();
    bench.snapshotter.cleanup().await.unwrap();
    assert!(bench.layers.released.lock().unwrap().is_empty());
}

#[tokio::test]
async fn goes_on_lazily_above_a_layer_that_containerd_unpacked() {
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a"), ("B", "b")], &[("r.io", "x")]);
    bench.prepare("default/1/extract", "").await;
    let base = format!("default/2/{}", chain_id(&["a"]));
    bench.commit(&base, "default/1/extract").await;
    let top = bench.pulled(&["a", "b"], &base).await;
    assert_eq!(bench.snapshotter.stat(top).await.unwrap().parent, base);
}

#[tokio::test]
async fn removal_is_a_rename_and_cleanup_deletes() {
    let bench = Bench::new();
    bench.prepare("a", "").await;
    bench.commit("base", "a").await;
    let before = bench.snapshotter.usage("base".to_owned()).await.unwrap();
    assert_eq!(before.inodes, 1);
    bench.snapshotter.remove("base".to_owned()).await.unwrap();
    assert!(folders(bench.root.path()).is_empty());
    assert!(bench.root.path().join("removed/1").exists());
    bench.snapshotter.cleanup().await.unwrap();
    assert!(!bench.root.path().join("removed/1").exists());
}

#[tokio::test]
async fn gives_the_root_folder_to_the_mapped_user() {
    let bench = Bench::new();
    let labels = |pairs: &[(&str, &str)]| -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    };
    let wrong = labels(&[(crate::idmap::UID_LABEL, "x")]);
    let refused = bench.snapshotter.prepare("w".to_owned(), String::new(), wrong).await;
    assert!(matches!(refused, Err(Error::IdMapping { .. })));
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let mapped =
        labels(&[(crate::idmap::UID_LABEL, "0:70000:10"), (crate::idmap::GID_LABEL, "0:80000:10")]);
    let made = bench.snapshotter.prepare("a".to_owned(), String::new(), mapped).await.unwrap();
    let Prepared::Mounts(mounts) = made else { panic!("{made:?}") };
    let by_options: &[&str] = &["uidmap=0:70000:10", "gidmap=0:80000:10", "rw", "rbind"];
    let by_us = crate::remap::supported();
    assert_eq!(mounts[0].options, if by_us { &by_options[2..] } else { by_options });
    let owner = crate::folders::Folders::owner(Path::new(&mounts[0].source)).unwrap();
    assert_eq!(owner, (70000, 80000));
    // Without labels of its own, a child takes its parent's owner.
    bench.commit("base", "a").await;
    bench.prepare("b", "base").await;
    let upper = bench.root.path().join("2/fs");
    assert_eq!(crate::folders::Folders::owner(&upper).unwrap(), (70000, 80000));
}

#[tokio::test]
async fn concurrent_prepares_of_one_layer_agree() {
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a")], &[("r.io", "x")]);
    let one = bench.pulled(&["a"], "");
    let two = bench.pulled(&["a"], "");
    let (one, two) = tokio::join!(one, two);
    assert_eq!(one, two);
    assert_eq!(bench.list(&[]).await, [one]);
}
