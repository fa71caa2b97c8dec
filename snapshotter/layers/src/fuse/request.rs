//! Requests of `/dev/fuse`, written down so that they can be read again as if the kernel had sent them. Pure.
//!
//! The layouts are those of the kernel's `linux/fuse.h`: a `fuse_in_header` of 40 bytes, and what the operation adds to
//! it. What no answer of ours depends on (who asks, handles, flags) is zero.

use super::device::MAX_READ;

/// `struct fuse_in_header`.
const HEADER_BYTES: usize = 40;

/// Longest name of a file or an attribute that is written down: as long as one in a layer can be.
const NAME_BYTES: usize = 255;

/// Longest request: a `fuse_getxattr_in`, and a name with its NUL.
pub const MAX_BYTES: usize = HEADER_BYTES + 8 + NAME_BYTES + 1;

/// Smallest room that the kernel gives for entries of a directory; fuser doesn't tell how much it gave.
const ENTRIES_BYTES: u32 = 4096;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const READLINK: u32 = 5;
const OPEN: u32 = 14;
const READ: u32 = 15;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const FLUSH: u32 = 25;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const FSYNCDIR: u32 = 30;
const DESTROY: u32 = 38;
const IOCTL: u32 = 39;
const POLL: u32 = 40;
const READDIRPLUS: u32 = 44;
const LSEEK: u32 = 46;

/// What is asked of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    Lookup { name: &'a [u8] },
    GetAttr,
    ReadLink,
    Open,
    OpenDir,
    Read { offset: u64, size: u32 },
    ReadDir { offset: u64 },
    ReadDirPlus { offset: u64 },
    StatFs,
    GetXattr { name: &'a [u8], size: u32 },
    ListXattr { size: u32 },
    Release,
    ReleaseDir,
    Flush,
    FSync,
    FSyncDir,
    LSeek,
    IoCtl,
    Poll,
}

impl Operation<'_> {
    const fn code(&self) -> u32 {
        match self {
            Self::Lookup { .. } => LOOKUP,
            Self::GetAttr => GETATTR,
            Self::ReadLink => READLINK,
            Self::Open => OPEN,
            Self::OpenDir => OPENDIR,
            Self::Read { .. } => READ,
            Self::ReadDir { .. } => READDIR,
            Self::ReadDirPlus { .. } => READDIRPLUS,
            Self::StatFs => STATFS,
            Self::GetXattr { .. } => GETXATTR,
            Self::ListXattr { .. } => LISTXATTR,
            Self::Release => RELEASE,
            Self::ReleaseDir => RELEASEDIR,
            Self::Flush => FLUSH,
            Self::FSync => FSYNC,
            Self::FSyncDir => FSYNCDIR,
            Self::LSeek => LSEEK,
            Self::IoCtl => IOCTL,
            Self::Poll => POLL,
        }
    }

    const fn name(&self) -> Option<&[u8]> {
        match self {
            Self::Lookup { name } | Self::GetXattr { name, .. } => Some(name),
            _ => None,
        }
    }
}

/// Length of what stands between the header and the name of operation `code`, and whether there is a name; `None` if it
/// isn't one that is written down.
const fn shape(code: u32) -> Option<(usize, bool)> {
    Some(match code {
        LOOKUP => (0, true),
        READLINK | STATFS => (0, false),
        OPEN | OPENDIR | LISTXATTR => (8, false),
        GETXATTR => (8, true),
        GETATTR | FSYNC | FSYNCDIR => (16, false),
        RELEASE | RELEASEDIR | FLUSH | LSEEK | POLL => (24, false),
        IOCTL => (32, false),
        READ | READDIR | READDIRPLUS => (40, false),
        _ => return None,
    })
}

/// A request in the kernel's encoding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    bytes: [u8; MAX_BYTES],
    len: usize,
}

impl Request {
    /// `None`: the name is too long to be one in a layer.
    pub fn new(unique: u64, node: u64, operation: &Operation<'_>) -> Option<Self> {
        let (fixed, _) = shape(operation.code())?;
        let name = operation.name().filter(|name| name.len() <= NAME_BYTES);
        if name.is_none() && operation.name().is_some() {
            return None;
        }
        let len = HEADER_BYTES + fixed + name.map_or(0, |name| name.len() + 1);
        let mut request = Self { bytes: [0; MAX_BYTES], len };
        request.put(0, &u32::try_from(len).ok()?.to_ne_bytes());
        request.put(4, &operation.code().to_ne_bytes());
        request.put(8, &unique.to_ne_bytes());
        request.put(16, &node.to_ne_bytes());
        if let Some(name) = name {
            request.put(HEADER_BYTES + fixed, name);
        }
        match *operation {
            Operation::Read { offset, size } => request.put_range(offset, size),
            Operation::ReadDir { offset } | Operation::ReadDirPlus { offset } => {
                request.put_range(offset, ENTRIES_BYTES);
            }
            Operation::GetXattr { size, .. } | Operation::ListXattr { size } => {
                request.put(HEADER_BYTES, &size.to_ne_bytes());
            }
            _ => {}
        }
        Some(request)
    }

