//! Tests of the tree: short stories of entries, and what they leave.

use super::{Content, Error, Tree, TreeBuilder};
use crate::tar::{Entry, Kind, Limits};

/// `dir/`, `file=CONTENT_SIZE`, `link->target`, `hard=>target`; the entry's place in the story is
/// its owner and time.
fn entry(index: usize, text: &str) -> Entry {
    let target = |target: &str| target.as_bytes().to_vec();
    let (path, kind, size) = if let Some((path, to)) = text.split_once("=>") {
        (path, Kind::HardLink { target: crate::tar::clean_path(to.as_bytes()) }, 0)
    } else if let Some((path, to)) = text.split_once("->") {
        (path, Kind::Symlink { target: target(to) }, 0)
    } else if let Some((path, size)) = text.split_once('=') {
        (path, Kind::File, size.parse().unwrap())
    } else if let Some(path) = text.strip_suffix('/') {
        (path, Kind::Dir, 0)
    } else {
        (text, Kind::File, 0)
    };
    let owner = u32::try_from(index + 1).unwrap();
    Entry {
        path: crate::tar::clean_path(path.as_bytes()),
        kind,
        mode: 0o700,
        uid: owner,
        gid: owner,
        mtime: (i64::from(owner), 5),
        xattrs: vec![(b"user.n".to_vec(), vec![0])],
        size,
        data: vec![],
    }
}

fn tree(story: &str) -> Result<Tree, Error> {
    let mut tree = TreeBuilder::new(Limits { depth: 8, ..Limits::default() });
    for (i, text) in story.split_whitespace().enumerate() {
        tree.insert(entry(i, text))?;
    }
    tree.finish()
}

/// All paths with what is there, `@` the entry it is from and `*` the links if there are several.
fn show(tree: &Tree) -> String {
    let mut out = Vec::new();
    let mut todo = vec![(tree.root(), String::new())];
    while let Some((id, path)) = todo.pop() {
        let inode = tree.inode(id);
        let what = match &inode.content {
            Content::Dir { opaque: false, .. } => "/".to_owned(),
            Content::Dir { opaque: true, .. } => "/opaque".to_owned(),
            Content::File { size: 0, .. } => String::new(),
            Content::File { size, .. } => format!("={size}"),
            Content::Symlink { target } => format!("->{}", String::from_utf8_lossy(target)),
            Content::Whiteout => "!".to_owned(),
            other => format!("{other:?}"),
        };
        let links = match &inode.content {
            Content::Dir { children, .. } => {
                for (name, child) in children {
                    let name = String::from_utf8_lossy(name);
                    todo.push((*child, format!("{path}/{name}")));
                }
                String::new()
            }
            _ if inode.links == 1 => String::new(),
            _ => format!("*{}", inode.links),
        };
        assert_eq!(inode.implicit, inode.uid == 0, "{path}");
        let from = if inode.implicit { String::new() } else { format!("@{}", inode.uid) };
        if !path.is_empty() {
            out.push(format!("{}{what}{links}{from}", path.trim_start_matches('/')));
        }
    }
    out.sort();
    out.join(" ")
}

#[test]
fn stories() {
    for (story, want) in [
        ("a/ a/f=3", "a/@1 a/f=3@2"),
        ("x/y/f", "x/ x/y/ x/y/f@1"),
        ("x/y/f x/", "x/@2 x/y/ x/y/f@1"),
        // The last entry of a name counts.
        ("f=1 f=2", "f=2@2"),
        ("f->a f=2", "f=2@2"),
        ("d/ d/f d/", "d/@3 d/f@2"),
        ("d/ d/f d=1", "d=1@3"),
        ("f=1 f/ f/g", "f/@2 f/g@3"),
        ("d/ d/f d=1 d/", "d/@4"),
        // Hard links share an inode, and keep it when a name is replaced.
        ("f=1 g=>f", "f=1*2@1 g=1*2@1"),
        ("f=1 g=>f f=2", "f=2@3 g=1@1"),
        ("f=1 g=>f h=>g", "f=1*3@1 g=1*3@1 h=1*3@1"),
        ("d/f=1 g=>d/f d=2", "d=2@3 g=1@1"),
        ("f=1 f=>f", "f=1@1"),
        ("l->x g=>l", "g->x*2@1 l->x*2@1"),
        // Also to what comes later, over several steps, and at last to what is there at the end.
        ("g=>f f=1", "f=1*2@2 g=1*2@2"),
        ("a=>b b=>c c=1", "a=1*3@3 b=1*3@3 c=1*3@3"),
        ("c=>b b=>a a=1 a=2", "a=2*3@4 b=2*3@4 c=2*3@4"),
        ("g=>f g=1", "g=1@2"),
        // Symbolic links above an entry are followed below the root; the last name is not.
        ("usr/lib/ lib->usr/lib lib/f", "lib->usr/lib@2 usr/ usr/lib/@1 usr/lib/f@3"),
        ("a/l->/b a/l/f", "a/ a/l->/b@1 b/ b/f@2"),
        ("a/l->../../../b a/l/f", "a/ a/l->../../../b@1 b/ b/f@2"),
        ("l->d d/ l/", "d/@2 l/@3"),
        ("l->d d/f=1 g=>l/f", "d/ d/f=1*2@2 g=1*2@2 l->d@1"),
        // Whiteouts hide lower layers only.
        (".wh.f d/.wh.g", "d/ d/g!@2 f!@1"),
        ("f=1 .wh.f", "f=1@1"),
        (".wh.f f=1", "f=1@2"),
        (".wh.d d/ d/f", "d/opaque@2 d/f@3"),
        (".wh.d d/f", "d/opaque d/f@2"),
        ("d/ d/f .wh.d", "d/opaque@1 d/f@2"),
        ("d/.wh..wh..opq d/f d/", "d/opaque@3 d/f@2"),
        (".wh..wh.plnk/ .wh..wh.plnk/f=1 .wh..wh.aufs f", "f@4"),
        // The root.
        ("./ ../../f /g", "f@2 g@3"),
    ] {
        let tree = tree(story).unwrap_or_else(|e| panic!("{story}: {e}"));
        // Opaque marks sort behind the names in the directory.
        let mut want: Vec<_> = want.split(' ').collect();
        want.sort_unstable();
        assert_eq!(show(&tree), want.join(" "), "{story}");
    }
}

