//! Decoded bytes on their way into a data file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use skimmer_index::erofs::Copy;

use crate::sparse;

/// Collects decoded bytes into large writes at consecutive offsets.
pub struct Writer<'a> {
    file: &'a File,
    at: u64,
    buffer: Vec<u8>,
    /// The first failure; what comes after it is dropped.
    failed: Option<io::Error>,
}

impl<'a> Writer<'a> {
    const BUFFER_BYTES: usize = 1 << 20;

    pub fn new(file: &'a File, at: u64) -> Self {
        Self { file, at, buffer: Vec::new(), failed: None }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= Self::BUFFER_BYTES {
            self.write();
        }
    }

    pub fn finish(mut self) -> io::Result<()> {
        self.write();
        self.failed.map_or(Ok(()), Err)
    }

    fn write(&mut self) {
        if self.failed.is_none() {
            self.failed = sparse::write_all_at(self.file, &self.buffer, self.at).err();
        }
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
    }
}

/// Puts bytes of the tar a second time into the overflow area.
pub fn copy_within(file: &File, copy: Copy) -> io::Result<()> {
    let mut buffer = Vec::new();
    let (mut from, mut to, mut left) = (copy.from, copy.to, copy.len);
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(usize::MAX).min(Writer::BUFFER_BYTES);
        buffer.resize(step, 0);
        file.read_exact_at(&mut buffer, from)?;
        file.write_all_at(&buffer, to)?;
        let step = step as u64;
        (from, to, left) = (from + step, to + step, left - step);
    }
    Ok(())
}