    /// The request at the beginning of `bytes`, if [`Request::new`] could have made it, or the kernel in its place.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let len = usize::try_from(word(0)?).ok()?;
        let (fixed, named) = shape(word(4)?)?;
        let name = bytes.get(HEADER_BYTES + fixed..len)?;
        let fits = match name.split_last() {
            Some((end, name)) => {
                named && *end == 0 && name.len() <= NAME_BYTES && !name.contains(&0)
            }
            None => !named,
        };
        let mut request = Self { bytes: [0; MAX_BYTES], len };
        request.put(0, bytes.get(..len).filter(|_| fits)?);
        if matches!(request.word(4), READDIR | READDIRPLUS) {
            let size = request.word(HEADER_BYTES + 16).min(ENTRIES_BYTES);
            request.put(HEADER_BYTES + 16, &size.to_ne_bytes());
        }
        let is_small = request.read().is_none_or(|(_, size)| size <= MAX_READ);
        (is_small && request.unique() != 0 && request.node() != 0).then_some(request)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The kernel's number for it.
    pub fn unique(&self) -> u64 {
        self.long(8)
    }

    /// The inode that it is about.
    pub fn node(&self) -> u64 {
        self.long(16)
    }

    /// Offset and size, if it asks for bytes of a file.
    pub fn read(&self) -> Option<(u64, u32)> {
        let is_read = self.word(4) == READ;
        is_read.then(|| (self.long(HEADER_BYTES + 8), self.word(HEADER_BYTES + 16)))
    }

    /// `offset` and `size` in a `fuse_read_in`.
    fn put_range(&mut self, offset: u64, size: u32) {
        self.put(HEADER_BYTES + 8, &offset.to_ne_bytes());
        self.put(HEADER_BYTES + 16, &size.to_ne_bytes());
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&self, at: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_ne_bytes(word)
    }

    fn long(&self, at: usize) -> u64 {
        let mut long = [0; 8];
        long.copy_from_slice(&self.bytes[at..at + 8]);
        u64::from_ne_bytes(long)
    }
}

