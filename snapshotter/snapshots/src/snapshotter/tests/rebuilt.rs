//! Starts after crashes, and after the loss of the database or of a part of it.

use super::{
    Arc, Bench, Change, Digest, Error, Kind, Labels, Memory, PathBuf, Rebuilt, Records, Store,
    Stored, Usage, folders,
};

/// A layer, a container on it, a snapshot with content of its own and one on that.
async fn populated() -> (Bench, String) {
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a")], &[("r.io", "x")]);
    let base = bench.pulled(&["a"], "").await;
    bench.prepare("work", &base).await;
    bench.prepare("k", "").await;
    bench.commit("own", "k").await;
    bench.prepare("child", "own").await;
    (bench, base)
}

async fn everything(bench: &Bench) -> Vec<crate::Snapshot> {
    let mut all = Vec::new();
    for name in bench.list(&[]).await {
        all.push(bench.snapshotter.stat(name).await.unwrap());
    }
    all
}

/// After a restart with `records`, which are what is left of the database.
async fn check_all_back(records: Arc<dyn Records>, bench: Bench, base: &str) -> Bench {
    let (before, usage) = (everything(&bench).await, bench.snapshotter.usage("own".into()).await);
    let mounts = bench.snapshotter.mounts("child".into()).await.unwrap();
    let bench = bench.restart(records);
    assert_eq!(everything(&bench).await, before);
    assert_eq!(bench.snapshotter.usage("own".into()).await.unwrap(), usage.unwrap());
    assert_eq!(bench.snapshotter.mounts("child".into()).await.unwrap(), mounts);
    bench.snapshotter.mounts("work".into()).await.unwrap();
    assert_eq!(bench.list(&[format!("parent==\"{base}\"")]).await, ["work"]);
    // No id comes twice.
    bench.prepare("next", "").await;
    assert_eq!(bench.snapshotter.stat("next".into()).await.unwrap().id, 5);
    bench.snapshotter.remove("next".into()).await.unwrap();
    let records = Arc::clone(&bench.records);
    let again = bench.restart(records);
    assert_eq!(again.rebuilt, Rebuilt::default());
    again
}

#[tokio::test]
async fn a_lost_database_is_rebuilt_from_the_folders() {
    let (bench, base) = populated().await;
    let database = tempfile::tempdir().unwrap();
    let store = Store::open(database.path()).unwrap();
    bench.prepare("gone", &base).await;
    bench.snapshotter.remove("gone".to_owned()).await.unwrap();
    bench.snapshotter.cleanup().await.unwrap();
    check_all_back(Arc::new(Stored::new(&store)), bench, &base).await;
}

#[tokio::test]
async fn an_older_database_follows_the_folders() {
    let (bench, base) = populated().await;
    let get = |name: &str| bench.records.get(name).unwrap().unwrap();
    let (committed, child) = (get("own"), get("child"));
    // As it was before "own" was committed, with a snapshot that was removed since.
    let active = crate::Snapshot { name: "k".to_owned(), kind: Kind::Active, ..committed };
    let removed = crate::Snapshot { id: 9, name: "removed".to_owned(), ..child };
    let older = Memory::default();
    older.replace_all(&[get(&base), active, removed], 3).unwrap();
    let bench = check_all_back(Arc::new(older), bench, &base).await;
    assert!(bench.records.get("k").unwrap().is_none());
    assert!(bench.records.get("removed").unwrap().is_none());
}

#[tokio::test]
async fn a_database_of_parts_that_do_not_fit_is_rebuilt() {
    let (bench, base) = populated().await;
    let database = tempfile::tempdir().unwrap();
    let store = Store::open(database.path()).unwrap();
    let records = Stored::new(&store);
    let all: Vec<_> = everything(&bench).await;
    records.replace_all(&all, 4).unwrap();
    let rows = store.table("snapshots.claims");
    let (key, _) = rows.scan(b"").next().unwrap().unwrap();
    rows.delete(&key, skimmer_store::Sync::Later).unwrap();
    store.table("snapshots").put(b"own", b"\0", skimmer_store::Sync::Later).unwrap();
    check_all_back(Arc::new(records), bench, &base).await;
}

#[tokio::test]
async fn what_makes_no_sense_is_left_alone() {
    let (bench, base) = populated().await;
    let at = |part: &str| bench.root.path().join(part);
    // The database is lost, and so are the record of one snapshot and the parent of another.
    std::fs::write(at("2/record"), b"\0\0\0").unwrap();
    std::fs::remove_dir_all(at("3")).unwrap();
    std::fs::create_dir(at("17")).unwrap();
    let bench = bench.restart(Arc::new(Memory::default()));
    let expected = Rebuilt { restored: 1, discarded: 1, left: 2, ..Rebuilt::default() };
    assert_eq!(bench.rebuilt, expected);
    assert_eq!(bench.list(&[]).await, [base]);
    assert_eq!(folders(bench.root.path()), ["1", "2", "4"]);
    bench.prepare("next", "").await;
    assert!(bench.snapshotter.stat("next".into()).await.unwrap().id > 17);
}

#[tokio::test]
async fn the_database_makes_up_for_lost_records() {
    let (bench, base) = populated().await;
    let at = |part: &str| bench.root.path().join(part);
    std::fs::write(at("2/record"), b"").unwrap();
    std::fs::remove_dir_all(at("1")).unwrap();
    let records = Arc::clone(&bench.records);
    let bench = check_all_back(records, bench, &base).await;
    assert_eq!(folders(bench.root.path()), ["1", "2", "3", "4"]);
}

