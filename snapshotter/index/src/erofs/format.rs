//! EROFS on disk: where fields are, in the one form that [`super::write()`] makes. Little endian.

/// Blocks of the image and of the data file.
pub(super) const BLOCK: u64 = 512;
pub(super) const BLOCK_BITS: u8 = 9;

pub(super) const MAGIC: u32 = 0xE0F5_E1E2;
pub(super) const SUPER_AT: usize = 1024;
/// "Inodes have their own times".
pub(super) const COMPAT_MTIME: u32 = 0x2;
/// Chunk-based files, and a device table.
pub(super) const INCOMPAT: u32 = 0x4 | 0x8;
/// Says who made the image; the same for all.
pub(super) const UUID: [u8; 16] = *b"skimmer layer v1";

/// The device table: slots of 128 bytes, ours is slot 9.
pub(super) const DEVICE_SLOT: u16 = 9;
pub(super) const DEVICE_AT: usize = 9 * 128;

/// Inodes are named by their offset in units of 32 bytes.
pub(super) const SLOT: u64 = 32;
pub(super) const ROOT_AT: u64 = 1280;
pub(super) const ROOT: Nid = Nid(ROOT_AT / SLOT);

/// An extended inode, without what follows it.
pub(super) const INODE_LEN: usize = 64;
pub(super) const DIRENT_LEN: usize = 12;
pub(super) const CHUNK_LEN: usize = 8;
pub(super) const XATTR_HEADER_LEN: usize = 12;
pub(super) const XATTR_ENTRY_LEN: usize = 4;
pub(super) const MAX_NAME: usize = 255;
/// Without the NUL that the kernel adds.
pub(super) const MAX_SYMLINK: u64 = 4095;

/// i_format: bit 0 says "extended", the layout is above it.
pub(super) const PLAIN: u16 = 1;
pub(super) const INLINE: u16 = 2 << 1 | 1;
pub(super) const CHUNKED: u16 = 4 << 1 | 1;
/// Chunk format: indexes of 8 bytes; the low five bits are the chunk's bits above the block's.
pub(super) const CHUNK_INDEXES: u16 = 0x20;
pub(super) const MAX_CHUNK_BITS: u16 = 31;
/// Chunks that say that nothing is stored.
pub(super) const HOLE: u32 = u32::MAX;
/// The external device, counted from 1.
pub(super) const DEVICE: u16 = 1;

/// Prefixes of extended attributes by their index. A whole name counts as a prefix.
pub(super) const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// Whether a prefix stands for the whole name.
pub(super) fn is_whole_name(index: u8) -> bool {
    matches!(index, 2 | 3)
}

/// Names an inode of one image; FUSE and the kernel use it as inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nid(pub u64);

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    File,
    Dir,
    CharDevice,
    BlockDevice,
    Fifo,
    Symlink,
}

impl FileKind {
    /// As in a directory entry.
    pub(super) fn dirent(self) -> u8 {
        match self {
            Self::File => 1,
            Self::Dir => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Symlink => 7,
        }
    }

    pub(super) fn from_dirent(byte: u8) -> Option<Self> {
        let all =
            [Self::File, Self::Dir, Self::CharDevice, Self::BlockDevice, Self::Fifo, Self::Symlink];
        all.into_iter().find(|kind| kind.dirent() == byte)
    }

    /// The file type bits of stat(2)'s `st_mode`.
    pub fn mode_bits(self) -> u16 {
        match self {
            Self::File => 0o100_000,
            Self::Dir => 0o040_000,
            Self::CharDevice => 0o020_000,
            Self::BlockDevice => 0o060_000,
            Self::Fifo => 0o010_000,
            Self::Symlink => 0o120_000,
        }
    }

    pub(super) fn from_mode(mode: u16) -> Option<Self> {
        let all =
            [Self::File, Self::Dir, Self::CharDevice, Self::BlockDevice, Self::Fifo, Self::Symlink];
        all.into_iter().find(|kind| kind.mode_bits() == mode & 0o170_000)
    }
}

/// A device number as Linux keeps it in 32 bits: 12 bits major, 20 bits minor.
pub(super) fn device_number(major: u32, minor: u32) -> Option<u32> {
    if major >= 1 << 12 || minor >= 1 << 20 {
        return None;
    }
    Some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// The image up to the root: superblock and device table, of which little varies. Lengths are
/// multiples of [`BLOCK`] below 2³² blocks.
pub(super) fn head(inodes: u64, image_len: u64, data_len: u64) -> Vec<u8> {
    let blocks = |len: u64| u32::try_from(len / BLOCK).unwrap_or(u32::MAX).to_le_bytes();
    let root = u16::try_from(ROOT.0).unwrap_or(u16::MAX);
    let fields: [(usize, &[u8]); 11] = [
        (SUPER_AT, &MAGIC.to_le_bytes()),
        (SUPER_AT + 8, &COMPAT_MTIME.to_le_bytes()),
        (SUPER_AT + 12, &[BLOCK_BITS]),
        (SUPER_AT + 14, &root.to_le_bytes()),
        (SUPER_AT + 16, &inodes.to_le_bytes()),
        (SUPER_AT + 36, &blocks(image_len)),
        (SUPER_AT + 48, &UUID),
        (SUPER_AT + 80, &INCOMPAT.to_le_bytes()),
        (SUPER_AT + 86, &DEVICE.to_le_bytes()),
        (SUPER_AT + 88, &DEVICE_SLOT.to_le_bytes()),
        (DEVICE_AT + 64, &blocks(data_len)),
    ];
    let mut head = vec![0; DEVICE_AT + 128];
    for (at, value) in fields {
        head[at..at + value.len()].copy_from_slice(value);
    }
    head
}

/// Bytes of an inode with its attributes, up to what follows: `entries` are the attributes' bytes.
pub(super) fn body_len(xattr_bytes: usize) -> usize {
    INODE_LEN + if xattr_bytes == 0 { 0 } else { XATTR_HEADER_LEN + xattr_bytes }
}

/// `bytes` at `at`, if they have that many.
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}