/// `struct fuse_out_header` of an answer to request `unique` of which `len` bytes follow, or an error.
pub fn answer(unique: u64, result: Result<usize, fuser::Errno>) -> [u8; 16] {
    let (len, error) = match result {
        Ok(len) => (len, 0),
        Err(errno) => (0, -errno.code()),
    };
    let mut header = [0; 16];
    let len = u32::try_from(header.len() + len).unwrap_or(u32::MAX);
    header[..4].copy_from_slice(&len.to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// The number of the request that `answer`, whole, is to.
pub fn answered(answer: &[u8]) -> Option<u64> {
    let (len, rest) = answer.split_first_chunk::<4>()?;
    let (unique, _) = rest.get(4..)?.split_first_chunk::<8>()?;
    let is_whole = usize::try_from(u32::from_ne_bytes(*len)).is_ok_and(|len| len == answer.len());
    is_whole.then(|| u64::from_ne_bytes(*unique))
}

/// `FUSE_DESTROY`: there is nothing more to ask.
pub fn farewell() -> [u8; HEADER_BYTES] {
    let (len, unique) = (40u32, 1u64);
    let mut message = [0; HEADER_BYTES];
    message[..4].copy_from_slice(&len.to_ne_bytes());
    message[4..8].copy_from_slice(&DESTROY.to_ne_bytes());
    message[8..16].copy_from_slice(&unique.to_ne_bytes());
    message
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::*;

    /// The bytes of a request, field by field.
    fn laid_out(code: u32, unique: u64, node: u64, body: &[&[u8]]) -> Vec<u8> {
        let body = body.concat();
        let len = u32::try_from(40 + body.len()).unwrap();
        let header = [&len.to_ne_bytes()[..], &code.to_ne_bytes(), &unique.to_ne_bytes()].concat();
        [&header[..], &node.to_ne_bytes(), &[0; 16], &body].concat()
    }

    #[test]
    fn requests_are_laid_out_as_the_kernel_lays_them_out() {
        let size = 131_072u32;
        let offset = 1u64 << 40;
        let read = |size: u32| {
            [&[0; 8][..], &offset.to_ne_bytes(), &size.to_ne_bytes(), &[0; 20]].concat()
        };
        let sized = [&size.to_ne_bytes()[..], &[0; 4]].concat();
        for (operation, code, body) in [
            (Operation::Lookup { name: b"etc" }, 1, &[&b"etc\0"[..]][..]),
            (Operation::GetAttr, 3, &[&[0; 16]]),
            (Operation::ReadLink, 5, &[]),
            (Operation::Open, 14, &[&[0; 8]]),
            (Operation::Read { offset, size }, 15, &[&read(size)]),
            (Operation::StatFs, 17, &[]),
            (Operation::Release, 18, &[&[0; 24]]),
            (Operation::FSync, 20, &[&[0; 16]]),
            (Operation::GetXattr { name: b"user.a", size }, 22, &[&sized, b"user.a\0"]),
            (Operation::ListXattr { size }, 23, &[&sized]),
            (Operation::Flush, 25, &[&[0; 24]]),
            (Operation::OpenDir, 27, &[&[0; 8]]),
            (Operation::ReadDir { offset }, 28, &[&read(4096)]),
            (Operation::ReleaseDir, 29, &[&[0; 24]]),
            (Operation::FSyncDir, 30, &[&[0; 16]]),
            (Operation::IoCtl, 39, &[&[0; 32]]),
            (Operation::Poll, 40, &[&[0; 24]]),
            (Operation::ReadDirPlus { offset }, 44, &[&read(4096)]),
            (Operation::LSeek, 46, &[&[0; 24]]),
        ] {
            let request = Request::new(34, 7, &operation).unwrap();
            assert_eq!(request.bytes(), laid_out(code, 34, 7, body), "{operation:?}");
            assert_eq!((request.unique(), request.node()), (34, 7));
            let range = (code == 15).then_some((offset, size));
            assert_eq!(request.read(), range, "{operation:?}");
            // What follows is what a longer one has left.
            let longer = [request.bytes(), b"rest"].concat();
            assert_eq!(Request::parse(&longer).as_ref(), Some(&request), "{operation:?}");
            assert_eq!(Request::parse(&request.bytes()[..request.len - 1]), None, "{operation:?}");
        }
    }

    #[test]
    fn names_are_as_long_as_a_layer_has_them() {
        let name = [b'x'; 256];
        let lookup = |len| Request::new(2, 1, &Operation::Lookup { name: &name[..len] });
        assert_eq!(lookup(255).unwrap().bytes().len(), 40 + 256);
        assert_eq!(lookup(256), None);
        let longest = Request::new(2, 1, &Operation::GetXattr { name: &name[..255], size: 1 });
        assert_eq!(longest.unwrap().bytes().len(), MAX_BYTES);
    }

    #[test]
    fn what_nobody_wrote_is_no_request() {
        let wrong = |code, unique, node, body: &[&[u8]]| laid_out(code, unique, node, body);
        for bytes in [
            vec![],
            vec![0; MAX_BYTES],
            vec![255; MAX_BYTES],
            wrong(1, 2, 1, &[]),
            wrong(1, 2, 1, &[b"unended"]),
            wrong(1, 2, 1, &[b"two\0names\0"]),
            wrong(1, 2, 1, &[&[b'x'; 256], b"\0"]),
            wrong(1, 0, 1, &[b"x\0"]),
            wrong(1, 2, 0, &[b"x\0"]),
            wrong(15, 2, 1, &[&[0; 39]]),
            wrong(15, 2, 1, &[&[0; 16], &(MAX_READ + 1).to_ne_bytes(), &[0; 20]]),
            wrong(15, 2, 1, &[&[0; 41]]),
            wrong(26, 2, 1, &[&[0; 64]]),
            wrong(38, 2, 1, &[]),
        ] {
            assert_eq!(Request::parse(&bytes), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn anything_is_a_request_as_it_stands_or_none(
            code in 0..50u32, len in 0..400u32, rest in proptest::collection::vec(any::<u8>(), 0..400)
        ) {
            let bytes = [&len.to_ne_bytes()[..], &code.to_ne_bytes(), &rest].concat();
            if let Some(request) = Request::parse(&bytes) {
                // Of directories it asks for less.
                let same = if matches!(code, READDIR | READDIRPLUS) { 56 } else { len as usize };
                prop_assert_eq!(&request.bytes()[..same], &bytes[..same]);
            }
        }
    }

    #[test]
    fn answers_begin_as_the_kernel_expects() {
        let expected = [&20u32.to_ne_bytes()[..], &0i32.to_ne_bytes(), &6u64.to_ne_bytes()];
        assert_eq!(answer(6, Ok(4))[..], expected.concat());
        let expected = [&16u32.to_ne_bytes()[..], &(-5i32).to_ne_bytes(), &6u64.to_ne_bytes()];
        assert_eq!(answer(6, Err(fuser::Errno::EIO))[..], expected.concat());
        assert_eq!(answered(&expected.concat()), Some(6));
        assert_eq!(answered(&[&expected.concat()[..], b"x"].concat()), None);
        assert_eq!(answered(b""), None);
    }
}
