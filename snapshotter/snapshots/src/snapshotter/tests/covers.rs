//! Layers that leave out directories, in the mounts of snapshots above them. Only root can make
//! covers.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::{Arc, Bench, Digest, Path, PathBuf};

impl Bench {
    /// Where the layer of this blob is mounted.
    fn layer(&self, blob: &str) -> PathBuf {
        self.layers.folder.join(Digest::of(blob.as_bytes()).hex())
    }

    fn has(&self, blob: &str, path: &str, mode: u32) {
        let path = self.layer(blob).join(path);
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn leaves_out(&self, blob: &str, paths: &[&str]) {
        let paths = paths.iter().map(PathBuf::from).collect();
        self.layers.implicit.lock().unwrap().insert(Digest::of(blob.as_bytes()), paths);
    }

    /// The lower folders that `key` is mounted with.
    async fn lower(&self, key: &str) -> Vec<PathBuf> {
        let mounts = self.snapshotter.mounts(key.to_owned()).await.unwrap();
        let lower = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir="));
        lower.unwrap().split(':').map(PathBuf::from).collect()
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Layers A, B and C, of which B and C leave out `tmp`, and a container on top.
async fn three() -> Option<Bench> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a"), ("B", "b"), ("C", "c")], &[("r.io", "x")]);
    bench.has("A", "tmp", 0o1777);
    bench.has("B", "tmp", 0o755);
    bench.has("C", "tmp", 0o755);
    bench.has("C", "opt", 0o755);
    bench.leaves_out("A", &["tmp"]);
    bench.leaves_out("B", &["tmp"]);
    bench.leaves_out("C", &["opt", "tmp"]);
    let a = bench.pulled(&["a"], "").await;
    let b = bench.pulled(&["a", "b"], &a).await;
    let c = bench.pulled(&["a", "b", "c"], &b).await;
    bench.prepare("container", &c).await;
    Some(bench)
}

#[tokio::test]
async fn a_layer_is_covered_once() {
    let Some(bench) = three().await else { return };
    let content = |id: u32| bench.root.path().join(format!("{id}/fs"));
    let [a, b, c] = ["A", "B", "C"].map(|blob| bench.layer(blob));
    let stack = [content(3), c, content(2), b, a];
    assert_eq!(bench.lower("container").await, stack);
    for cover in [content(2), content(3)] {
        assert_eq!(mode(&cover.join("tmp")), 0o1777);
        assert_eq!(fs::read_dir(cover).unwrap().count(), 1);
    }
    // It stays as it is: for the next mounts, and for those after a restart.
    bench.leaves_out("B", &[]);
    bench.has("A", "tmp", 0o700);
    assert_eq!(bench.lower("container").await, stack);
    let records = Arc::clone(&bench.records);
    let bench = bench.restart(records);
    assert_eq!(bench.lower("container").await, stack);
    assert_eq!(mode(&stack[2].join("tmp")), 0o1777);

    bench.snapshotter.remove("container".to_owned()).await.unwrap();
    let top = bench.records.children(&bench.list(&["parent==\"\"".to_owned()]).await[0]).unwrap();
    let top = bench.records.children(&top[0]).unwrap();
    bench.snapshotter.remove(top[0].clone()).await.unwrap();
    bench.snapshotter.cleanup().await.unwrap();
    assert!(!stack[0].exists() && stack[2].exists());
}

#[tokio::test]
async fn a_cover_that_a_crash_cut_short_is_made_again() {
    let Some(bench) = three().await else { return };
    let stack = bench.lower("container").await;
    let new = bench.root.path().join("3/fs.new");
    fs::rename(&stack[0], &new).unwrap();
    fs::create_dir(new.join("half")).unwrap();
    assert_eq!(bench.lower("container").await, stack);
    assert_eq!(mode(&stack[0].join("tmp")), 0o1777);
    assert!(!new.exists() && !stack[0].join("half").exists());
}

#[tokio::test]
async fn a_layer_that_needs_no_cover_is_not_asked_again() {
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a"), ("B", "b")], &[("r.io", "x")]);
    bench.has("B", "tmp", 0o755);
    bench.leaves_out("B", &["tmp"]);
    let a = bench.pulled(&["a"], "").await;
    let b = bench.pulled(&["a", "b"], &a).await;
    bench.prepare("container", &b).await;
    let bare = [bench.layer("B"), bench.layer("A")];
    assert_eq!(bench.lower("container").await, bare);
    bench.has("A", "tmp", 0o1777);
    assert_eq!(bench.lower("container").await, bare);
}

#[tokio::test]
async fn mounts_asked_for_at_once_agree() {
    let Some(bench) = three().await else { return };
    fs::remove_dir_all(bench.root.path().join("2/fs")).unwrap();
    fs::remove_dir_all(bench.root.path().join("3/fs")).unwrap();
    let (one, two) = tokio::join!(bench.lower("container"), bench.lower("container"));
    assert_eq!(one, two);
    assert_eq!(one.len(), 5);
}
