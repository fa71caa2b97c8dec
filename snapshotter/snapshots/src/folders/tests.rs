//! Folders on a real disk.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::SystemTime;

use super::{Content, Error, Folders};
use crate::{Kind, Labels, Snapshot};

fn snapshot(id: u64, kind: Kind) -> Snapshot {
    Snapshot {
        id,
        name: format!("default/{id}/a b:c"),
        parent: String::new(),
        kind,
        created: SystemTime::UNIX_EPOCH,
        updated: SystemTime::UNIX_EPOCH,
        labels: Labels::new(),
        layer: None,
        lost: Vec::new(),
    }
}

fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn makes_discards_and_sweeps() {
    let root = tempfile::tempdir().unwrap();
    let folders = Folders::open(root.path()).unwrap();
    let active = snapshot(1, Kind::Active);
    folders.create(&active, Content::Owned(None)).unwrap();
    folders.create(&snapshot(2, Kind::View), Content::Owned(None)).unwrap();
    assert_eq!(names(&root.path().join("1")), ["fs", "record", "work"]);
    assert_eq!(names(&root.path().join("2")), ["fs", "record"]);
    assert_eq!((mode(&folders.content(1)), mode(&folders.work(1))), (0o755, 0o711));
    assert_eq!(folders.ids().unwrap(), [1, 2]);
    assert_eq!(folders.read(1).unwrap(), active);

    let committed = Snapshot { kind: Kind::Committed, ..active };
    folders.record(&committed).unwrap();
    assert_eq!(folders.read(1).unwrap(), committed);
    assert_eq!(names(&root.path().join("1")), ["fs", "record", "record.old", "work"]);
    folders.undo_record(1).unwrap();
    assert_eq!(folders.read(1).unwrap().kind, Kind::Active);
    folders.record(&committed).unwrap();

    let discarded = folders.discard(1).unwrap();
    folders.reinstate(1, &discarded).unwrap();
    assert_eq!(folders.read(1).unwrap(), committed);
    folders.discard(1).unwrap();
    assert!(folders.discard(1).is_err());
    assert_eq!(folders.ids().unwrap(), [2]);
    // The same id again, as after the loss of the database.
    folders.create(&snapshot(1, Kind::Active), Content::Owned(None)).unwrap();
    folders.discard(1).unwrap();
    assert_eq!(folders.last_id().unwrap(), 2);
    let discarded = folders.discarded().unwrap();
    assert_eq!(discarded.len(), 2);
    folders.delete(discarded.clone()).unwrap();
    // Two at once don't trip over each other.
    folders.delete(discarded).unwrap();
    assert!(folders.discarded().unwrap().is_empty());
}

#[test]
fn clears_what_a_crash_left_half_made() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("new/7/fs")).unwrap();
    let folders = Folders::open(root.path()).unwrap();
    assert!(folders.ids().unwrap().is_empty());
    assert!(names(&root.path().join("new")).is_empty());
    folders.delete(folders.discarded().unwrap()).unwrap();
    assert_eq!(names(root.path()), ["new", "removed"]);
}

#[test]
fn reads_no_record_that_is_none() {
    let root = tempfile::tempdir().unwrap();
    let folders = Folders::open(root.path()).unwrap();
    fs::create_dir(root.path().join("3")).unwrap();
    assert!(matches!(folders.read(3), Err(Error::Read { .. })));
    for text in ["", "{}", "[1]", "\u{0}"] {
        fs::write(root.path().join("3/record"), text).unwrap();
        assert!(matches!(folders.read(3), Err(Error::Decode { .. })), "{text:?}");
    }
}

#[test]
fn refuses_a_root_that_mount_options_cannot_carry() {
    assert!(matches!(Folders::open(Path::new("/tmp/a:b")), Err(Error::Root(_))));
    assert!(matches!(Folders::open(Path::new("/tmp/a,b")), Err(Error::Root(_))));
}
