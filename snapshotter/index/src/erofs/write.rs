//! A tree as an EROFS image: everything gets its place first, then everything is written.

mod chunks;
mod place;

use crate::tar::display_path;
use crate::tree::{Content, Inode, InodeId, Tree};

use super::format;
use super::format::FileKind;
use place::{Layout, Place, Plan};

/// What [`write()`] makes of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The image, a multiple of 512 bytes.
    pub bytes: Vec<u8>,
    /// Length of the data file: the stream's, rounded up to 512, and the overflow area behind it.
    pub data_len: u64,
    /// What the overflow area holds, ascending in `to`; the rest of it is zeros.
    pub copies: Vec<Copy>,
    pub inodes: u64,
}

/// Bytes of the stream that are wanted a second time in the data file, behind the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    pub from: u64,
    pub to: u64,
    pub len: u64,
}

/// Why a tree doesn't fit the format.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("the layer's data takes {len} bytes, with {path:?}; {limit} can be addressed")]
    DataTooLarge { path: String, len: u64, limit: u64 },
    #[error("{path:?} has {len} bytes, holes included; at most {limit} can be kept")]
    FileTooLarge { path: String, len: u64, limit: u64 },
    #[error("the layer's file system metadata takes more than {limit} bytes (at {path:?})")]
    ImageTooLarge { path: String, limit: u64 },
    #[error("the data of {path:?} is not in the layer, or out of order")]
    Data { path: String },
    #[error("extended attribute {name:?} of {path:?} has {len} bytes; at most {limit} can be kept")]
    Xattr { path: String, name: String, len: usize, limit: usize },
    #[error(
        "extended attribute {name:?} of {path:?} belongs to none of the kinds that can be kept"
    )]
    XattrKind { path: String, name: String },
    #[error("the extended attributes of {path:?} take {len} bytes; at most {limit} can be kept")]
    Xattrs { path: String, len: usize, limit: usize },
    #[error("device number {major}:{minor} of {path:?} does not fit 12 and 20 bits")]
    DeviceNumber { path: String, major: u32, minor: u32 },
}

/// Writes the image of `tree`, whose extents lie in a stream of `tar_len` bytes.
///
/// # Errors
/// When something in the tree is beyond what the format can say.
pub fn write(tree: &Tree, tar_len: u64) -> Result<Image, WriteError> {
    let plan = Plan::new(tree, tar_len)?;
    let mut bytes = vec![0_u8; plan.image_len];
    let inodes = plan.places.len() as u64;
    let head = format::head(inodes, plan.image_len as u64, plan.data_len);
    bytes[..head.len()].copy_from_slice(&head);
    for place in &plan.places {
        write_inode(&mut bytes, tree, &plan, place)?;
    }
    Ok(Image { bytes, data_len: plan.data_len, copies: plan.copies, inodes })
}

fn write_inode(
    bytes: &mut [u8],
    tree: &Tree,
    plan: &Plan,
    place: &Place,
) -> Result<(), WriteError> {
    let inode = tree.inode(place.id);
    let path = || path_of(tree, place.id);
    let kind = kind_of(&inode.content);
    let (format_bits, word) = match &place.layout {
        Layout::Plain { block } | Layout::Inline { block, .. } => {
            let (layout, in_blocks) = match place.layout {
                Layout::Inline { tail, .. } => (format::INLINE, place.size - tail as u64),
                _ => (format::PLAIN, place.size),
            };
            let block = if in_blocks == 0 { 0 } else { plan.first_block + block };
            (layout, low32(block))
        }
        Layout::Chunked(chunks) => {
            (format::CHUNKED, u32::from(format::CHUNK_INDEXES | chunks.bits()))
        }
        Layout::Empty => match inode.content {
            Content::CharDevice { major, minor } | Content::BlockDevice { major, minor } => {
                let number = format::device_number(major, minor);
                let number = number.ok_or_else(|| WriteError::DeviceNumber {
                    path: path(),
                    major,
                    minor,
                })?;
                (format::PLAIN, number)
            }
            _ => (format::PLAIN, 0),
        },
    };
    let icount = match place.xattr_len {
        0 => 0,
        len => 1 + len / 4,
    };
    let nid = plan.nid(place.id);
    let at = usize_of(place.at);
    let mut fields = Fields { bytes, at };
    fields.put(0, &format_bits.to_le_bytes());
    fields.put(2, &low16(icount as u64).to_le_bytes());
    fields.put(4, &(kind.mode_bits() | low16(u64::from(inode.mode) & 0o7777)).to_le_bytes());
    fields.put(8, &place.size.to_le_bytes());
    fields.put(16, &word.to_le_bytes());
    fields.put(20, &low32(nid.0).to_le_bytes());
    fields.put(24, &inode.uid.to_le_bytes());
    fields.put(28, &inode.gid.to_le_bytes());
    fields.put(32, &inode.mtime.0.to_le_bytes());
    fields.put(40, &inode.mtime.1.to_le_bytes());
    fields.put(44, &inode.links.to_le_bytes());
    fields.put(48, &[u8::from(inode.implicit)]);
    if place.xattr_len > 0 {
        fields.put(format::INODE_LEN + format::XATTR_HEADER_LEN, &xattr_bytes(inode));
    }
    let body = format::body_len(place.xattr_len);
    match &place.layout {
        Layout::Empty => {}
        Layout::Chunked(chunks) => {
            let mut at = body.next_multiple_of(format::CHUNK_LEN);
            for block in chunks.blocks() {
                let device = if block == format::HOLE { 0 } else { format::DEVICE };
                fields.put(at + 2, &device.to_le_bytes());
                fields.put(at + 4, &block.to_le_bytes());
                at += format::CHUNK_LEN;
            }
        }
        Layout::Plain { block } | Layout::Inline { block, .. } => {
            let data = match &inode.content {
                Content::Symlink { target } => target.clone(),
                _ => dir_bytes(tree, plan, place),
            };
            let tail = match place.layout {
                Layout::Inline { tail, .. } => tail,
                _ => 0,
            };
            let (blocks, tail) = data.split_at(data.len() - tail);
            fields.put(body, tail);
            fields.at = usize_of((plan.first_block + block) * format::BLOCK);
            fields.put(0, blocks);
        }
    }
    Ok(())
}

