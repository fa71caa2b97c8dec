//! The data file of a layer, filled chunk by chunk.
//!
//! `chunks` is a checkpoint in the format of [`crate::bits`] with one plane; its subject is the
//! SHA-256 of the layer index (or of the table of contents) that cuts the file into chunks.
//!
//! Invariants: those of a blob's pieces. A chunk is marked after its bytes are written, a checkpoint
//! reaches disk after the bytes, a file that had to be made starts empty.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use skimmer_proto::Digest;
use tracing::warn;

use super::cold::Use;
use super::{CHUNKS, DATA, Error};
use crate::bits::{self, Bits, Shape};
use crate::disk;
use crate::space::Space;

/// See the module's documentation.
#[derive(Debug)]
pub struct LayerData {
    blob: Digest,
    dir: PathBuf,
    file: File,
    shape: Shape,
    subject: [u8; 32],
    present: Bits,
    dirty: AtomicBool,
    /// Held while a checkpoint is written. True once the file has been removed: it has no
    /// checkpoint any more.
    retired: Mutex<bool>,
    pub(super) usage: Use,
    space: Arc<Space>,
}

impl LayerData {
    pub(super) fn open(
        blob: Digest,
        dir: &Path,
        lent: Option<File>,
        (len, chunks): (u64, usize),
        subject: [u8; 32],
        space: &Arc<Space>,
    ) -> Result<Self, Error> {
        let failed = |name| move |source| Error::Write { blob, name, source };
        let shape = Shape { data_len: len, bits: chunks, planes: 1 };
        let (file, present) = match existing(&dir.join(DATA), lent) {
            Ok(file) if file.metadata().map_err(failed(DATA))?.len() == len => {
                (file, recall(blob, dir, shape, subject)?)
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::Read { blob, name: DATA, source: error });
            }
            _ => (fresh(dir, len).map_err(failed(DATA))?, Bits::new(chunks)),
        };
        Ok(Self::with(blob, dir, file, shape, subject, present, space))
    }

    /// A complete file; its checkpoint is yet to be written.
    pub(super) fn whole(
        blob: Digest,
        dir: &Path,
        file: File,
        (len, chunks): (u64, usize),
        subject: [u8; 32],
        space: &Arc<Space>,
    ) -> Self {
        let shape = Shape { data_len: len, bits: chunks, planes: 1 };
        let data = Self::with(blob, dir, file, shape, subject, Bits::full(chunks), space);
        data.dirty.store(true, Ordering::Release);
        data
    }

    /// An empty file without a name, and without a checkpoint therefore.
    pub(super) fn unnamed(
        blob: Digest,
        dir: &Path,
        (len, chunks): (u64, usize),
        subject: [u8; 32],
        space: &Arc<Space>,
    ) -> Result<Self, Error> {
        let file = disk::unnamed(dir).and_then(|file| file.set_len(len).map(|()| file));
        let file = file.map_err(|source| Error::Write { blob, name: DATA, source })?;
        let shape = Shape { data_len: len, bits: chunks, planes: 1 };
        let data = Self::with(blob, dir, file, shape, subject, Bits::new(chunks), space);
        data.retire();
        Ok(data)
    }

    fn with(
        blob: Digest,
        dir: &Path,
        file: File,
        shape: Shape,
        subject: [u8; 32],
        present: Bits,
        space: &Arc<Space>,
    ) -> Self {
        Self {
            blob,
            dir: dir.to_owned(),
            file,
            shape,
            subject,
            present,
            dirty: AtomicBool::new(false),
            retired: Mutex::new(false),
            usage: Use::new(shape.bits),
            space: Arc::clone(space),
        }
    }

    /// The sparse data file, open for reading and writing at offsets.
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// The file's length in bytes.
    pub const fn len(&self) -> u64 {
        self.shape.data_len
    }

    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub const fn chunks(&self) -> usize {
        self.shape.bits
    }

    /// Takes no lock.
    pub fn has(&self, chunk: usize) -> bool {
        self.present.get(chunk)
    }

    /// The caller has written this chunk's bytes, and they are right.
    pub fn mark(&self, chunk: usize) {
        if self.present.set(chunk) {
            self.dirty.store(true, Ordering::Release);
            self.space.charge(self.len() / self.chunks().max(1) as u64);
            if self.complete() {
                self.space.upkeep.notify_one();
            }
        }
    }

    /// The chunks of `range` that aren't there, in order.
    pub fn missing(&self, range: Range<usize>) -> Vec<usize> {
        self.present.zeros_in(range)
    }

    /// The number of chunks that are there.
    pub fn present(&self) -> usize {
        self.present.ones()
    }

    /// Bytes of the file that are there, by the mean length of a chunk; exact at both ends.
    pub fn present_bytes(&self) -> u64 {
        let (present, chunks) = (self.present() as u128, self.chunks().max(1) as u128);
        u64::try_from(u128::from(self.len()) * present / chunks).unwrap_or(self.len())
    }

    pub fn complete(&self) -> bool {
        self.present.all()
    }

    /// Syncs the data, then records which chunks were there before the sync. Blocks.
    pub fn checkpoint(&self) -> Result<(), Error> {
        let retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        if *retired || !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let plane = self.present.snapshot();
        let bytes = bits::encode(self.shape, &self.subject, &[plane]);
        let written = self.file.sync_data();
        written.and_then(|()| disk::write_atomically(&self.dir, CHUNKS, &bytes)).map_err(|source| {
            self.dirty.store(true, Ordering::Release);
            Error::Checkpoint { blob: self.blob, source }
        })
    }

    /// As if there had never been one.
    pub(super) fn drop_checkpoint(&self) -> Result<(), Error> {
        let _retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        disk::remove_durably(&self.dir, CHUNKS)
            .map_err(|source| Error::Remove { blob: self.blob, source })
    }

    pub(super) const fn blob(&self) -> Digest {
        self.blob
    }

    /// The chunk counts as absent from now on. The caller keeps readers away meanwhile.
    pub(super) fn forget(&self, chunk: usize) {
        self.present.clear(chunk);
        self.dirty.store(true, Ordering::Release);
    }

    /// Whether `subject` is what cuts the file into chunks.
    pub(super) fn is_of(&self, subject: [u8; 32]) -> bool {
        self.subject == subject
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    /// The file is about to lose its name: no checkpoint may describe its successor.
    pub(super) fn retire(&self) {
        *self.retired.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }
}

