//! One behaviour for the stored records and their twin.

use std::ops::ControlFlow;
use std::time::{Duration, SystemTime};

use skimmer_cache::{BlobKind, BlobRef, Origin};
use skimmer_proto::Digest;
use skimmer_store::Store;

use super::{Change, Memory, Records, Stored};
use crate::snapshot::REFERENCE_LABEL;
use crate::{Binding, Kind, Labels, Snapshot, Usage};

fn snapshot(id: u64, name: &str, parent: &str) -> Snapshot {
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
    Snapshot {
        id,
        name: name.to_owned(),
        parent: parent.to_owned(),
        kind: Kind::Committed,
        created: time,
        updated: time,
        labels: Labels::new(),
        layer: None,
        lost: Vec::new(),
    }
}

fn binding(blob: &str) -> Binding {
    let origins = vec![Origin { host: "r.io:5000".to_owned(), repository: "a/b".to_owned() }];
    let digest = Digest::of(blob.as_bytes());
    Binding {
        blob: BlobRef { digest, len: 7, kind: BlobKind::Blob, origins },
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
        diff_id: Digest::of(b"diff"),
        image: "r.io:5000/a/b:t".to_owned(),
        toc_digest: Some(Digest::of(b"toc")),
    }
}

fn names(records: &dyn Records) -> Vec<String> {
    let mut names = Vec::new();
    let all = &mut |snapshot: Snapshot| {
        names.push(snapshot.name);
        ControlFlow::Continue(())
    };
    records.visit(all).unwrap();
    names
}

fn conformance(records: &dyn Records) {
    assert_eq!(records.next_id().unwrap(), 1);
    assert_eq!(records.get("a").unwrap(), None);

    let mut base = snapshot(1, "a", "");
    base.labels.insert(REFERENCE_LABEL.to_owned(), "sha256:1".to_owned());
    base.layer = Some(binding("one"));
    let child = snapshot(2, "a/b c:d", "a");
    records.apply(&Change::Create(base.clone())).unwrap();
    records.apply(&Change::Create(child.clone())).unwrap();
    assert_eq!(records.get("a").unwrap(), Some(base.clone()));
    assert_eq!(records.next_id().unwrap(), 3);
    assert_eq!(names(records), ["a", "a/b c:d"]);
    assert!(records.has_children("a").unwrap());
    assert!(!records.has_children("a/b c:d").unwrap());
    assert_eq!(records.children("a").unwrap(), ["a/b c:d"]);
    assert_eq!(records.children("").unwrap(), ["a"]);
    assert_eq!(records.claiming("sha256:1", "").unwrap(), ["a"]);
    assert!(records.claiming("sha256:1", "a").unwrap().is_empty());
    assert!(records.claiming("sha256:", "1").unwrap().is_empty());
    assert!(records.uses_layer(&Digest::of(b"one")).unwrap());
    assert!(!records.uses_layer(&Digest::of(b"two")).unwrap());

    // Another name, label and parent: the old look-ups find nothing.
    let mut renamed = Snapshot { name: "z".to_owned(), ..child.clone() };
    renamed.labels.insert(REFERENCE_LABEL.to_owned(), "sha256:2".to_owned());
    records.apply(&Change::Replace { old: child.clone(), new: renamed.clone() }).unwrap();
    assert_eq!(records.get("a/b c:d").unwrap(), None);
    assert_eq!(records.children("a").unwrap(), ["z"]);
    assert_eq!(records.claiming("sha256:2", "a").unwrap(), ["z"]);
    let unlabelled = Snapshot { labels: Labels::new(), ..renamed.clone() };
    records.apply(&Change::Replace { old: renamed, new: unlabelled.clone() }).unwrap();
    assert!(records.claiming("sha256:2", "a").unwrap().is_empty());

    records.remember_usage(2, Usage { bytes: 10, inodes: 2 }).unwrap();
    assert_eq!(records.usage(2).unwrap(), Some(Usage { bytes: 10, inodes: 2 }));
    records.apply(&Change::Remove(unlabelled)).unwrap();
    assert_eq!(records.usage(2).unwrap(), None);
    assert!(!records.has_children("a").unwrap());
    records.apply(&Change::Remove(base)).unwrap();
    assert!(!records.uses_layer(&Digest::of(b"one")).unwrap());
    assert!(names(records).is_empty());
    // Ids are not used again.
    assert_eq!(records.next_id().unwrap(), 3);

    let mut base = snapshot(5, "b", "");
    base.layer = Some(binding("two"));
    records.apply(&Change::Create(snapshot(4, "old", ""))).unwrap();
    records.remember_usage(4, Usage { bytes: 10, inodes: 2 }).unwrap();
    records.replace_all(&[base.clone(), snapshot(6, "c", "b")], 8).unwrap();
    assert!(records.is_sound().unwrap());
    assert_eq!(names(records), ["b", "c"]);
    assert_eq!((records.get("old").unwrap(), records.usage(4).unwrap()), (None, None));
    assert_eq!(records.children("b").unwrap(), ["c"]);
    assert!(records.uses_layer(&Digest::of(b"two")).unwrap());
    assert_eq!(records.next_id().unwrap(), 9);
    records.replace_all(&[], 8).unwrap();
    assert!(names(records).is_empty() && records.is_sound().unwrap());
}

#[test]
fn rows_that_do_not_belong_together_are_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let records = Stored::new(&store);
    let all = [snapshot(1, "a", ""), snapshot(2, "b", "a")];
    for (table, key, value) in [
        ("snapshots", &b"a"[..], Some(&b"{}"[..])),
        ("snapshots", b"x", Some(b"")),
        ("snapshots", b"b", None),
        ("snapshots.children", b"\0\0\0\x01ab", None),
        ("snapshots.children", b"\0\0\0\x01ac", Some(b"")),
        ("snapshots.claims", b"", Some(b"")),
    ] {
        records.replace_all(&all, 2).unwrap();
        assert!(records.is_sound().unwrap());
        let rows = store.table(table);
        match value {
            Some(value) => rows.put(key, value, skimmer_store::Sync::Later).unwrap(),
            None => rows.delete(key, skimmer_store::Sync::Later).unwrap(),
        }
        assert!(!records.is_sound().unwrap(), "{table} {key:?}");
    }
}

#[test]
fn memory_conforms() {
    conformance(&Memory::default());
}

#[test]
fn stored_conforms_and_survives_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    conformance(&Stored::new(&store));
    let last = snapshot(9, "last", "");
    Stored::new(&store).apply(&Change::Create(last.clone())).unwrap();
    drop(store);
    let records = Stored::new(&Store::open(folder.path()).unwrap());
    assert_eq!(records.get("last").unwrap(), Some(last));
    assert_eq!(records.next_id().unwrap(), 10);
    assert!(records.is_sound().unwrap());
}

#[test]
fn a_record_reads_as_it_was_written() {
    let mut record = snapshot(4, "n", "p");
    record.layer = Some(binding("one"));
    let text = serde_json::to_string(&record).unwrap();
    assert_eq!(serde_json::from_str::<Snapshot>(&text).unwrap(), record);
    let wrong = text.replace("sha256:", "md5:");
    assert!(serde_json::from_str::<Snapshot>(&wrong).is_err());
}
