//! The database on disks that lose, damage or refuse its files.

#![expect(clippy::unwrap_used, reason = "these are tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use skimmer_store::{Store, Sync};

const ROWS: u32 = 3000;

/// A closed database below `root`, with table files, a log and a manifest of some length.
fn filled(root: &Path) -> PathBuf {
    let (store, aside) = Store::open_or_replace(root).unwrap();
    assert_eq!(aside, None);
    let table = store.table("t");
    for row in 0..ROWS {
        table.put(&row.to_be_bytes(), &[7; 1000], Sync::Later).unwrap();
    }
    root.join("store-v1")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in files(from) {
        fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
}

/// What is left can be read and written, and the rows that are there are right.
fn check_usable(root: &Path, what: &str) -> usize {
    let (store, _) =
        Store::open_or_replace(root).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let table = store.table("t");
    let mut rows = 0;
    for row in table.scan(b"") {
        let (_, value) = row.unwrap_or_else(|error| panic!("{what}: {error:?}"));
        assert_eq!(value, [7; 1000], "{what}");
        rows += 1;
    }
    table.put(b"new", b"1", Sync::Now).unwrap();
    store.flush().unwrap();
    drop((table, store));
    let (store, aside) = Store::open_or_replace(root).unwrap();
    assert_eq!(aside, None, "{what}: damaged for good");
    assert_eq!(store.table("t").get(b"new").unwrap().as_deref(), Some(&b"1"[..]), "{what}");
    rows
}

#[test]
fn any_damage_leaves_a_usable_database() {
    let folder = tempfile::tempdir().unwrap();
    let sound = filled(&folder.path().join("sound"));
    let names: Vec<_> =
        files(&sound).into_iter().map(|path| path.file_name().unwrap().to_owned()).collect();
    assert!(names.iter().any(|name| name.to_string_lossy().ends_with(".sst")), "{names:?}");
    for (number, name) in names.iter().enumerate() {
        let damage: [(&str, &dyn Fn(&Path)); 4] = [
            ("gone", &|path| fs::remove_file(path).unwrap()),
            ("empty", &|path| drop(fs::File::create(path).unwrap())),
            ("cut", &|path| {
                let file = fs::OpenOptions::new().write(true).open(path).unwrap();
                file.set_len(file.metadata().unwrap().len() / 2).unwrap();
            }),
            ("garbage", &|path| {
                let len = fs::metadata(path).unwrap().len();
                fs::write(path, vec![0xa5; usize::try_from(len).unwrap()]).unwrap();
            }),
        ];
        for (how, damage) in damage {
            let root = folder.path().join(format!("{number}-{how}"));
            let copied = root.join("store-v1");
            copy(&sound, &copied);
            damage(&copied.join(name));
            let rows = check_usable(&root, &format!("{} {how}", name.to_string_lossy()));
            assert!(rows <= ROWS as usize);
        }
    }
}

#[test]
fn a_lost_or_older_database_begins_anew() {
    let root = tempfile::tempdir().unwrap();
    let database = filled(root.path());
    assert_eq!(check_usable(root.path(), "untouched"), ROWS as usize);
    fs::remove_dir_all(&database).unwrap();
    assert_eq!(check_usable(root.path(), "lost"), 0);
    fs::rename(&database, root.path().join("store")).unwrap();
    assert_eq!(check_usable(root.path(), "older"), 0);
    assert!(!root.path().join("store").exists());
}

#[test]
fn what_is_set_aside_replaces_what_was() {
    let root = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let database = filled(root.path());
        fs::write(database.join("CURRENT"), b"no manifest").unwrap();
        let (store, aside) = Store::open_or_replace(root.path()).unwrap();
        assert_eq!(aside, Some(root.path().join("store-v1.damaged")));
        assert!(store.table("t").is_empty().unwrap());
    }
}

/// A small file system of its own, for as long as it lives.
struct Disk(PathBuf);

impl Disk {
    fn mount(path: &Path, bytes: u64) -> Option<Self> {
        fs::create_dir_all(path).unwrap();
        let options = format!("size={bytes}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "tmpfs", "-o", &options]).arg(path);
        mount.output().unwrap().status.success().then(|| Self(path.to_owned()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).output();
    }
}

#[test]
fn recovers_by_itself_from_a_full_disk() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(&folder.path().join("disk"), 24 << 20) else {
        eprintln!("skipped: only root may mount");
        return;
    };
    let (store, _) = Store::open_or_replace(&disk.0).unwrap();
    let table = store.table("t");
    table.put(b"before", b"1", Sync::Now).unwrap();
    for round in 0..3u8 {
        let ballast = disk.0.join("ballast");
        // Until nothing more goes in.
        let full = fs::write(&ballast, vec![round; 32 << 20]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        let refused = (0..200_000u32)
            .map(|row| table.put(&row.to_be_bytes(), &[round; 1000], Sync::Now))
            .find_map(Result::err)
            .unwrap();
        let text = format!("{refused:?}");
        assert!(text.contains("No space left on device"), "{text}");
        assert!(!refused.is_damage(), "{text}");
        // What was there is still read.
        assert_eq!(table.get(b"before").unwrap().as_deref(), Some(&b"1"[..]));
        fs::remove_file(&ballast).unwrap();
        let began = Instant::now();
        while let Err(error) = table.put(b"after", &[round], Sync::Now) {
            assert!(began.elapsed() < Duration::from_secs(30), "{error:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(table.get(b"after").unwrap().as_deref(), Some(&[round][..]));
    }
    drop((table, store));
    let (store, aside) = Store::open_or_replace(&disk.0).unwrap();
    assert_eq!(aside, None);
    assert_eq!(store.table("t").get(b"after").unwrap().as_deref(), Some(&[2][..]));
    assert_eq!(store.table("t").get(b"before").unwrap().as_deref(), Some(&b"1"[..]));
}
