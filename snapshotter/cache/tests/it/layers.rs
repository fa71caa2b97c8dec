//! A layer's objects and data file.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};

use skimmer_cache::{Cache, LayerFiles, layer};
use skimmer_proto::{Digest, PieceTable};

use crate::twin::{Twin, bytes, open};

const MIB: u64 = 1 << 20;

fn setup() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), &Twin::honest());
    (dir, cache)
}

fn blob() -> Digest {
    Digest::of(b"blob")
}

fn table(index: &[u8]) -> PieceTable {
    let geometry = skimmer_proto::Geometry::of(4).unwrap();
    let value = *blake3_of(b"blob");
    PieceTable::new(geometry, blob(), Digest::of(b"tar"), Digest::of(index), vec![value]).unwrap()
}

fn blake3_of(bytes: &[u8]) -> Box<[u8; 32]> {
    let geometry = skimmer_proto::Geometry::of(bytes.len() as u64).unwrap();
    Box::new(skimmer_proto::piece_table::piece_value(geometry, 0, bytes))
}

fn stored(files: &LayerFiles, index: &[u8]) {
    files.store(index, &table(index), b"inodes").unwrap();
}

#[tokio::test]
async fn objects_come_back_as_stored() {
    let (dir, cache) = setup();
    let files = cache.layer(blob()).unwrap();
    assert!(files.load().unwrap().is_none());
    stored(&files, b"index");
    let again = open(dir.path(), &Twin::honest()).layer(blob()).unwrap();
    let objects = again.load().unwrap().unwrap();
    assert_eq!((&objects.index[..], objects.table), (&b"index"[..], table(b"index")));
    assert_eq!(fs::read(again.inodes_path()).unwrap(), b"inodes");
    again.remove().unwrap();
    assert!(files.load().unwrap().is_none());
    again.remove().unwrap();
}

#[tokio::test]
async fn objects_that_do_not_belong_together_are_not_stored_nor_loaded() {
    let (_dir, cache) = setup();
    let files = cache.layer(blob()).unwrap();
    let error = files.store(b"other", &table(b"index"), b"").unwrap_err();
    assert!(matches!(error, layer::Error::ForeignIndex { .. }), "{error}");
    let other = cache.layer(Digest::of(b"another blob")).unwrap();
    let error = other.store(b"index", &table(b"index"), b"").unwrap_err();
    assert!(matches!(error, layer::Error::ForeignTable { .. }), "{error}");
    for (name, bytes) in [("index", &b"indeX"[..]), ("table", b"garbage"), ("table", b"")] {
        stored(&files, b"index");
        fs::write(files.inodes_path().with_file_name(name), bytes).unwrap();
        assert!(files.load().unwrap().is_none(), "{name}");
    }
}

#[tokio::test]
async fn chunks_are_remembered_as_far_as_recorded() {
    let (dir, cache) = setup();
    let files = cache.layer(blob()).unwrap();
    stored(&files, b"index");
    {
        let data = files.open_data(10 * MIB, 10).unwrap();
        data.file().write_all_at(b"chunk 3", 3 * MIB).unwrap();
        data.mark(3);
        data.checkpoint().unwrap();
        data.mark(4);
        assert_eq!((data.missing(2..6), data.present()), (vec![2, 5], 2));
        assert_eq!(data.present_bytes(), 2 * MIB);
    }
    let files = open(dir.path(), &Twin::honest()).layer(blob()).unwrap();
    let data = files.open_data(10 * MIB, 10).unwrap();
    assert!(data.has(3) && !data.has(4) && !data.complete());
    assert!(matches!(files.open_data(10 * MIB, 11), Err(layer::Error::InUse { .. })));
}

#[tokio::test]
async fn a_lent_descriptor_is_used_for_the_file_that_it_is_of() {
    let (dir, cache) = setup();
    let files = cache.layer(blob()).unwrap();
    stored(&files, b"index");
    drop(files.open_data(MIB, 1).unwrap());
    let same = fs::OpenOptions::new().read(true).write(true).open(files.data_path()).unwrap();
    let other = tempfile::tempfile().unwrap();
    other.set_len(MIB).unwrap();
    for (lent, is_used) in [(same, true), (other, false)] {
        // Whoever uses it shares its position.
        (&lent).seek(SeekFrom::Start(7)).unwrap();
        let files = open(dir.path(), &Twin::honest()).layer(blob()).unwrap();
        files.lend_data(lent);
        let data = files.open_data(MIB, 1).unwrap();
        assert_eq!(data.file().stream_position().unwrap() == 7, is_used);
        let (used, stored) =
            (data.file().metadata().unwrap(), fs::metadata(files.data_path()).unwrap());
        assert_eq!(used.ino(), stored.ino());
    }
}

