//! Tests of the image, written and read.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{FileKind, Image, Inodes, Nid, write};
use crate::tar::{Entry, Extent, Kind, Limits};
use crate::tree::{Content, InodeId, Tree, TreeBuilder};

const DATA: u64 = 1 << 20;

fn entry(path: &str, kind: Kind) -> Entry {
    Entry {
        path: path.as_bytes().to_vec(),
        kind,
        mode: 0o644,
        uid: 1,
        gid: 2,
        mtime: (-3, 4),
        xattrs: Vec::new(),
        size: 0,
        data: Vec::new(),
    }
}

fn file(path: &str, size: u64, data: &[(u64, u64, u64)]) -> Entry {
    let extents = data.iter().map(|&(logical, len, at)| Extent { logical, len, at });
    Entry { size, data: extents.collect(), ..entry(path, Kind::File) }
}

fn tree(entries: Vec<Entry>) -> Tree {
    let mut tree = TreeBuilder::new(Limits::default());
    entries.into_iter().for_each(|entry| tree.insert(entry).unwrap());
    tree.finish().unwrap()
}

fn image(entries: Vec<Entry>) -> Image {
    write(&tree(entries), DATA).unwrap()
}

/// The image says the same as the tree, whichever way it is asked.
fn assert_same(tree: &Tree, image: &Image) {
    let inodes = Inodes::open(&image.bytes, image.data_len).unwrap();
    let mut seen: BTreeMap<Nid, InodeId> = BTreeMap::new();
    let mut todo = vec![(tree.root(), inodes.root(), inodes.root())];
    while let Some((id, nid, parent)) = todo.pop() {
        let (want, found) = (tree.inode(id), inodes.inode(nid).unwrap());
        assert_eq!(*seen.entry(nid).or_insert(id), id);
        let metadata = (found.mode.into(), found.uid, found.gid, found.mtime, found.nlink);
        assert_eq!(metadata, (want.mode, want.uid, want.gid, want.mtime, want.links));
        assert_eq!(found.implicit, want.implicit);
        let xattrs: BTreeMap<_, _> =
            inodes.xattrs(nid).map(|xattr| (xattr.name(), xattr.value.to_vec())).collect();
        assert_eq!(xattrs, want.xattrs);
        match &want.content {
            Content::Dir { children, .. } => {
                let entries: Vec<_> = inodes.entries(nid, 0).collect();
                assert!(entries.is_sorted_by(|a, b| a.name < b.name && a.next < b.next));
                assert_eq!(entries.len(), children.len() + 2);
                for (i, entry) in entries.iter().enumerate() {
                    assert_eq!(inodes.lookup(nid, entry.name), Some(entry.nid));
                    assert_eq!(inodes.entries(nid, entry.next).next(), entries.get(i + 1).copied());
                    match entry.name {
                        b"." => assert_eq!(entry.nid, nid),
                        b".." => assert_eq!(entry.nid, parent),
                        name => todo.push((children[name], entry.nid, nid)),
                    }
                    assert_eq!(inodes.inode(entry.nid).unwrap().kind, entry.kind);
                }
                for absent in [&b""[..], b"\0", b"zz-absent", b"\xff\xff\xff"] {
                    assert_eq!(inodes.lookup(nid, absent), None);
                }
            }
            Content::Symlink { target } => assert_eq!(inodes.symlink(nid), Some(&target[..])),
            Content::File { size, data } => {
                assert_eq!(found.size, *size);
                assert_file(&inodes, nid, *size, data, image);
            }
            Content::CharDevice { .. } | Content::Whiteout => {
                assert_eq!(found.kind, FileKind::CharDevice);
            }
            Content::BlockDevice { .. } => assert_eq!(found.kind, FileKind::BlockDevice),
            Content::Fifo => assert_eq!(found.kind, FileKind::Fifo),
        }
    }
    assert_eq!((inodes.inode_count(), image.inodes), (seen.len() as u64, seen.len() as u64));
}