#[test]
fn stories_that_cannot_be() {
    let long = format!("d/{}", "n".repeat(256));
    for (story, want) in [
        ("f=1 f/g", "\"f/g\" can't be placed: \"f\" above it is not a directory"),
        ("l->l l/f", "\"l/f\" can't be placed: too many symbolic links above it"),
        ("g=>f", "hard link \"g\" names \"f\", which is not in the archive"),
        ("a=>b b=>a", "which is not in the archive"),
        ("a=>a", "which is not in the archive"),
        ("d/ g=>d", "hard link \"g\" names \"d\", which is a directory"),
        ("g=>d d/", "hard link \"g\" names \"d\", which is a directory"),
        ("g=>.", "hard link \"g\" names \"/\", which is a directory"),
        ("l->", "symbolic link \"l\" has a target of 0 bytes; 1 to 4095 are allowed"),
        (&long, "has 256 bytes; file systems allow 255"),
        (".wh.", "whiteout \".wh.\" names nothing"),
        ("d/.wh...", "whiteout \"d/.wh...\" names nothing"),
        ("l->1/2/3/4/5/6/7/8 l/9/f", "is deeper than 8 directories"),
    ] {
        let error = tree(story).map(|tree| show(&tree)).expect_err(story).to_string();
        assert!(error.contains(want), "{story}: {error:?} should have {want:?}");
    }
}

#[test]
fn metadata_follows_the_last_entry() {
    let tree = tree("./ d/ d/f=1 d/.wh..wh..opq d/ ./").unwrap();
    let inode = |path: &str| tree.inode(tree.find(path.as_bytes()).unwrap());
    let root = inode("");
    assert_eq!((root.uid, root.mtime, root.mode, root.links), (6, (6, 5), 0o700, 3));
    let names: Vec<_> = inode("d").xattrs.keys().map(|k| String::from_utf8_lossy(k)).collect();
    assert_eq!(names, ["trusted.overlay.opaque", "user.n"]);
    assert_eq!(inode("d").links, 2);
}

#[test]
fn attributes_that_linux_would_not_keep_are_left_out() {
    let names = |kind: Kind| {
        let mut entry = entry(0, "a");
        entry.kind = kind;
        let all = ["other", "user.", "user.a", "security.capability", "system.posix_acl_access"];
        let all = all.iter().chain(&["system.posix_acl_default", "system.x", "trusted.t"]);
        entry.xattrs = all.map(|name| (name.as_bytes().to_vec(), vec![])).collect();
        let mut tree = TreeBuilder::new(Limits::default());
        tree.insert(entry).unwrap();
        let tree = tree.finish().unwrap();
        let xattrs = &tree.inode(tree.find(b"a").unwrap()).xattrs;
        xattrs.keys().map(|name| String::from_utf8(name.clone()).unwrap()).collect::<Vec<_>>()
    };
    let (cap, access, default) =
        ("security.capability", "system.posix_acl_access", "system.posix_acl_default");
    assert_eq!(names(Kind::File), [cap, access, "trusted.t", "user.a"]);
    assert_eq!(names(Kind::Dir), [cap, access, default, "trusted.t", "user.a"]);
    assert_eq!(names(Kind::Fifo), [cap, access, "trusted.t"]);
    assert_eq!(names(Kind::Symlink { target: b"t".to_vec() }), [cap, "trusted.t"]);
}

#[test]
fn memory_is_bounded() {
    let mut tree = TreeBuilder::new(Limits { metadata_bytes: 1 << 20, ..Limits::default() });
    let error = (0..10_000).find_map(|i| tree.insert(entry(i, &format!("d/{i}"))).err());
    assert!(error.unwrap().to_string().contains("takes more than 1048576 bytes of memory"));
}
