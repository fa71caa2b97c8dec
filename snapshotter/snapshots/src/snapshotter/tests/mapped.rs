//! Snapshots of containers in user namespaces, on this machine's kernel. Only root can make them.

use std::fs;

use super::{Bench, Digest, Labels, Path, PathBuf, Prepared, State};
use crate::folders::Folders;
use crate::idmap::{GID_LABEL, UID_LABEL};
use crate::mounts::Mount;
use crate::remap::{self, Remaps};

/// Unmounts what a failed test left, before its folder is deleted.
struct Sweep(PathBuf);

impl Drop for Sweep {
    fn drop(&mut self) {
        // There is nothing more to do about mounts that stay.
        let _ = Remaps::open(&self.0);
    }
}

fn bench() -> Option<(Bench, Sweep)> {
    if !nix::unistd::geteuid().is_root() || !remap::supported() {
        return None;
    }
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a"), ("B", "b")], &[("r.io", "x")]);
    for blob in ["A", "B"] {
        let folder = bench.layers.folder.join(Digest::of(blob.as_bytes()).hex());
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(blob), "bytes").unwrap();
    }
    let sweep = Sweep(bench.root.path().to_owned());
    Some((bench, sweep))
}

fn mapped() -> Labels {
    [(UID_LABEL, "0:70000:1000"), (GID_LABEL, "0:80000:1000")]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

fn lower(mounts: &[Mount]) -> Vec<PathBuf> {
    let lower = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    lower.unwrap().split(':').map(PathBuf::from).collect()
}

/// The mounts under `root`, all clones.
fn clones(root: &Path) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|path| Path::new(path).starts_with(root))
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn a_mapped_container_sees_layers_and_snapshots_as_its_own() {
    let Some((bench, _sweep)) = bench() else { return };
    let a = bench.pulled(&["a"], "").await;
    let b = bench.pulled(&["a", "b"], &a).await;
    bench.prepare("change", &b).await;
    fs::write(bench.root.path().join("3/fs/C"), "bytes").unwrap();
    bench.commit("changed", "change").await;
    let make = |key: &str, parent: &str| {
        bench.snapshotter.prepare(key.to_owned(), parent.to_owned(), mapped())
    };
    let Ok(Prepared::Mounts(mounts)) = make("container", "changed").await else { panic!() };
    assert_eq!(mounts[0].kind, "overlay");
    assert!(mounts[0].options.iter().all(|option| !option.contains("map=")), "{mounts:?}");
    let upper = bench.root.path().join("4/fs");
    assert_eq!(Folders::owner(&upper).unwrap(), (70_000, 80_000));
    let folders = lower(&mounts);
    assert_eq!(folders.len(), 3);
    for (folder, file) in folders.iter().zip(["C", "B", "A"]) {
        assert!(folder.starts_with(bench.root.path().join("4/lower")), "{folder:?}");
        assert_eq!(Folders::owner(&folder.join(file)).unwrap(), (70_000, 80_000), "{file}");
    }
    // Once more, and after a restart; it is the same where the sources are.
    assert_eq!(bench.snapshotter.mounts("container".to_owned()).await.unwrap(), mounts);
    let (records, root) = (std::sync::Arc::clone(&bench.records), bench.root.path().to_owned());
    let bench = bench.restart(records);
    assert!(clones(&root).is_empty());
    assert_eq!(bench.snapshotter.mounts("container".to_owned()).await.unwrap(), mounts);
    assert_eq!(Folders::owner(&folders[2].join("A")).unwrap(), (70_000, 80_000));

    bench.snapshotter.remove("container".to_owned()).await.unwrap();
    assert!(clones(&root).is_empty());
    bench.snapshotter.cleanup().await.unwrap();
    assert_eq!(fs::read_dir(root.join("removed")).unwrap().count(), 0);
    assert!(root.join("3/fs/C").exists());
}

#[tokio::test]
async fn a_mapped_view_of_one_layer_binds_it() {
    let Some((bench, _sweep)) = bench() else { return };
    let a = bench.pulled(&["a"], "").await;
    let mounts = bench.snapshotter.view("view".to_owned(), a, mapped()).await.unwrap();
    assert_eq!((mounts[0].kind, mounts[0].options.join(",").as_str()), ("bind", "ro,rbind"));
    let file = Path::new(&mounts[0].source).join("A");
    assert_eq!(Folders::owner(&file).unwrap(), (70_000, 80_000));
    bench.snapshotter.remove("view".to_owned()).await.unwrap();
    assert!(clones(bench.root.path()).is_empty());
}

/// What was answered while layers were on their way is there once they are.
#[tokio::test]
async fn a_mapped_container_on_pending_layers_gets_what_was_promised() {
    let Some((bench, _sweep)) = bench() else { return };
    bench.layers.set("B", State::Pending);
    let a = bench.pulled(&["a"], "").await;
    let b = bench.pulled(&["a", "b"], &a).await;
    let made = bench.snapshotter.prepare("container".to_owned(), b, mapped()).await.unwrap();
    let Prepared::Mounts(promised) = made else { panic!("{made:?}") };
    assert!(clones(bench.root.path()).is_empty());
    bench.layers.heal("B");
    bench.snapshotter.mounts("container".to_owned()).await.unwrap();
    let folders = lower(&promised);
    assert_eq!(folders.len(), 3, "two layers and what may cover one: {folders:?}");
    assert!(folders.iter().all(|folder| folder.exists()), "{folders:?}");
    assert!(folders[1].join("B").exists() && folders[2].join("A").exists());
    bench.snapshotter.remove("container".to_owned()).await.unwrap();
    assert!(clones(bench.root.path()).is_empty());
}
