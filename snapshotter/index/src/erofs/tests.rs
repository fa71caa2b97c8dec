//! Tests of the image, written and read.

use super::{Inodes, write};
use crate::tar::{Entry, Extent, Kind, Limits};
use crate::tree::TreeBuilder;

fn entry(path: &str, kind: Kind) -> Entry {
    Entry {
        path: path.as_bytes().to_vec(),
        kind,
        mode: 0o644,
        uid: 1,
        gid: 2,
        mtime: (3, 4),
        xattrs: Vec::new(),
        size: 0,
        data: Vec::new(),
    }
}

#[test]
fn what_is_written_is_read() {
    let mut tree = TreeBuilder::new(Limits::default());
    tree.insert(entry("a", Kind::Dir)).unwrap();
    let mut file = entry("a/file", Kind::File);
    (file.size, file.data) = (700, vec![Extent { logical: 0, len: 700, at: 1024 }]);
    file.xattrs = vec![(b"user.k".to_vec(), b"v".to_vec())];
    tree.insert(file).unwrap();
    tree.insert(entry("a/link", Kind::Symlink { target: b"file".to_vec() })).unwrap();
    let image = write(&tree.finish().unwrap(), 3000).unwrap();
    assert_eq!((image.data_len, image.inodes), (3072, 4));
    let inodes = Inodes::open(&image.bytes, image.data_len).unwrap();
    let a = inodes.lookup(inodes.root(), b"a").unwrap();
    let names: Vec<_> = inodes.entries(a, 0).map(|entry| entry.name.to_vec()).collect();
    assert_eq!(names, [&b"."[..], b"..", b"file", b"link"]);
    let file = inodes.lookup(a, b"file").unwrap();
    assert_eq!(inodes.xattr(file, b"user.k"), Some(&b"v"[..]));
    let extents: Vec<_> =
        inodes.extents(file, 100..9000).map(|e| (e.logical, e.len, e.at)).collect();
    assert_eq!(extents, [(100, 600, Some(1124))]);
    assert_eq!(inodes.symlink(inodes.lookup(a, b"link").unwrap()), Some(&b"file"[..]));
}
