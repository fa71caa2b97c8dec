//! Whether a TOC told the truth: its tree beside the tar's.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;

use sha2::{Digest as _, Sha256};
use skimmer_proto::Digest;

use super::{Error, Toc};
use crate::tar::{Extent, display_path};
use crate::tree::{Content, Inode, InodeId, Tree};

/// Of a file's contents, read at a time.
const STEP_BYTES: u64 = 256 << 10;

type Read<'a> = &'a mut dyn FnMut(&mut [u8], u64) -> io::Result<()>;

pub(super) fn compare(toc: &Toc, tar: &Tree, read: Read<'_>) -> Result<(), Error> {
    let mut walk = Walk { toc, tar, read, linked: HashMap::new(), buffer: Vec::new() };
    let mut open = vec![(Vec::new(), toc.tree.root(), tar.root())];
    while let Some((path, ours, theirs)) = open.pop() {
        let (Some(ours), Some(theirs)) =
            (walk.same(&path, ours, theirs)?, tar.inode(theirs).children())
        else {
            continue;
        };
        if !ours.keys().eq(theirs.keys()) {
            return Err(lie(&path, "set of entries"));
        }
        for ((name, ours), theirs) in ours.iter().zip(theirs.values()) {
            let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
            open.push(([&path, separator, name].concat(), *ours, *theirs));
        }
    }
    Ok(())
}

struct Walk<'a> {
    toc: &'a Toc,
    tar: &'a Tree,
    read: Read<'a>,
    /// Inodes with several names: the tar's, for each of the TOC's that has been compared.
    linked: HashMap<usize, InodeId>,
    buffer: Vec<u8>,
}

impl<'a> Walk<'a> {
    /// Compares two inodes, and returns the names in the TOC's if it is a directory.
    fn same(
        &mut self,
        path: &[u8],
        ours: InodeId,
        theirs: InodeId,
    ) -> Result<Option<&'a BTreeMap<Vec<u8>, InodeId>>, Error> {
        let (a, b) = (self.toc.tree.inode(ours), self.tar.inode(theirs));
        if let Some(what) = difference(a, b) {
            return Err(lie(path, what));
        }
        if a.children().is_none() && a.links > 1 {
            match self.linked.insert(ours.index(), theirs) {
                None => {}
                Some(known) if known == theirs => return Ok(None),
                Some(_) => return Err(lie(path, "set of links")),
            }
        }
        if let (Content::File { size, data: a }, Content::File { data: b, .. }) =
            (&a.content, &b.content)
        {
            self.contents(path, *size, a, b)?;
        }
        Ok(a.children())
    }

    /// Compares the contents of two files of one size: what the TOC's chunks decode to, by digest.
    fn contents(
        &mut self,
        path: &[u8],
        size: u64,
        a: &[Extent],
        b: &[Extent],
    ) -> Result<(), Error> {
        let mut done = 0;
        for extent in a {
            self.zeros(path, b, done..extent.logical)?;
            done = extent.logical;
            for (len, expected) in self.spans(extent) {
                let mut hash = Sha256::new();
                self.each(path, b, done..done + len, &mut |bytes| hash.update(bytes))?;
                if Digest::from_bytes(hash.finalize().into()) != expected {
                    return Err(lie(path, "content"));
                }
                done += len;
            }
        }
        self.zeros(path, b, done..size)
    }

    /// Lengths and digests of the parts of an extent of the TOC's.
    fn spans(&self, extent: &Extent) -> Vec<(u64, Digest)> {
        if let Some((at, digest)) = self.toc.own
            && at == extent.at
        {
            return vec![(extent.len, digest)];
        }
        let chunks = &self.toc.chunks;
        let first = chunks.partition_point(|chunk| chunk.data.start < extent.at);
        let inside = chunks.iter().zip(&self.toc.digests).skip(first);
        inside
            .take_while(|(chunk, _)| chunk.data.start < extent.at + extent.len)
            .map(|(chunk, digest)| (chunk.data.end - chunk.data.start, *digest))
            .collect()
    }

    fn zeros(&mut self, path: &[u8], extents: &[Extent], range: Range<u64>) -> Result<(), Error> {
        let mut zero = true;
        self.each(path, extents, range, &mut |bytes| zero &= bytes.iter().all(|byte| *byte == 0))?;
        if zero { Ok(()) } else { Err(lie(path, "content")) }
    }

    /// Hands `range` of a file whose bytes are at `extents` of the tar to `take`, in order.
    fn each(
        &mut self,
        path: &[u8],
        extents: &[Extent],
        range: Range<u64>,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<(), Error> {
        let mut at = range.start;
        let mut next = extents.partition_point(|e| e.logical + e.len <= at);
        while at < range.end {
            let extent = extents.get(next).filter(|extent| extent.logical < range.end);
            let (end, source) = match extent {
                Some(e) if e.logical <= at => (e.logical + e.len, Some(e.at + (at - e.logical))),
                Some(e) => (e.logical, None),
                None => (range.end, None),
            };
            let len = (end.min(range.end) - at).min(STEP_BYTES);
            self.buffer.clear();
            self.buffer.resize(usize::try_from(len).unwrap_or(0), 0);
            if let Some(source) = source {
                (self.read)(&mut self.buffer, source)
                    .map_err(|source| Error::Contents { path: display_path(path), source })?;
            }
            take(&self.buffer);
            at += len;
            next += usize::from(source.is_some() && at == end);
        }
        Ok(())
    }
}

fn lie(path: &[u8], what: &'static str) -> Error {
    Error::Lie { path: display_path(path), what }
}

/// What two inodes differ in, the contents of directories and files aside.
fn difference(toc: &Inode, tar: &Inode) -> Option<&'static str> {
    let content = match (&toc.content, &tar.content) {
        (Content::Dir { opaque: a, .. }, Content::Dir { opaque: b, .. }) => a == b,
        (Content::File { size: a, .. }, Content::File { size: b, .. }) => a == b,
        (a, b) => a == b,
    };
    [
        (content, "type, size, target or device"),
        (toc.mode == tar.mode, "mode"),
        ((toc.uid, toc.gid) == (tar.uid, tar.gid), "owner"),
        (same_time(toc.mtime, tar.mtime), "time"),
        (toc.xattrs == tar.xattrs, "set of extended attributes"),
        (toc.implicit == tar.implicit, "entry"),
        (toc.is_dir() || toc.links == tar.links, "number of links"),
    ]
    .into_iter()
    .find_map(|(same, what)| (!same).then_some(what))
}

/// eStargz rounds times to the second.
fn same_time(toc: (i64, u32), tar: (i64, u32)) -> bool {
    let rounded =
        tar.1 > 0 && toc.1 == 0 && (toc.0 == tar.0 || Some(toc.0) == tar.0.checked_add(1));
    toc == tar || rounded
}
