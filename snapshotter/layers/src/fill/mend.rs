//! Chunks that are in the data file already: whether they are still right, and making them so in
//! place, where somebody may be reading them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use skimmer_cache::{Class, Spans as _};
use skimmer_index::erofs::Copy;
use skimmer_proto::PieceTable;
use tokio::runtime::Handle;

use super::{Error, Fill, copy_within};

/// Compared at a time.
const STEP_BYTES: usize = 256 << 10;

/// What became of a chunk that was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mended {
    /// The right bytes are in their place.
    Rewritten,
    /// It counts as absent: whoever reads it waits until it has been fetched.
    Forgotten,
}

impl Fill {
    /// Whether the blob's bytes of `chunk` are on disk and still match `table`. Blocks.
    pub fn has_source(&self, chunk: usize, table: &PieceTable) -> Result<bool, Error> {
        let range = self.index.chunks[chunk].blob.clone();
        self.blob.is_still_right(range, table).map_err(|source| Error::Fetch { chunk, source })
    }

    /// Whether what the data file has of `chunk`, which is there, is what the blob's bytes decode to.
    /// These must be on disk. Blocks.
    pub fn is_right(&self, chunk: usize) -> Result<bool, Error> {
        let _hold = self.data.hold();
        if !self.data.has(chunk) {
            return Ok(true);
        }
        let mut seen = Seen::new(self.data.file(), self.index.chunks[chunk].data.start, false);
        self.decode_into(chunk, &mut |bytes| seen.push(bytes))?;
        let read_failed = |source| Error::ReadData { chunk, source };
        let mut right = seen.finish().map_err(read_failed)?;
        for copy in self.index.copies_from(chunk) {
            right &= same_within(self.data.file(), copy).map_err(read_failed)?;
        }
        Ok(right)
    }

    /// `chunk` is wrong: no reader gets it any more as it is. Blocks, and may fetch.
    pub fn mend(
        &self,
        chunk: usize,
        table: &PieceTable,
        runtime: &Handle,
    ) -> Result<Mended, Error> {
        if self.has_source(chunk, table)? {
            self.rewrite(chunk)?;
            return Ok(Mended::Rewritten);
        }
        if self.distrust(&[chunk])? {
            return Ok(Mended::Forgotten);
        }
        // It may not go, because it is read without us: the right bytes have to come at once.
        runtime.block_on(self.fetch(chunk, Class::Fault))?;
        self.rewrite(chunk)?;
        Ok(Mended::Rewritten)
    }

    /// Any of `chunks` may be wrong: all of them count as absent from now on. False: they can't, because
    /// they are read without us. Readers wait meanwhile, once for all. Blocks.
    pub fn distrust(&self, chunks: &[usize]) -> Result<bool, Error> {
        let Some(first) = chunks.first() else { return Ok(true) };
        let chunks: Vec<_> = chunks.iter().map(|chunk| (*chunk, self.spans(*chunk))).collect();
        let failed = |source| Error::Write { chunk: *first, source: io::Error::other(source) };
        self.data.distrust(&chunks).map_err(failed)
    }

    /// Writes what differs. Where it doesn't, not even the same bytes: the kernel may be reading them.
    fn rewrite(&self, chunk: usize) -> Result<(), Error> {
        let _hold = self.data.hold();
        let failed = |source| Error::Write { chunk, source };
        let mut out = Seen::new(self.data.file(), self.index.chunks[chunk].data.start, true);
        self.decode_into(chunk, &mut |bytes| out.push(bytes))?;
        out.finish().map_err(failed)?;
        for copy in self.index.copies_from(chunk) {
            copy_within(self.data.file(), copy).map_err(failed)?;
        }
        self.data.file().sync_data().map_err(failed)
    }
}

/// Bytes that the disk can't give back any more are wrong bytes: false.
pub fn readable(read: io::Result<()>) -> io::Result<bool> {
    match read {
        Ok(()) => Ok(true),
        Err(error)
            if error.raw_os_error() == Some(libc::EIO)
                || error.kind() == io::ErrorKind::UnexpectedEof =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Compares what is pushed with what is in a file, from a place on, and puts it there if asked to.
struct Seen<'a> {
    file: &'a File,
    at: u64,
    write: bool,
    buffer: Vec<u8>,
    same: io::Result<bool>,
}

impl<'a> Seen<'a> {
    fn new(file: &'a File, at: u64, write: bool) -> Self {
        Self { file, at, write, buffer: Vec::new(), same: Ok(true) }
    }

    fn push(&mut self, bytes: &[u8]) {
        for step in bytes.chunks(STEP_BYTES) {
            if let Ok(same) = &self.same
                && (*same || self.write)
            {
                let now = self.step(step);
                self.same = now.map(|now| now && matches!(self.same, Ok(true)));
            }
            self.at += step.len() as u64;
        }
    }

    fn step(&mut self, expected: &[u8]) -> io::Result<bool> {
        self.buffer.resize(expected.len(), 0);
        let same = readable(self.file.read_exact_at(&mut self.buffer, self.at))?
            && self.buffer == expected;
        if !same && self.write {
            self.file.write_all_at(expected, self.at)?;
        }
        Ok(same)
    }

    fn finish(self) -> io::Result<bool> {
        self.same
    }
}

/// Whether the overflow area has what it was given of the tar.
pub fn same_within(file: &File, copy: Copy) -> io::Result<bool> {
    let (mut one, mut other) = (Vec::new(), Vec::new());
    let mut done = 0;
    while done < copy.len {
        let step = usize::try_from(copy.len - done).unwrap_or(usize::MAX).min(STEP_BYTES);
        one.resize(step, 0);
        other.resize(step, 0);
        let readable = readable(file.read_exact_at(&mut one, copy.from + done))?
            && readable(file.read_exact_at(&mut other, copy.to + done))?;
        if !readable || one != other {
            return Ok(false);
        }
        done += step as u64;
    }
    Ok(true)
}