/// Each byte of a file is where the tree says, directly or through a copy; the rest is zeros.
fn assert_file(inodes: &Inodes<&Vec<u8>>, nid: Nid, size: u64, data: &[Extent], image: &Image) {
    let origin = |at: u64| match at < DATA {
        true => Some(at),
        false => image.copies.iter().find_map(|copy| {
            (copy.to..copy.to + copy.len).contains(&at).then(|| copy.from + (at - copy.to))
        }),
    };
    let mut pos = 0;
    for extent in inodes.extents(nid, 0..u64::MAX) {
        assert_eq!(extent.logical, pos);
        pos += extent.len;
        // Both ends and whatever lies at the ends of what is stored.
        let edges = data.iter().flat_map(|e| [e.logical, e.logical + e.len]);
        for edge in edges.chain([extent.logical, pos]) {
            for at in [edge.saturating_sub(1), edge] {
                if !(extent.logical..pos).contains(&at) {
                    continue;
                }
                let run = data.iter().find(|e| (e.logical..e.logical + e.len).contains(&at));
                let want = run.map(|run| run.at + (at - run.logical));
                let found = extent.at.and_then(|start| origin(start + (at - extent.logical)));
                assert_eq!(found, want, "byte {at}");
            }
        }
    }
    assert_eq!(pos, size);
}

#[test]
fn images_are_small_and_always_the_same() {
    let entries = || {
        let mut out = vec![entry("d", Kind::Dir)];
        out.extend((0..1000).map(|i| file(&format!("d/{i:08}"), 600, &[(0, 600, i * 512)])));
        out
    };
    let one = image(entries());
    assert_eq!(one, image(entries()));
    // 96 bytes an inode, 20 a name; 10 KiB are for the rest.
    assert!(one.bytes.len() < 1000 * 116 + 10_240, "{}", one.bytes.len());
    let digest = blake3::hash(&one.bytes).to_hex();
    assert_eq!(
        digest.as_str(),
        "0b0a4afa69502e763d0433d8bef84467b3c34866f20e910a3f788a2c1c6b294d",
        "the format has changed: it needs a new version"
    );
}

#[test]
fn files_lie_where_the_stream_has_them() {
    let cases: [(&str, u64, &[(u64, u64, u64)]); 9] = [
        ("empty", 0, &[]),
        ("whole", 700, &[(0, 700, 1024)]),
        ("hole", 5_000_000, &[]),
        ("huge-hole", 16 << 40, &[]),
        ("unaligned", 700, &[(0, 700, 1000)]),
        ("tail", 100_000, &[(99_990, 10, 512)]),
        ("aligned", 8192, &[(0, 1024, 0), (4096, 4096, 1024)]),
        ("odd", 10_000, &[(1000, 100, 2048), (5000, 600, 2148)]),
        ("huge", 1 << 40, &[(0, 4096, 0), (1 << 39, 512, 4096), ((1 << 40) - 1, 1, 4608)]),
    ];
    let tree = tree(cases.iter().map(|(path, size, data)| file(path, *size, data)).collect());
    let image = write(&tree, DATA).unwrap();
    assert_same(&tree, &image);
    assert!(image.copies.is_sorted_by(|a, b| a.to + a.len <= b.to));
    let inodes = Inodes::open(&image.bytes, image.data_len).unwrap();
    let extents = |path: &str, range| {
        let nid = inodes.lookup(inodes.root(), path.as_bytes()).unwrap();
        inodes.extents(nid, range).map(|e| (e.logical, e.len, e.at)).collect::<Vec<_>>()
    };
    assert_eq!(extents("whole", 100..9000), [(100, 600, Some(1124))]);
    assert_eq!(extents("whole", 700..9000), []);
    assert_eq!(extents("hole", 7..100), [(7, 93, None)]);
    assert_eq!(extents("empty", 0..100), []);
}

#[test]
fn trees_beyond_the_format_are_refused() {
    let with_xattr = |name: &str, len| {
        let mut entry = entry("d/f", Kind::File);
        entry.xattrs = vec![(name.as_bytes().to_vec(), vec![1; len])];
        entry
    };
    for (entry, tar_len, want) in [
        (file("d/f", 10, &[(0, 10, 600)]), 512, "the data of \"d/f\" is not in the layer"),
        (file("d/f", 10, &[(0, 11, 0)]), 512, "the data of \"d/f\" is not in the layer"),
        (file("d/f", 30, &[(10, 5, 0), (0, 5, 5)]), 512, "or out of order"),
        (file("d/f", 17 << 40, &[]), 512, "\"d/f\" has 18691697672192 bytes, holes included"),
        (file("d/f", 10, &[]), 3 << 40, "the layer's data takes 3298534883328 bytes"),
        (with_xattr("user.a", 65_536), 512, "\"user.a\" of \"d/f\" has 65536 bytes; at most 65535"),
        (with_xattr(&format!("user.{}", "n".repeat(256)), 1), 512, "has 256 bytes; at most 255"),
        (
            entry("d/f", Kind::CharDevice { major: 4096, minor: 0 }),
            512,
            "device number 4096:0 of \"d/f\"",
        ),
        (
            entry("d/f", Kind::BlockDevice { major: 0, minor: 1 << 20 }),
            512,
            "device number 0:1048576",
        ),
    ] {
        let error = write(&tree(vec![entry]), tar_len).unwrap_err().to_string();
        assert!(error.contains(want), "{error:?} should have {want:?}");
    }
}

