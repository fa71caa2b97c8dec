//! zstd:chunked: frames; the TOC, compressed, inside a skippable frame; a skippable frame as footer.
//!
//! The footer is 8 numbers of 8 bytes, little-endian: offset of the TOC (behind its frame's header),
//! its length, its decompressed length, its type (1), the same three of the "tar-split", magic. Old
//! blobs have no tar-split.

use super::{Format, MAX_TOC, Place};

const FRAME: &[u8] = &[0x50, 0x2a, 0x4d, 0x18];
const MAGIC: &[u8] = b"GnUlInUx";
const TOC_TYPE: u64 = 1;

pub(super) fn find(tail: &[u8], blob_len: u64) -> Option<Place> {
    [64u32, 40].iter().find_map(|len| {
        let footer_len = *len as usize;
        let footer = tail.get(tail.len().checked_sub(8 + footer_len)?..)?;
        let numbers = footer.strip_prefix(FRAME)?.strip_prefix(&len.to_le_bytes())?;
        let numbers = numbers.strip_suffix(MAGIC)?.as_chunks::<8>().0;
        let [start, packed, plain, kind, ..] = numbers else { return None };
        let [start, packed, plain, kind] =
            [start, packed, plain, kind].map(|number| u64::from_le_bytes(*number));
        let end = start.checked_add(packed)?;
        let inside = packed > 0 && end <= blob_len.checked_sub(footer.len() as u64)?;
        let known = kind == TOC_TYPE && plain <= MAX_TOC;
        (inside && known).then_some(Place { format: Format::ZstdChunked, blob: start..end })
    })
}
