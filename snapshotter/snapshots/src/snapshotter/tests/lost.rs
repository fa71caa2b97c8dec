//! Starts after nobody kept the mounts of some layers.

use super::{Arc, BTreeMap, BTreeSet, Bench, Digest, Memory};

async fn lost(bench: &Bench) -> BTreeMap<Digest, Vec<String>> {
    bench.snapshotter.lost().await.unwrap()
}

#[tokio::test]
async fn containers_of_lost_mounts_are_named_until_they_are_mounted_anew() {
    let bench = Bench::new();
    bench.shelf.add(&[("A", "a"), ("B", "b")], &[("r.io", "x")]);
    let base = bench.pulled(&["a"], "").await;
    let top = bench.pulled(&["a", "b"], &base).await;
    bench.prepare("on both", &top).await;
    bench.prepare("gone", &top).await;
    bench.prepare("on the base", &base).await;
    assert!(lost(&bench).await.is_empty());

    let blob = Digest::of(b"B");
    let Bench { root, records, .. } = bench;
    let bench = Bench::without(BTreeSet::from([blob]), root, records);
    let named = |names: &[&str]| {
        BTreeMap::from([(blob, names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())])
    };
    assert_eq!(lost(&bench).await, named(&["gone", "on both"]));
    bench.snapshotter.remove("gone".to_owned()).await.unwrap();
    // Neither another start nor the loss of the database changes it.
    let bench = bench.restart(Arc::new(Memory::default()));
    assert_eq!(lost(&bench).await, named(&["on both"]));
    bench.snapshotter.mounts("on the base".to_owned()).await.unwrap();
    assert_eq!(lost(&bench).await, named(&["on both"]));
    bench.snapshotter.mounts("on both".to_owned()).await.unwrap();
    assert!(lost(&bench).await.is_empty());
    let records = Arc::clone(&bench.records);
    assert!(lost(&bench.restart(records)).await.is_empty());
}