/// Damage that keeps the image plausible; each is found for its own reason.
#[test]
fn lying_images_are_refused() {
    let good = image(vec![
        file("a", 600, &[(0, 600, 512)]),
        entry("b", Kind::Dir),
        entry("h", Kind::HardLink { target: b"a".to_vec() }),
        entry("l", Kind::Symlink { target: b"target".to_vec() }),
    ]);
    let inodes = Inodes::open(&good.bytes, good.data_len).unwrap();
    let at = |name: &str| {
        usize::try_from(inodes.lookup(inodes.root(), name.as_bytes()).unwrap().0 * 32).unwrap()
    };
    let (root, a, b, l) = (1280, at("a"), at("b"), at("l"));
    // The root's entries: `.`, `..`, a, b, h, l.
    let dirent = |i: usize| root + 64 + i * 12;
    let names = dirent(6);
    let cases: [(usize, &[u8], &str); 24] = [
        (1024, b"x", "magic number"),
        (1036, &[12], "the superblock or the device table differs"),
        (1040, &[9], "it counts other inodes"),
        (0, b"x", "the superblock or the device table differs"),
        (root + 44, &[9], "directory 40 is invalid: its link count is wrong"),
        (a + 44, &[3], "fewer names than it says"),
        (a + 44, &[1], "more names than it says"),
        (a + 20, &[1], "its number is not its own"),
        (a + 50, &[1], "reserved bytes"),
        (a + 48, &[1], "reserved bytes"),
        (a + 43, &[0xff], "more than a second"),
        (a + 8, &[0xff; 8], "its chunks lie outside of the image"),
        (a + 16, &[0x40], "its chunk format is unknown"),
        (a + 64 + 2, &[2], "a chunk is on another device"),
        (a + 64 + 4, &[0, 0, 1], "a chunk lies outside of the data"),
        (a + 2, &[1], "an empty list of attributes"),
        (a + 2, &[0xff, 0xff], "its attributes lie outside"),
        (b + 4, &[0xff, 0xff], "its type is unknown"),
        (l + 64, &[0], "its target has a NUL"),
        (names + 3, b"b", "its names are not in order"),
        (names + 3, b"/", "a slash or a NUL"),
        (dirent(0), &[0], "`.` or `..` is not what it should be"),
        (dirent(2) + 8, &[0xff], "malformed"),
        (dirent(2) + 10, &[2], "another type than the inode"),
    ];
    for (at, bytes, want) in cases {
        let mut bad = good.bytes.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        let error = Inodes::open(&bad, good.data_len).map(drop).unwrap_err().to_string();
        assert!(error.contains(want), "{at}: {error:?} should have {want:?}");
    }
    // A directory that is its own child, and one with two names.
    let mut bad = good.bytes.clone();
    bad[dirent(3)..dirent(3) + 8].copy_from_slice(&40_u64.to_le_bytes());
    assert!(Inodes::open(&bad, good.data_len).is_err());
    let mut bad = good.bytes.clone();
    *bad.last_mut().unwrap() = 1;
    assert!(Inodes::open(&bad, good.data_len).is_err());
    for cut in [0, 100, 1024, 1280, good.bytes.len() - 512] {
        assert!(Inodes::open(&good.bytes[..cut], good.data_len).is_err());
    }
    assert!(Inodes::open(&good.bytes, good.data_len + 512).is_err());
    // Numbers that name no inode.
    for nid in [0, 39, 41, 1 << 20, u64::MAX] {
        assert_eq!(inodes.inode(Nid(nid)), None);
        assert_eq!(inodes.entries(Nid(nid), 0).count() + inodes.xattrs(Nid(nid)).count(), 0);
    }
    assert_eq!(inodes.entries(inodes.root(), u64::MAX).count(), 0);
    assert_eq!(inodes.symlink(inodes.root()), None);
}

