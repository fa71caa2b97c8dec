//! eStargz: gzip members, the last but one holding a tar entry with the TOC, the last one, empty,
//! holding the offset of that in its extra field.

use super::{Error, Format, Place};
use crate::tar::{Entry, Extent, Kind, Limits, TarWalk};

const TOC_NAME: &[u8] = b"stargz.index.json";

/// The last member from its header's flags on, the offset's 16 digits aside: with the subfield that
/// RFC 1952 wants, and without, as the original stargz had it.
const FOOTERS: [(usize, &[u8]); 2] = [(51, b"\x1a\0SG\x16\0"), (47, b"\x16\0")];
const FIXED_LEN: usize = 10;
const END: &[u8] = b"STARGZ\x01\0\0\xff\xff\0\0\0\0\0\0\0\0";

pub(super) fn find(tail: &[u8], blob_len: u64) -> Option<Place> {
    FOOTERS.iter().find_map(|(len, extra)| {
        let footer = tail.get(tail.len().checked_sub(*len)?..)?;
        let (fixed, rest) = footer.split_at_checked(FIXED_LEN)?;
        // Magic, deflate, an extra field only.
        if !fixed.starts_with(b"\x1f\x8b\x08\x04") {
            return None;
        }
        let (digits, end) = rest.strip_prefix(*extra)?.split_at_checked(16)?;
        if end != END || !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        let start = u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        let end = blob_len.checked_sub(*len as u64)?;
        (start < end).then_some(Place { format: Format::Estargz, blob: start..end })
    })
}

/// The contents of the tar's entry that is the TOC, and the entry.
pub(super) fn json(tar: &[u8]) -> Result<(Vec<u8>, Entry), Error> {
    let mut found = None;
    let mut walk = TarWalk::new(Limits::default());
    walk.push(tar, &mut |entry| {
        if entry.path == TOC_NAME && entry.kind == Kind::File {
            found = Some(entry);
        }
        Ok(())
    })
    .map_err(|source| Error::Tar { source })?;
    walk.finish().map_err(|source| Error::Tar { source })?;
    let entry = found.ok_or(Error::NoToc)?;
    // Exactly one extent: its tools write no sparse file.
    let [Extent { logical: 0, len, at }] = entry.data[..] else { return Err(Error::NoToc) };
    let (Ok(start), Ok(len)) = (usize::try_from(at), usize::try_from(len)) else {
        return Err(Error::NoToc);
    };
    let end = start.checked_add(len).ok_or(Error::NoToc)?;
    let json = tar.get(start..end).ok_or(Error::NoToc)?.to_vec();
    Ok((json, entry))
}
