//! The files of a TOC get their places: each at the next multiple of 512, in the TOC's order.

use std::ops::Range;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use skimmer_proto::Digest;

use super::entries::{TocEntry, each};
use super::{Error, Format, Found, OwnFile, Toc, time};
use crate::chunk::{Chunk, State};
use crate::codec::Compression;
use crate::index::MAX_DATA_LEN;
use crate::tar::{BLOCK, Entry, Extent, Kind, Limits, clean_path, display_path};
use crate::tree::TreeBuilder;

pub(super) fn lay_out(found: Found, blob_len: u64, limits: Limits) -> Result<Toc, Error> {
    let Found { place, json, file, .. } = found;
    let mut builder = Builder {
        format: place.format,
        limits: limits.clone(),
        tree: TreeBuilder::new(limits),
        entries: 0,
        at: 0,
        file: None,
        chunks: Vec::new(),
        digests: Vec::new(),
    };
    each(&json, &mut |entry| builder.entry(entry))?;
    builder.end_file()?;
    // A member or frame ends where the next begins, at the latest at the TOC.
    let mut end = place.blob.start;
    for chunk in builder.chunks.iter_mut().rev() {
        if chunk.blob.start >= end {
            return Err(Error::Order { at: chunk.blob.start });
        }
        chunk.blob.end = end;
        end = chunk.blob.start;
    }
    let own = match file {
        Some(file) => Some((builder.own_file(file, place.blob)?, Digest::of(&json))),
        None => None,
    };
    let Builder { tree, at: data_len, chunks, digests, .. } = builder;
    let tree = tree.finish().map_err(|source| Error::Tree { source })?;
    let compression = match place.format {
        Format::Estargz => Compression::Gzip,
        Format::ZstdChunked => Compression::Zstd,
    };
    Ok(Toc { tree, compression, blob_len, data_len, chunks, digests, own })
}

struct Builder {
    format: Format,
    limits: Limits,
    tree: TreeBuilder,
    entries: u64,
    /// Where the next file's data goes.
    at: u64,
    /// The file whose chunks are coming.
    file: Option<File>,
    chunks: Vec<Chunk>,
    /// SHA-256 of what each chunk decodes to.
    digests: Vec<Digest>,
}

struct File {
    entry: Entry,
    number: u64,
    /// Where its data goes, and how much of the file is accounted for.
    start: u64,
    done: u64,
}