/// Asks for everything; nothing of it may panic.
fn exercise(inodes: &Inodes<&Vec<u8>>) {
    for nid in (0..inodes.as_bytes().len() as u64 / 32).map(Nid) {
        let _ = (inodes.inode(nid), inodes.symlink(nid), inodes.lookup(nid, b"a"));
        let _ =
            inodes.entries(nid, 0).take(100).count() + inodes.entries(nid, nid.0).take(9).count();
        let _ = inodes.extents(nid, nid.0..u64::MAX).take(100).count() + inodes.xattrs(nid).count();
    }
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let name = prop_oneof![
        "[a-d]{1,2}".prop_map(String::from),
        "[!-.0-~]{1,40}".prop_map(String::from),
        (1_usize..256).prop_map(|len| "n".repeat(len)),
    ];
    let path = prop::collection::vec(name, 1..4).prop_map(|parts| parts.join("/"));
    let kind = prop_oneof![
        3 => Just(Kind::Dir),
        6 => Just(Kind::File),
        2 => (1_usize..4095).prop_map(|len| Kind::Symlink { target: vec![b't'; len] }),
        1 => "[a-d]".prop_map(|target| Kind::HardLink { target: target.into_bytes() }),
        1 => Just(Kind::Fifo),
        1 => (0_u32..4096, 0_u32..1 << 20).prop_map(|(major, minor)| Kind::CharDevice { major, minor }),
    ];
    let xattr = ("user\\.[a-c]{1,9}|trusted\\.[a-z]{1,200}|security\\.capability", 0_usize..900);
    let xattrs = prop::collection::btree_map(xattr.0, xattr.1, 0..4);
    let runs = prop::collection::vec((0_u64..9000, 1_u64..5000), 0..5);
    let fixed = (0_u32..0o10000, any::<u32>(), any::<i64>(), 0_u32..1_000_000_000);
    (path, kind, xattrs, runs, fixed, any::<bool>()).prop_map(
        |(path, kind, xattrs, runs, (mode, uid, time, nanos), whole)| {
            let (mut data, mut size, mut at) = (Vec::new(), 0, 512);
            for (gap, len) in runs.into_iter().take(if whole { 1 } else { 5 }) {
                let gap = if whole { 0 } else { gap };
                data.push(Extent { logical: size + gap, len, at });
                (size, at) = (size + gap + len, at + len);
            }
            let size = if whole { size } else { size + size / 3 };
            let is_file = kind == Kind::File;
            Entry {
                path: path.into_bytes(),
                kind,
                mode,
                uid,
                gid: uid / 2,
                mtime: (time, nanos),
                xattrs: xattrs.into_iter().map(|(k, len)| (k.into_bytes(), vec![7; len])).collect(),
                size: if is_file { size } else { 0 },
                data: if is_file { data } else { Vec::new() },
            }
        },
    )
}

/// What of random entries makes sense.
fn any_tree() -> impl Strategy<Value = Tree> {
    prop::collection::vec(any_entry(), 0..60).prop_map(|entries| {
        let mut tree = TreeBuilder::new(Limits::default());
        tree.insert(entry("a", Kind::File)).unwrap();
        for entry in entries {
            // A link must find its target whatever comes after it.
            let linked = matches!(entry.kind, Kind::HardLink { .. });
            if !linked || entry.path != b"a" {
                let _ = tree.insert(entry);
            }
        }
        for name in ["a", "b", "c", "d"] {
            tree.insert(entry(name, Kind::File)).unwrap();
        }
        tree.finish().unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn random_trees_are_read_as_they_were_written(tree in any_tree()) {
        let image = write(&tree, DATA).unwrap();
        assert_same(&tree, &image);
    }

    #[test]
    fn damage_is_refused_or_harmless(
        tree in any_tree(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut image = write(&tree, DATA).unwrap();
        for (at, with) in damage {
            let at = at.index(image.bytes.len());
            image.bytes[at] ^= with;
        }
        if let Ok(inodes) = Inodes::open(&image.bytes, image.data_len) {
            exercise(&inodes);
        }
    }

    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..4096), inodes in 0_u64..9) {
        let mut bytes = noise;
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        let head = super::format::head(inodes, bytes.len() as u64, DATA);
        if bytes.len() > head.len() {
            bytes[..head.len()].copy_from_slice(&head);
        }
        if let Ok(inodes) = Inodes::open(&bytes, DATA) {
            exercise(&inodes);
        }
    }
}