#[tokio::test]
async fn chunks_of_another_index_file_or_shape_are_forgotten() {
    let damages: [fn(&LayerFiles); 5] = [
        |files| stored(files, b"another index"),
        |files| fs::remove_file(files.data_path()).unwrap(),
        |files| {
            let file = fs::OpenOptions::new().write(true).open(files.data_path()).unwrap();
            file.set_len(1).unwrap();
        },
        |files| fs::write(files.data_path().with_file_name("chunks"), b"junk").unwrap(),
        |files| fs::remove_file(files.data_path().with_file_name("table")).unwrap(),
    ];
    for (number, damage) in damages.into_iter().enumerate() {
        let (dir, cache) = setup();
        let files = cache.layer(blob()).unwrap();
        stored(&files, b"index");
        let data = files.open_data(4 * MIB, 4).unwrap();
        data.mark(1);
        data.checkpoint().unwrap();
        drop(data);
        let files = open(dir.path(), &Twin::honest()).layer(blob()).unwrap();
        damage(&files);
        let data = files.open_data(4 * MIB, 4).unwrap();
        assert_eq!(data.present(), 0, "damage {number}");
    }
}

#[tokio::test]
async fn a_decoded_layer_is_adopted_whole() {
    let (dir, cache) = setup();
    let files = cache.layer(blob()).unwrap();
    let content = bytes(3 * 1024 * 1024, 5);
    files.new_data().unwrap().write_all_at(b"from an attempt that failed", 0).unwrap();
    files.new_data().unwrap().write_all_at(&content, 0).unwrap();
    stored(&files, b"index");
    let data = files.adopt_data(4 * MIB, 4).unwrap();
    assert!(data.complete());
    assert_eq!(data.file().metadata().unwrap().len(), 4 * MIB);
    cache.drain().await.unwrap();
    let files = open(dir.path(), &Twin::honest()).layer(blob()).unwrap();
    let data = files.open_data(4 * MIB, 4).unwrap();
    assert!(data.complete());
    let mut back = vec![0; content.len()];
    data.file().read_exact_at(&mut back, 0).unwrap();
    assert!(back == content);
}

#[tokio::test]
async fn a_removed_layer_can_still_be_read_by_who_has_it_open() {
    let (_dir, cache) = setup();
    let files = cache.layer(blob()).unwrap();
    stored(&files, b"index");
    let data = files.open_data(4, 1).unwrap();
    data.file().write_all_at(b"data", 0).unwrap();
    data.mark(0);
    files.remove().unwrap();
    data.checkpoint().unwrap();
    let mut back = [0; 4];
    data.file().read_exact_at(&mut back, 0).unwrap();
    assert_eq!(&back, b"data");
    let fresh = files.open_data(4, 1).unwrap();
    assert!(!fresh.has(0), "the next file knows nothing of the last");
}

#[tokio::test]
async fn what_is_opened_aside_leaves_the_layer_as_it_is_and_has_no_name() {
    let (_dir, cache) = setup();
    let files = cache.layer(blob()).unwrap();
    stored(&files, b"index");
    let own = files.open_data(MIB, 4).unwrap();
    own.file().write_all_at(b"own", 0).unwrap();
    own.mark(0);
    let names = || {
        let dir = files.data_path();
        let entries = fs::read_dir(dir.parent().unwrap()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    let (mut inodes, data) = files.open_aside(Digest::of(b"TOC"), b"others", 2 * MIB, 3).unwrap();
    let mut shown = Vec::new();
    inodes.read_to_end(&mut shown).unwrap();
    assert_eq!(shown, b"others");
    assert_eq!((data.len(), data.present()), (2 * MIB, 0));
    data.file().write_all_at(b"aside", 0).unwrap();
    data.mark(0);
    data.checkpoint().unwrap();
    assert_eq!(names(), before);
    let mut back = [0; 3];
    own.file().read_exact_at(&mut back, 0).unwrap();
    assert_eq!(&back, b"own");
}

#[tokio::test]
async fn a_provisional_layer_has_data_but_no_index_and_gives_way_to_one() {
    let (dir, cache) = setup();
    let (toc, other) = (Digest::of(b"TOC"), Digest::of(b"other TOC"));
    let files = cache.layer(blob()).unwrap();
    let data = files.open_provisional(toc, b"provisional", MIB, 4).unwrap();
    assert_eq!(fs::read(files.inodes_path()).unwrap(), b"provisional");
    assert!(files.load().unwrap().is_none());
    data.file().write_all_at(b"x", 0).unwrap();
    data.mark(0);
    data.checkpoint().unwrap();

    let again = open(dir.path(), &Twin::honest()).layer(blob()).unwrap();
    assert!(again.open_provisional(toc, b"provisional", MIB, 4).unwrap().has(0));
    let emptied = again.open_provisional(other, b"provisional", MIB, 4).unwrap();
    assert!(!emptied.has(0), "the chunks of another TOC");

    stored(&files, b"index");
    assert_eq!(fs::read(files.inodes_path()).unwrap(), b"inodes");
    let own = files.open_data(MIB, 4).unwrap();
    assert!(!own.has(0), "the chunks of no index");
    assert!(data.has(0), "who has the older file open keeps it");
}