#[tokio::test]
async fn what_a_crash_interrupted_is_done() {
    let bench = Bench::new();
    bench.prepare("a", "").await;
    let a = bench.records.get("a").unwrap().unwrap();
    // Died in Prepare: the folder is there, the database knows nothing.
    bench.prepare("b", "").await;
    let b = bench.records.get("b").unwrap().unwrap();
    bench.records.apply(&Change::Remove(b.clone())).unwrap();
    // Died in Commit: the folder's record is committed, the database's is not.
    bench.commit("committed", "a").await;
    let new = bench.records.get("committed").unwrap().unwrap();
    bench.records.apply(&Change::Replace { old: new.clone(), new: a }).unwrap();
    // Died in Remove: the folder has gone, the database knows the snapshot.
    bench.prepare("c", "").await;
    let c = bench.records.get("c").unwrap().unwrap();
    bench.snapshotter.remove("c".to_owned()).await.unwrap();
    bench.records.apply(&Change::Create(c)).unwrap();
    let records = Arc::clone(&bench.records);
    let bench = bench.restart(records);
    assert_eq!(bench.rebuilt, Rebuilt { restored: 2, dropped: 1, ..Rebuilt::default() });
    assert_eq!(everything(&bench).await, [b, new]);
    assert_eq!(folders(bench.root.path()), ["1", "2"]);
}

/// Refuses every change while it is told to.
struct Full(Memory, std::sync::atomic::AtomicBool);

impl Full {
    fn refused(&self) -> Result<(), crate::records::Error> {
        if !self.1.load(std::sync::atomic::Ordering::Relaxed) {
            return Ok(());
        }
        let source = skimmer_store::Error::Earlier {
            path: PathBuf::new(),
            source: std::io::ErrorKind::StorageFull.into(),
        };
        Err(crate::records::Error::ReplaceAll(source))
    }
}

impl Records for Full {
    fn get(&self, name: &str) -> Result<Option<crate::Snapshot>, crate::records::Error> {
        self.0.get(name)
    }
    fn has_children(&self, parent: &str) -> Result<bool, crate::records::Error> {
        self.0.has_children(parent)
    }
    fn children(&self, parent: &str) -> Result<Vec<String>, crate::records::Error> {
        self.0.children(parent)
    }
    fn claiming(&self, r: &str, parent: &str) -> Result<Vec<String>, crate::records::Error> {
        self.0.claiming(r, parent)
    }
    fn uses_layer(&self, blob: &Digest) -> Result<bool, crate::records::Error> {
        self.0.uses_layer(blob)
    }
    fn visit(
        &self,
        visit: &mut dyn FnMut(crate::Snapshot) -> std::ops::ControlFlow<()>,
    ) -> Result<(), crate::records::Error> {
        self.0.visit(visit)
    }
    fn next_id(&self) -> Result<u64, crate::records::Error> {
        self.0.next_id()
    }
    fn apply(&self, change: &Change) -> Result<(), crate::records::Error> {
        self.refused().and_then(|()| self.0.apply(change))
    }
    fn is_sound(&self) -> Result<bool, crate::records::Error> {
        self.0.is_sound()
    }
    fn replace_all(
        &self,
        all: &[crate::Snapshot],
        last_id: u64,
    ) -> Result<(), crate::records::Error> {
        self.0.replace_all(all, last_id)
    }
    fn usage(&self, id: u64) -> Result<Option<Usage>, crate::records::Error> {
        self.0.usage(id)
    }
    fn remember_usage(&self, id: u64, usage: Usage) -> Result<(), crate::records::Error> {
        self.refused().and_then(|()| self.0.remember_usage(id, usage))
    }
}

#[tokio::test]
async fn what_the_database_refuses_has_not_happened() {
    let (bench, base) = populated().await;
    let before = everything(&bench).await;
    let memory = Memory::default();
    memory.replace_all(&before, 4).unwrap();
    let full = Arc::new(Full(memory, false.into()));
    let bench = bench.restart(Arc::clone(&full) as Arc<dyn Records>);
    assert_eq!(bench.rebuilt, Rebuilt::default());
    full.1.store(true, std::sync::atomic::Ordering::Relaxed);
    let s = &bench.snapshotter;
    let none = Labels::new;
    let commit = s.commit("c".into(), "work".into(), none(), String::new()).await;
    assert!(matches!(commit, Err(Error::Records(_))));
    assert!(s.remove("work".into()).await.is_err());
    assert!(s.prepare("new".into(), base, none()).await.is_err());
    let labels = Labels::from([("a".to_owned(), "b".to_owned())]);
    assert!(s.update("own".into(), labels, Vec::new()).await.is_err());
    // A usage that can't be remembered is told all the same.
    s.usage("own".into()).await.unwrap();
    s.cleanup().await.unwrap();
    assert_eq!(everything(&bench).await, before);
    s.mounts("work".into()).await.unwrap();
    let records = Arc::clone(&bench.records);
    let bench = bench.restart(records);
    assert_eq!(bench.rebuilt, Rebuilt::default(), "nor does it happen at the next start");
    assert_eq!(everything(&bench).await, before);
}