/// The blocks of a directory, the last one as long as it is used.
fn dir_bytes(tree: &Tree, plan: &Plan, place: &Place) -> Vec<u8> {
    let names = place::dir_names(tree.inode(place.id));
    let mut out: Vec<u8> = Vec::new();
    for run in place::dir_blocks(&names) {
        out.resize(out.len().next_multiple_of(usize_of(format::BLOCK)), 0);
        let start = out.len();
        let names = &names[run];
        let mut name_at = names.len() * format::DIRENT_LEN;
        for (name, child) in names {
            let (nid, kind) = match (*name, child) {
                (_, Some(child)) => (plan.nid(*child), kind_of(&tree.inode(*child).content)),
                (b".", None) => (plan.nid(place.id), FileKind::Dir),
                (_, None) => (plan.nid(place.parent), FileKind::Dir),
            };
            out.extend_from_slice(&nid.0.to_le_bytes());
            out.extend_from_slice(&low16(name_at as u64).to_le_bytes());
            out.extend_from_slice(&[kind.dirent(), 0]);
            name_at += name.len();
        }
        debug_assert_eq!(out.len() - start, names.len() * format::DIRENT_LEN);
        names.iter().for_each(|(name, _)| out.extend_from_slice(name));
    }
    out
}

/// The entries of an inode's extended attributes, each padded to 4 bytes. Checked by [`Plan::new`].
fn xattr_bytes(inode: &Inode) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in &inode.xattrs {
        if let Some((index, suffix)) = place::split_xattr(name) {
            out.extend_from_slice(&[low16(suffix.len() as u64).to_le_bytes()[0], index]);
            out.extend_from_slice(&low16(value.len() as u64).to_le_bytes());
            out.extend_from_slice(suffix);
            out.extend_from_slice(value);
            out.resize(out.len().next_multiple_of(format::XATTR_ENTRY_LEN), 0);
        }
    }
    out
}

fn kind_of(content: &Content) -> FileKind {
    match content {
        Content::Dir { .. } => FileKind::Dir,
        Content::File { .. } => FileKind::File,
        Content::Symlink { .. } => FileKind::Symlink,
        Content::CharDevice { .. } | Content::Whiteout => FileKind::CharDevice,
        Content::BlockDevice { .. } => FileKind::BlockDevice,
        Content::Fifo => FileKind::Fifo,
    }
}

/// A path of an inode, for a message.
fn path_of(tree: &Tree, wanted: InodeId) -> String {
    let mut todo = vec![(tree.root(), Vec::new())];
    while let Some((id, path)) = todo.pop() {
        if id == wanted {
            return display_path(&path);
        }
        for (name, child) in tree.inode(id).children().into_iter().flatten() {
            let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
            todo.push((*child, [&path, slash, name].concat()));
        }
    }
    String::new()
}

/// Fields relative to `at`; places were checked when they were given out.
struct Fields<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Fields<'_> {
    fn put(&mut self, offset: usize, value: &[u8]) {
        let at = self.at + offset;
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }
}

/// The low bits of a number that was checked to have no others.
fn low16(n: u64) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

fn low32(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn usize_of(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
