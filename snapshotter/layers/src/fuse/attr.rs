//! Inodes of the index in the terms of FUSE. Pure.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use skimmer_index::erofs::{FileKind, Inode, Nid};

/// What the kernel advises as a unit of reading.
const BLOCK_BYTES: u32 = 4096;

/// The answer to a look-up of a name that isn't there.
pub const NONE: FileAttr = FileAttr {
    ino: INodeNo(0),
    size: 0,
    blocks: 0,
    atime: UNIX_EPOCH,
    mtime: UNIX_EPOCH,
    ctime: UNIX_EPOCH,
    crtime: UNIX_EPOCH,
    kind: FileType::RegularFile,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    blksize: BLOCK_BYTES,
    flags: 0,
};

/// How nids become inode numbers: as they are, but FUSE wants the root to be 1, so that 1 and the
/// root's nid change places.
#[derive(Clone, Copy, Debug)]
pub struct Numbers {
    root: Nid,
}

impl Numbers {
    pub const fn new(root: Nid) -> Self {
        Self { root }
    }

    pub const fn number(self, nid: Nid) -> INodeNo {
        INodeNo(self.swap(nid.0))
    }

    pub const fn nid(self, number: INodeNo) -> Nid {
        Nid(self.swap(number.0))
    }

    const fn swap(self, n: u64) -> u64 {
        if n == self.root.0 {
            1
        } else if n == 1 {
            self.root.0
        } else {
            n
        }
    }
}

pub fn attributes(number: INodeNo, inode: &Inode) -> FileAttr {
    let time = time(inode.mtime);
    FileAttr {
        ino: number,
        size: inode.size,
        blocks: inode.size.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(inode.kind),
        perm: inode.mode & 0o7777,
        nlink: inode.nlink,
        uid: inode.uid,
        gid: inode.gid,
        rdev: inode.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

pub const fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Dir => FileType::Directory,
        FileKind::File => FileType::RegularFile,
        FileKind::Symlink => FileType::Symlink,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::Fifo => FileType::NamedPipe,
    }
}

/// Seconds may be negative; nanoseconds count up from them.
fn time((seconds, nanoseconds): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let start =
        if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    start
        .and_then(|start| start.checked_add(Duration::from_nanos(u64::from(nanoseconds))))
        .unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_number_one_change_places() {
        let numbers = Numbers::new(Nid(36));
        for (nid, number) in [(36, 1), (1, 36), (37, 37), (0, 0)] {
            assert_eq!(numbers.number(Nid(nid)), INodeNo(number));
            assert_eq!(numbers.nid(INodeNo(number)), Nid(nid));
        }
    }

    #[test]
    fn times_before_the_epoch_and_beyond_reason() {
        let second = Duration::from_secs(1);
        for (input, expected) in [
            ((0, 0), UNIX_EPOCH),
            ((1, 5), UNIX_EPOCH + second + Duration::from_nanos(5)),
            ((-1, 999_999_999), UNIX_EPOCH - Duration::from_nanos(1)),
            ((-1, 0), UNIX_EPOCH - second),
        ] {
            assert_eq!(time(input), expected);
        }
        for input in [(i64::MAX, 999_999_999), (i64::MIN, 0)] {
            let _ = time(input);
        }
    }
}