/// The file at `path`, by `lent` if that is the same.
fn existing(path: &Path, lent: Option<File>) -> io::Result<File> {
    if let Some(lent) = lent
        && is_at(&lent, path)?
    {
        return Ok(lent);
    }
    OpenOptions::new().read(true).write(true).open(path)
}

/// Whether `file` is the one at `path`.
pub(super) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let (known, found) = (file.metadata()?, fs::metadata(path)?);
    Ok((known.dev(), known.ino()) == (found.dev(), found.ino()))
}

/// What the checkpoint says; nothing, if it is of another file or index, or damaged.
fn recall(blob: Digest, dir: &Path, shape: Shape, subject: [u8; 32]) -> Result<Bits, Error> {
    let failed = |source| Error::Read { blob, name: CHUNKS, source };
    let Some(bytes) = disk::read_optional(&dir.join(CHUNKS)).map_err(failed)? else {
        return Ok(Bits::new(shape.bits));
    };
    match bits::decode(shape, &bytes) {
        Ok((known, planes)) if known == subject => {
            Ok(planes.into_iter().next().unwrap_or_else(|| Bits::new(shape.bits)))
        }
        Ok(_) => Ok(Bits::new(shape.bits)),
        Err(error) => {
            warn!(layer = %blob, %error, "layer checkpoint dropped, its chunks are decoded again");
            Ok(Bits::new(shape.bits))
        }
    }
}

fn fresh(dir: &Path, len: u64) -> io::Result<File> {
    disk::remove_durably(dir, CHUNKS)?;
    let temporary = dir.join("data.tmp");
    disk::remove(&temporary)?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&temporary)?;
    file.set_len(len)?;
    fs::rename(&temporary, dir.join(DATA))?;
    Ok(file)
}