impl Builder {
    fn entry(&mut self, entry: TocEntry) -> Result<(), Error> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(Error::TooManyEntries { limit: self.limits.entries });
        }
        if entry.kind == "chunk" {
            return match self.file.take() {
                Some(mut file) => {
                    self.chunk(&mut file, &entry)?;
                    self.file = Some(file);
                    Ok(())
                }
                None => Err(self.invalid(&entry, "a chunk of no file")),
            };
        }
        self.end_file()?;
        let file = self.convert(&entry)?;
        if file.kind != Kind::File {
            return self.insert(file, self.entries);
        }
        let mut file = File { entry: file, number: self.entries, start: self.at, done: 0 };
        if entry.size > 0 {
            self.chunk(&mut file, &entry)?;
        }
        self.file = Some(file);
        Ok(())
    }

    /// A file's next chunk.
    fn chunk(&mut self, file: &mut File, entry: &TocEntry) -> Result<(), Error> {
        let left = file.entry.size - file.done;
        let len = if entry.chunk_size == 0 { left } else { entry.chunk_size };
        if entry.chunk_offset != file.done || len == 0 || len > left {
            return Err(self.invalid(entry, "its chunks don't follow each other, or not its end"));
        }
        if entry.inner_offset != 0 {
            return Err(self.invalid(entry, "its data doesn't start with a member of its own"));
        }
        let at = file.start + file.done;
        if entry.chunk_type != "zeros" {
            file.entry.data.push(Extent { logical: file.done, len, at });
            let state = match self.format {
                Format::Estargz => State::Gzip { bit: 0, window: None },
                Format::ZstdChunked => State::ZstdFrame,
            };
            let whole = len == file.entry.size;
            let digest = match entry.chunk_digest.as_str() {
                "" if whole => &entry.digest,
                digest => digest,
            };
            let digest = digest.parse();
            let digest = digest.map_err(|_| self.invalid(entry, "a chunk has no SHA-256"))?;
            self.digests.push(digest);
            // Its end follows from the next chunk's start.
            let blob = entry.offset..entry.offset;
            self.chunks.push(Chunk { data: at..at + len, blob, state });
        }
        file.done += len;
        Ok(())
    }

    fn end_file(&mut self) -> Result<(), Error> {
        let Some(File { mut entry, number, start, done }) = self.file.take() else {
            return Ok(());
        };
        let name = display_path(&entry.path);
        if done != entry.size {
            return Err(Error::Entry { entry: number, name, reason: "chunks are missing" });
        }
        join(&mut entry.data);
        self.at = (start + done).next_multiple_of(BLOCK);
        self.insert(entry, number)
    }

    /// The TOC itself, in the member at `blob`. Returns where its contents go.
    fn own_file(&mut self, file: OwnFile, blob: Range<u64>) -> Result<u64, Error> {
        let OwnFile { mut entry, len, digest } = file;
        let start = self.at;
        self.at = (start + len).next_multiple_of(BLOCK);
        if self.at > MAX_DATA_LEN - BLOCK {
            let (entry, name) = (self.entries + 1, display_path(&entry.path));
            return Err(Error::Entry { entry, name, reason: "it is too large" });
        }
        let mut at = start;
        for extent in &mut entry.data {
            extent.at += start;
            at = extent.at;
        }
        let state = State::Gzip { bit: 0, window: None };
        self.chunks.push(Chunk { data: start..start + len, blob, state });
        self.digests.push(digest);
        self.insert(entry, self.entries + 1)?;
        Ok(at)
    }

    fn insert(&mut self, entry: Entry, number: u64) -> Result<(), Error> {
        let name = display_path(&entry.path);
        let placed = self.tree.insert(entry);
        placed.map_err(|source| Error::Place { entry: number, name, source })
    }

    fn convert(&self, entry: &TocEntry) -> Result<Entry, Error> {
        let invalid = |reason| self.invalid(entry, reason);
        let path = clean_path(entry.name.as_bytes());
        let depth = path.split(|byte| *byte == b'/').count();
        if path.len() > self.limits.path_bytes || depth > self.limits.depth {
            return Err(invalid("its path is too long or too deep"));
        }
        let target = entry.link_name.as_bytes();
        if target.len() > self.limits.path_bytes {
            return Err(invalid("its target is too long"));
        }
        let (major, minor) = (entry.dev_major, entry.dev_minor);
        let kind = match entry.kind.as_str() {
            "dir" => Kind::Dir,
            "reg" => Kind::File,
            "symlink" => Kind::Symlink { target: target.to_vec() },
            "hardlink" => Kind::HardLink { target: clean_path(target) },
            "char" => Kind::CharDevice { major, minor },
            "block" => Kind::BlockDevice { major, minor },
            "fifo" => Kind::Fifo,
            _ => return Err(invalid("its type is unknown")),
        };
        let size = if kind == Kind::File { entry.size } else { 0 };
        let fits = self.at.checked_add(size).is_some_and(|end| end <= MAX_DATA_LEN - BLOCK);
        if size > self.limits.data_bytes || !fits {
            return Err(invalid("it is too large"));
        }
        let mtime = match entry.modtime.as_deref() {
            None | Some("") => (0, 0),
            Some(text) => time::parse(text).ok_or(invalid("its time is not in RFC 3339"))?,
        };
        let mut xattrs = Vec::new();
        let mut xattr_bytes = 0;
        for (name, value) in entry.xattrs.iter().flatten() {
            let value = STANDARD.decode(value);
            let value = value.map_err(|_| invalid("an extended attribute is not base64"))?;
            xattr_bytes += name.len() + value.len();
            xattrs.push((name.clone().into_bytes(), value));
        }
        if xattr_bytes > self.limits.xattr_bytes {
            return Err(invalid("its extended attributes are too large"));
        }
        let mode = u32::try_from(entry.mode & 0o7777).unwrap_or(0);
        let TocEntry { uid, gid, .. } = *entry;
        Ok(Entry { path, kind, mode, uid, gid, mtime, xattrs, size, data: Vec::new() })
    }

    fn invalid(&self, entry: &TocEntry, reason: &'static str) -> Error {
        let name = entry.name.chars().take(200).collect();
        Error::Entry { entry: self.entries, name, reason }
    }
}

/// Extents that follow each other in the file and in the data become one.
fn join(extents: &mut Vec<Extent>) {
    extents.dedup_by(|next, extent| {
        let follows =
            extent.logical + extent.len == next.logical && extent.at + extent.len == next.at;
        if follows {
            extent.len += next.len;
        }
        follows
    });
}
