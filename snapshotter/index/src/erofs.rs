//! The inodes of a layer, as an EROFS image without file data.
//!
//! The image is what the kernel mounts (`mount -t erofs -o device=DATA IMAGE`), what our FUSE server
//! reads, and what `fsck.erofs` checks. File data lies on the one external device: the layer's data
//! file, which holds the tar stream at its own offsets, and behind it an overflow area for what is
//! not contiguous and aligned there.
//!
//! Of what EROFS allows, [`write()`] makes one form only, the same bytes for the same tree:
//! - 512-byte blocks; superblock at 1024, the device table's one slot at 1152, the root at 1280;
//! - extended inodes in breadth-first order, children by name, then the blocks of directories and
//!   symbolic links that don't fit behind their inode; what nothing uses is zero;
//! - directories FLAT_PLAIN or FLAT_INLINE, symbolic links in one piece, files chunk-based with
//!   8-byte indexes, empty files FLAT_PLAIN;
//! - extended attributes inline, by name; no shared ones, no checksum, times as they are;
//! - byte 48 of an inode, reserved in EROFS, is 1 for a directory that the layer has no entry for.
//!
//! [`Inodes`] accepts this form and nothing else.
//!
//! Source of the format: the kernel's `Documentation/filesystems/erofs.rst` and erofs-utils'
//! `erofs_fs.h`.

mod format;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub use format::{FileKind, Nid};
pub use read::{DirEntry, Entries, FileExtent, Inode, Inodes, ReadError, Xattr, Xattrs};
pub use write::{Copy, Image, WriteError, write};
