//! Writing and reading an encoded layer index: see [`LayerIndex`] for the format.
//!
//! What is read is taken for hostile: every length is checked before it is used, and no more memory
//! is taken than what really decompresses, up to each section's
//! maximum.

use std::io::Read;
use std::ops::Range;

use super::{LayerIndex, Layout};
use crate::chunk::{Chunk, State};
use crate::codec::Compression;
use crate::erofs::Copy;

const MAGIC: &[u8; 8] = b"SKINDEX1";
const HEADER_LEN: usize = 40 + 4 * 16;

/// Most bytes of the EROFS image: enough for some four million files.
const MAX_INODES: u64 = 1 << 30;

/// Most bytes of a section of columns, decompressed: enough for a million chunks, a layer of 1 TiB. In
/// memory a number takes up to eight times the space, a chunk some more.
const MAX_COLUMNS: u64 = 16 << 20;

/// The longest data file: 16 TiB, what ext4 can hold. Keeps sums of offsets far from overflow.
pub(crate) const MAX_DATA_LEN: u64 = 16 << 40;

/// zstd's level for the sections. Part of the index format. Level 9 makes the index 5 % smaller and its build 5 % dearer.
const LEVEL: i32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("compress the {section} of a layer index")]
    Compress { section: &'static str, source: std::io::Error },
    #[error("the {section} of a layer index are {len} bytes, more than {max}")]
    TooLarge { section: &'static str, len: u64, max: u64 },
    #[error("layer index is {actual} bytes, expected {expected}")]
    Length { actual: u64, expected: u64 },
    #[error("not a layer index of version 1: unknown magic number")]
    Magic,
    #[error("layer index has an invalid header: {0}")]
    Header(&'static str),
    #[error("decompress the {section} of a layer index")]
    Decompress { section: &'static str, source: std::io::Error },
    #[error("the {section} of a layer index are {actual} bytes, declared {declared}")]
    SectionLength { section: &'static str, actual: u64, declared: u64 },
    #[error("layer index, {section}: cut short or too long, or a number too large")]
    Columns { section: &'static str },
    #[error("layer index, chunk {chunk}: {reason}")]
    Chunk { chunk: usize, reason: &'static str },
    #[error("layer index, copy {copy}: {reason}")]
    Copy { copy: usize, reason: &'static str },
}

impl LayerIndex {
    /// The index's bytes. Fails only if a section is larger than a reader would accept.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let (chunks, copies) = (chunk_columns(&self.chunks), copy_columns(&self.copies));
        let sections =
            [pack(INODES, &self.inodes)?, pack(CHUNKS, &chunks)?, pack(COPIES, &copies)?];
        let plain = [&self.inodes, &chunks, &copies, &self.windows];
        let [inodes, chunks, copies] = &sections;
        let packed = [inodes, chunks, copies, &self.windows];
        let mut out =
            Vec::with_capacity(HEADER_LEN + packed.iter().map(|s| s.len()).sum::<usize>());
        out.extend_from_slice(MAGIC);
        out.push(match self.compression {
            Compression::Stored => 0,
            Compression::Gzip => 1,
            Compression::Zstd => 2,
        });
        out.push(match self.layout {
            Layout::Tar => 0,
            Layout::Toc => 1,
        });
        out.extend_from_slice(&[0; 6]);
        for len in [self.blob_len, self.tar_len, self.data_len] {
            out.extend_from_slice(&len.to_le_bytes());
        }
        for (packed, plain) in packed.iter().zip(plain) {
            out.extend_from_slice(&(packed.len() as u64).to_le_bytes());
            out.extend_from_slice(&(plain.len() as u64).to_le_bytes());
        }
        for section in packed {
            out.extend_from_slice(section);
        }
        Ok(out)
    }

    /// Reads an index from outside. The inodes are only bounded here; see [`crate::erofs`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let short = Error::Length { actual: bytes.len() as u64, expected: HEADER_LEN as u64 };
        let (header, rest) = bytes.split_at_checked(HEADER_LEN).ok_or(short)?;
        let (magic, fields) = header.split_at(8);
        if magic != MAGIC {
            return Err(Error::Magic);
        }
        let [compression, layout, reserved @ ..] = fields else {
            return Err(Error::Header("cut short"));
        };
        let compression = match compression {
            0 => Compression::Stored,
            1 => Compression::Gzip,
            2 => Compression::Zstd,
            _ => return Err(Error::Header("unknown compression")),
        };
        let layout = match layout {
            0 => Layout::Tar,
            1 => Layout::Toc,
            _ => return Err(Error::Header("unknown layout")),
        };
        if reserved[..6] != [0; 6] {
            return Err(Error::Header("reserved bytes are not zero"));
        }
        let numbers: Vec<u64> =
            reserved[6..].as_chunks::<8>().0.iter().map(|n| u64::from_le_bytes(*n)).collect();
        let [blob_len, tar_len, data_len, lens @ ..] = &numbers[..] else {
            return Err(Error::Header("cut short"));
        };
        let (blob_len, tar_len, data_len) = (*blob_len, *tar_len, *data_len);
        if blob_len > MAX_DATA_LEN || data_len > MAX_DATA_LEN {
            return Err(Error::Header("the blob or its data is too long"));
        }
        if data_len < tar_len || !data_len.is_multiple_of(512) {
            return Err(Error::Header(
                "the data file is shorter than the tar, or not whole blocks",
            ));
        }
        let [inodes, chunks, copies, windows] = split(rest, lens)?;
        let windows = plain(&windows)?;
        let shape = Shape { compression, layout, blob_len, tar_len, windows: windows.len() };
        let chunks = read_chunks(&unpack(CHUNKS, &chunks)?, &shape)?;
        let copies = read_copies(&unpack(COPIES, &copies)?, tar_len, data_len)?;
        let inodes = unpack(INODES, &inodes)?;
        Ok(Self {
            compression,
            layout,
            blob_len,
            tar_len,
            data_len,
            inodes,
            copies,
            chunks,
            windows,
        })
    }
}

struct Section<'a> {
    bytes: &'a [u8],
    plain_len: u64,
}

/// The sections, which must fill `rest` exactly.
fn split<'a>(mut rest: &'a [u8], lens: &[u64]) -> Result<[Section<'a>; 4], Error> {
    let total = lens.as_chunks::<2>().0.iter().fold(0u64, |sum, [len, _]| sum.saturating_add(*len));
    if total != rest.len() as u64 {
        let actual = (rest.len() + HEADER_LEN) as u64;
        return Err(Error::Length { actual, expected: total.saturating_add(HEADER_LEN as u64) });
    }
    let mut next = |lens: &[u64; 2]| {
        let [len, plain_len] = *lens;
        let (bytes, behind) = rest.split_at(usize::try_from(len).unwrap_or(0).min(rest.len()));
        rest = behind;
        Section { bytes, plain_len }
    };
    match lens.as_chunks::<2>().0 {
        [a, b, c, d] => Ok([next(a), next(b), next(c), next(d)]),
        _ => Err(Error::Header("cut short")),
    }
}

/// A section that is compressed: its name, and most bytes decompressed.
type Kind = (&'static str, u64);
const INODES: Kind = ("inodes", MAX_INODES);
const CHUNKS: Kind = ("chunks", MAX_COLUMNS);
const COPIES: Kind = ("copies", MAX_COLUMNS);

fn pack((section, max): Kind, bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let len = bytes.len() as u64;
    if len > max {
        return Err(Error::TooLarge { section, len, max });
    }
    zstd::bulk::compress(bytes, LEVEL).map_err(|source| Error::Compress { section, source })
}

fn unpack((section, max): Kind, from: &Section<'_>) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Decompress { section, source };
    let declared = from.plain_len;
    if declared > max {
        return Err(Error::TooLarge { section, len: declared, max });
    }
    let decoder = zstd::Decoder::with_buffer(from.bytes).map_err(failed)?.single_frame();
    let mut bytes = Vec::new();
    // One more than declared, so that a longer section shows.
    decoder.take(declared + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 != declared {
        return Err(Error::SectionLength { section, actual: bytes.len() as u64, declared });
    }
    Ok(bytes)
}

fn plain(from: &Section<'_>) -> Result<Vec<u8>, Error> {
    let section = "windows";
    let (actual, declared) = (from.bytes.len() as u64, from.plain_len);
    if actual != declared {
        return Err(Error::SectionLength { section, actual, declared });
    }
    Ok(from.bytes.to_vec())
}

fn chunk_columns(chunks: &[Chunk]) -> Vec<u8> {
    let mut out = Vec::new();
    let previous = |i: usize| i.checked_sub(1).map(|i| &chunks[i]);
    put(&mut out, chunks.len() as u64);
    for (i, chunk) in chunks.iter().enumerate() {
        put(&mut out, chunk.data.start - previous(i).map_or(0, |c| c.data.end));
    }
    chunks.iter().for_each(|c| put(&mut out, c.data.end - c.data.start));
    for (i, chunk) in chunks.iter().enumerate() {
        put_signed(&mut out, chunk.blob.start, previous(i).map_or(0, |c| c.blob.end));
    }
    chunks.iter().for_each(|c| put(&mut out, c.blob.end - c.blob.start));
    for chunk in chunks {
        match &chunk.state {
            State::Gzip { window: None, .. } => put(&mut out, 0),
            State::Gzip { bit, window: Some(_) } => put(&mut out, 1 + u64::from(*bit)),
            State::Stored | State::ZstdFrame => {}
        }
    }
    for chunk in chunks {
        if let State::Gzip { window: Some(window), .. } = &chunk.state {
            put(&mut out, u64::from(window.end - window.start));
        }
    }
    out
}

/// What chunks are checked against.
struct Shape {
    compression: Compression,
    layout: Layout,
    blob_len: u64,
    tar_len: u64,
    windows: usize,
}

fn read_chunks(bytes: &[u8], shape: &Shape) -> Result<Vec<Chunk>, Error> {
    let mut columns = Columns { section: "chunks", bytes };
    let count = columns.count()?;
    let gaps = columns.take(count)?;
    let lens = columns.take(count)?;
    let starts = columns.take(count)?;
    let blob_lens = columns.take(count)?;
    let gzip = shape.compression == Compression::Gzip;
    let entries = columns.take(if gzip { count } else { 0 })?;
    let windows = columns.take(entries.iter().filter(|entry| **entry > 0).count())?;
    columns.end()?;
    let mut windows = windows.into_iter();
    let mut window_at = 0u32;
    let (mut data_at, mut blob_at, mut blob_start) = (0u64, 0u64, 0u64);
    let mut chunks = Vec::with_capacity(count);
    for chunk in 0..count {
        let invalid = |reason| Error::Chunk { chunk, reason };
        let data = span(data_at.checked_add(gaps[chunk]), lens[chunk], shape.tar_len)
            .ok_or(invalid("its data is empty or outside the layer's"))?;
        let blob = span(signed(blob_at, starts[chunk]), blob_lens[chunk], shape.blob_len)
            .ok_or(invalid("its compressed bytes are none or outside the blob"))?;
        if blob.start < blob_start {
            return Err(invalid("its compressed bytes start before the previous chunk's"));
        }
        if shape.layout == Layout::Tar && gaps[chunk] != 0 {
            return Err(invalid("its data doesn't start where the previous chunk's ends"));
        }
        let state = match shape.compression {
            Compression::Stored if data.end - data.start != blob.end - blob.start => {
                return Err(invalid("it isn't compressed, yet its lengths differ"));
            }
            Compression::Stored => State::Stored,
            Compression::Zstd => State::ZstdFrame,
            Compression::Gzip if entries[chunk] == 0 => State::Gzip { bit: 0, window: None },
            Compression::Gzip => {
                let bit = u8::try_from(entries[chunk] - 1).ok().filter(|bit| *bit < 8);
                let bit = bit.ok_or(invalid("its first bit isn't within a byte"))?;
                let len = windows.next().and_then(|len| u32::try_from(len).ok());
                let end = len.and_then(|len| window_at.checked_add(len));
                let end = end.ok_or(invalid("its window is outside the windows"))?;
                let window = std::mem::replace(&mut window_at, end)..end;
                State::Gzip { bit, window: Some(window) }
            }
        };
        (data_at, blob_at, blob_start) = (data.end, blob.end, blob.start);
        chunks.push(Chunk { data, blob, state });
    }
    if shape.layout == Layout::Tar && data_at != shape.tar_len {
        return Err(Error::Header("the chunks don't cover the tar"));
    }
    if u64::from(window_at) != shape.windows as u64 {
        return Err(Error::Header("the windows belong to no chunk"));
    }
    Ok(chunks)
}

fn copy_columns(copies: &[Copy]) -> Vec<u8> {
    let mut out = Vec::new();
    let previous = |i: usize| i.checked_sub(1).map(|i| &copies[i]);
    put(&mut out, copies.len() as u64);
    for (i, copy) in copies.iter().enumerate() {
        put_signed(&mut out, copy.from, previous(i).map_or(0, |c| c.from + c.len));
    }
    for (i, copy) in copies.iter().enumerate() {
        put(&mut out, copy.to - previous(i).map_or(0, |c| c.to + c.len));
    }
    copies.iter().for_each(|c| put(&mut out, c.len));
    out
}

fn read_copies(bytes: &[u8], tar_len: u64, data_len: u64) -> Result<Vec<Copy>, Error> {
    let mut columns = Columns { section: "copies", bytes };
    let count = columns.count()?;
    let froms = columns.take(count)?;
    let tos = columns.take(count)?;
    let lens = columns.take(count)?;
    columns.end()?;
    let (mut from_at, mut to_at) = (0, 0u64);
    let mut copies: Vec<Copy> = Vec::with_capacity(count);
    for copy in 0..count {
        let invalid = |reason| Error::Copy { copy, reason };
        let from = span(signed(from_at, froms[copy]), lens[copy], tar_len)
            .ok_or(invalid("its source is empty or outside the layer's data"))?;
        let to = span(to_at.checked_add(tos[copy]), lens[copy], data_len)
            .filter(|to| to.start >= tar_len)
            .ok_or(invalid("its target is outside the overflow area"))?;
        (from_at, to_at) = (from.end, to.end);
        copies.push(Copy { from: from.start, to: to.start, len: lens[copy] });
    }
    let mut sources: Vec<Range<u64>> = copies.iter().map(|c| c.from..c.from + c.len).collect();
    sources.sort_unstable_by_key(|source| source.start);
    match sources.windows(2).position(|pair| pair[0].end > pair[1].start) {
        Some(copy) => Err(Error::Copy { copy, reason: "its source overlaps another's" }),
        None => Ok(copies),
    }
}

/// `len` bytes from `start` on; none if that is empty or ends behind `limit`.
fn span(start: Option<u64>, len: u64, limit: u64) -> Option<Range<u64>> {
    let start = start?;
    let end = start.checked_add(len)?;
    (len > 0 && end <= limit).then_some(start..end)
}

fn put(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push((n & 0x7f) as u8 | 0x80);
        n >>= 7;
    }
    out.push((n & 0x7f) as u8);
}

/// `n - base`, zigzag-encoded; both are below 2^63.
fn put_signed(out: &mut Vec<u8>, n: u64, base: u64) {
    put(out, if n >= base { (n - base) << 1 } else { ((base - n) << 1) - 1 });
}

/// The inverse of [`put_signed`]; none if the result is negative or too large.
const fn signed(base: u64, n: u64) -> Option<u64> {
    if n & 1 == 0 { base.checked_add(n >> 1) } else { base.checked_sub((n >> 1) + 1) }
}

/// Reads columns of numbers.
struct Columns<'a> {
    section: &'static str,
    bytes: &'a [u8],
}

impl Columns<'_> {
    /// How many numbers each column has: not more than there are bytes.
    fn count(&mut self) -> Result<usize, Error> {
        let count = usize::try_from(self.number()?).ok().filter(|n| *n <= self.bytes.len());
        count.ok_or(Error::Columns { section: self.section })
    }

    fn take(&mut self, count: usize) -> Result<Vec<u64>, Error> {
        (0..count).map(|_| self.number()).collect()
    }

    fn number(&mut self) -> Result<u64, Error> {
        let mut n = 0u64;
        for shift in (0..63).step_by(7) {
            let (byte, rest) =
                self.bytes.split_first().ok_or(Error::Columns { section: self.section })?;
            self.bytes = rest;
            n |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(n);
            }
        }
        Err(Error::Columns { section: self.section })
    }

    const fn end(&self) -> Result<(), Error> {
        if self.bytes.is_empty() { Ok(()) } else { Err(Error::Columns { section: self.section }) }
    }
}
