//! Decoded bytes on their way into a data file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use skimmer_index::erofs::Copy;

use crate::sparse;

/// How much is copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// Writes decoded bytes at consecutive offsets.
pub struct Writer<'a> {
    file: &'a File,
    at: u64,
    /// The first failure; what comes after it is dropped.
    failed: Option<io::Error>,
}

impl<'a> Writer<'a> {
    pub const fn new(file: &'a File, at: u64) -> Self {
        Self { file, at, failed: None }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.failed = sparse::write_all_at(self.file, bytes, self.at).err();
        }
        self.at += bytes.len() as u64;
    }

    pub fn finish(self) -> io::Result<()> {
        self.failed.map_or(Ok(()), Err)
    }
}

/// Puts bytes of the tar a second time into the overflow area.
pub fn copy_within(file: &File, copy: Copy) -> io::Result<()> {
    let mut buffer = Vec::new();
    let (mut from, mut to, mut left) = (copy.from, copy.to, copy.len);
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(usize::MAX).min(COPY_BYTES);
        buffer.resize(step, 0);
        file.read_exact_at(&mut buffer, from)?;
        file.write_all_at(&buffer, to)?;
        let step = step as u64;
        (from, to, left) = (from + step, to + step, left - step);
    }
    Ok(())
}
