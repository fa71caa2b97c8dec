//! The tree that a layer's entries make, in overlayfs' terms.
//!
//! Owns: what entries mean together. Does not own: where they come from (a tar or a TOC) and how
//! the tree is stored (see [`crate::erofs`]).
//!
//! The result is what containerd and umoci unpack: later entries replace earlier ones, a directory
//! entry over a directory updates it, missing parents appear, symbolic links in the path of an entry
//! are followed below the root as they stand at that moment. Where the two differ, umoci is followed:
//! a hard link's own metadata is ignored, and a whiteout never removes what its own layer adds.
//! Whiteouts become what overlayfs understands. A hard link may also precede its target.
//!
//! Invariants of a finished [`Tree`]:
//! - Every directory but the root is named exactly once, and none below itself.
//! - `links` of everything else is the number of its names.

mod build;
#[cfg(test)]
mod tests;

pub use build::TreeBuilder;

use std::collections::BTreeMap;

use crate::tar::Extent;

/// A finished tree; made by [`TreeBuilder`].
#[derive(Debug)]
pub struct Tree {
    /// Some may no longer have a name.
    inodes: Vec<Inode>,
}

impl Tree {
    pub fn root(&self) -> InodeId {
        InodeId(0)
    }

    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id.0 as usize]
    }

    /// How many inodes have been made, including those without a name: a bound for tables by
    /// [`InodeId::index`].
    pub fn inodes_made(&self) -> usize {
        self.inodes.len()
    }

    /// The inode at a cleaned path; symbolic links are not followed.
    pub fn find(&self, path: &[u8]) -> Option<InodeId> {
        let mut at = self.root();
        for name in path.split(|b| *b == b'/').filter(|name| !name.is_empty()) {
            at = *self.inode(at).children()?.get(name)?;
        }
        Some(at)
    }
}

/// Names an inode of one tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(u32);

impl InodeId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    pub content: Content,
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    /// Full names and values, by name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Names of this inode; of a directory 2 and one for each directory in it.
    pub links: u32,
    /// A parent directory that the layer has no entry for: its metadata here is made up, and below
    /// other layers theirs would count.
    pub implicit: bool,
}

impl Inode {
    /// The names in a directory.
    pub fn children(&self) -> Option<&BTreeMap<Vec<u8>, InodeId>> {
        match &self.content {
            Content::Dir { children, .. } => Some(children),
            _ => None,
        }
    }

    pub fn is_dir(&self) -> bool {
        matches!(self.content, Content::Dir { .. })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    Dir {
        children: BTreeMap<Vec<u8>, InodeId>,
        /// Hides what lower layers have here.
        opaque: bool,
    },
    /// `data` as in [`crate::tar::Entry`].
    File {
        size: u64,
        data: Vec<Extent>,
    },
    Symlink {
        target: Vec<u8>,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    /// Says that the lower layers' file of this name is gone.
    Whiteout,
}

/// Why entries make no tree. Paths are those of the archive.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path:?} can't be placed: {parent:?} above it is not a directory")]
    NotADirectory { path: String, parent: String },
    #[error("{path:?} can't be placed: too many symbolic links above it")]
    SymlinkLoop { path: String },
    #[error("{path:?} is deeper than {limit} directories once symbolic links are followed")]
    TooDeep { path: String, limit: usize },
    #[error("a name in {path:?} has {len} bytes; file systems allow 255")]
    NameTooLong { path: String, len: usize },
    #[error("symbolic link {path:?} has a target of {len} bytes; 1 to 4095 are allowed")]
    SymlinkTarget { path: String, len: usize },
    #[error("{path:?} is not a cleaned path")]
    Path { path: String },
    #[error("{path:?} has a NUL in its name or target")]
    Nul { path: String },
    #[error("hard link {path:?} names {target:?}, which is not in the archive")]
    MissingTarget { path: String, target: String },
    #[error("hard link {path:?} names {target:?}, which is a directory")]
    LinkToDirectory { path: String, target: String },
    #[error("whiteout {path:?} names nothing")]
    Whiteout { path: String },
    #[error(
        "the tree takes more than {limit} bytes of memory (at {path:?}); index.max_metadata_bytes allows more"
    )]
    TooLarge { path: String, limit: u64 },
}
