//! A layer's objects and its data file.
//!
//! `layers-v1/<sha256 hex of the blob>/` holds
//! - `index`, the encoded layer index; `table`, the encoded piece table, which names the index's
//!   SHA-256; `inodes`, the EROFS image out of the index. Each written whole, `table` last: without
//!   it, or where it names another index, there are none.
//! - `data`, the sparse data file, and `chunks`, the checkpoint of which chunks of it are there (see
//!   [`data`]).
//!   A layer mounted by a table of contents inside its blob has these two and `inodes`, but no index.
//! - `data.new`, a data file in the making; `*.tmp`, left-overs.
//!
//! The directory's modification time is the layer's last use.

mod cold;
mod data;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use skimmer_proto::{Digest, PieceTable, piece_table};
use tracing::warn;

pub use self::cold::{Hold, Keep, Spans};
pub use self::data::LayerData;
use crate::disk;
use crate::space::Space;

const INDEX: &str = "index";
const TABLE: &str = "table";
const INODES: &str = "inodes";
pub(crate) const DATA: &str = "data";
const NEW_DATA: &str = "data.new";
const CHUNKS: &str = "chunks";

/// What is on disk for one layer. One per digest in the process.
#[derive(Debug)]
pub struct LayerFiles {
    blob: Digest,
    dir: PathBuf,
    space: Arc<Space>,
    data: Mutex<Option<Arc<LayerData>>>,
    /// By which the data file is to be opened, if it is the same.
    lent: Mutex<Option<File>>,
}

/// The two content-addressed objects, as stored.
#[derive(Clone, Debug)]
pub struct LayerObjects {
    /// The encoded layer index; its SHA-256 is `table.index`.
    pub index: Vec<u8>,
    pub table: PieceTable,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read {name} of layer {blob}")]
    Read { blob: Digest, name: &'static str, source: io::Error },
    #[error("write {name} of layer {blob}")]
    Write { blob: Digest, name: &'static str, source: io::Error },
    #[error("piece table of {table} doesn't fit layer {blob}")]
    ForeignTable { blob: Digest, table: Digest },
    #[error("piece table of layer {blob} names index {expected}, the index given is {actual}")]
    ForeignIndex { blob: Digest, expected: Digest, actual: Digest },
    #[error("piece table of layer {blob}")]
    Table { blob: Digest, source: piece_table::Error },
    #[error("data file of layer {blob} is in use as {known}, not as {claimed}")]
    InUse { blob: Digest, known: String, claimed: String },
    #[error("remove layer {blob}")]
    Remove { blob: Digest, source: io::Error },
    #[error("write the checkpoint of layer {blob}")]
    Checkpoint { blob: Digest, source: io::Error },
    #[error("punch chunks out of layer {blob}")]
    Punch { blob: Digest, source: io::Error },
}

impl Error {
    /// Whether it may go better when something has been evicted.
    pub fn is_disk_full(&self) -> bool {
        let (Self::Write { source, .. } | Self::Checkpoint { source, .. }) = self else {
            return false;
        };
        source.kind() == io::ErrorKind::StorageFull
    }
}

impl LayerFiles {
    pub(crate) const fn new(blob: Digest, dir: PathBuf, space: Arc<Space>) -> Self {
        Self { blob, dir, space, data: Mutex::new(None), lent: Mutex::new(None) }
    }

    /// The digest of the layer's blob.
    pub const fn blob(&self) -> Digest {
        self.blob
    }

    /// The stored index and table, or `None` if there are none or they don't belong together.
    /// Blocks; hashes the index.
    pub fn load(&self) -> Result<Option<LayerObjects>, Error> {
        let Some(table) = self.read(TABLE)? else { return Ok(None) };
        let Some(index) = self.read(INDEX)? else { return Ok(None) };
        match PieceTable::decode(&table) {
            Ok(table) if table.blob == self.blob && table.index == Digest::of(&index) => {
                Ok(Some(LayerObjects { index, table }))
            }
            Ok(_) => {
                warn!(layer = %self.blob, "stored index and piece table don't belong together, dropped");
                Ok(None)
            }
            Err(error) => {
                warn!(layer = %self.blob, %error, "stored piece table is damaged, dropped");
                Ok(None)
            }
        }
    }

    /// Whether there is something that [`Self::load`] should find.
    pub fn has_objects(&self) -> bool {
        self.dir.join(TABLE).exists()
    }

    /// The stored piece table, if there is one of this layer. Blocks.
    pub fn table(&self) -> Result<Option<PieceTable>, Error> {
        let blob = self.blob;
        let Some(table) = self.read(TABLE)? else { return Ok(None) };
        let table = PieceTable::decode(&table).map_err(|source| Error::Table { blob, source })?;
        Ok((table.blob == blob).then_some(table))
    }

    /// Stores the layer's objects for good; all of them or, after a crash, none. If the index is
    /// another than before, the data file goes: its chunks were that index's. Blocks.
    pub fn store(&self, index: &[u8], table: &PieceTable, inodes: &[u8]) -> Result<(), Error> {
        let (blob, actual) = (self.blob, Digest::of(index));
        if table.blob != blob {
            return Err(Error::ForeignTable { blob, table: table.blob });
        }
        if table.index != actual {
            return Err(Error::ForeignIndex { blob, expected: table.index, actual });
        }
        let mut data = self.data();
        self.make_dir()?;
        if self.stored_index()? != Some(actual) {
            self.remove_data(&mut data)?;
        }
        let failed = |name| move |source| Error::Write { blob, name, source };
        disk::remove_durably(&self.dir, TABLE).map_err(failed(TABLE))?;
        for (name, bytes) in [(INODES, inodes), (INDEX, index), (TABLE, &table.encode())] {
            disk::write_atomically(&self.dir, name, bytes).map_err(failed(name))?;
            self.space.charge(bytes.len() as u64);
        }
        disk::sync_dir(&self.dir).map_err(failed(TABLE))
    }

    /// Where the EROFS image is, once stored.
    pub fn inodes_path(&self) -> PathBuf {
        self.dir.join(INODES)
    }

    /// Where the data file is, once opened.
    pub fn data_path(&self) -> PathBuf {
        self.dir.join(DATA)
    }

    /// The data file with what is known to be in it: sparse, `data_len` bytes long, cut into
    /// `chunks` chunks by the stored index. Made if there is none. All callers share one.
    /// Blocks.
    pub fn open_data(&self, data_len: u64, chunks: usize) -> Result<Arc<LayerData>, Error> {
        let mut open = self.data();
        if let Some(data) = open.as_ref() {
            return self.same(data, data_len, chunks);
        }
        self.make_dir()?;
        let subject = self.subject()?;
        self.open_file(&mut open, subject, data_len, chunks)
    }

    /// The inodes and the data file of a layer that has no index yet, to be used until it has one: by
    /// whoever knows what `subject` names, which cuts the file into `chunks` chunks. What is left of
    /// an index on disk goes. Blocks.
    pub fn open_provisional(
        &self,
        subject: Digest,
        inodes: &[u8],
        data_len: u64,
        chunks: usize,
    ) -> Result<Arc<LayerData>, Error> {
        let (blob, subject) = (self.blob, *subject.as_bytes());
        let failed = |name| move |source| Error::Write { blob, name, source };
        let mut open = self.data();
        self.make_dir()?;
        disk::remove_durably(&self.dir, TABLE).map_err(failed(TABLE))?;
        disk::write_atomically(&self.dir, INODES, inodes).map_err(failed(INODES))?;
        self.space.charge(inodes.len() as u64);
        match open.as_ref() {
            Some(data) if data.is_of(subject) => return self.same(data, data_len, chunks),
            Some(_) => self.remove_data(&mut open)?,
            None => {}
        }
        self.open_file(&mut open, subject, data_len, chunks)
    }

    /// Inodes and an empty data file beside those that the layer has, for a mount from before it had them. They have no
    /// name and go when they are closed. Blocks.
    pub fn open_aside(
        &self,
        subject: Digest,
        inodes: &[u8],
        data_len: u64,
        chunks: usize,
    ) -> Result<(File, Arc<LayerData>), Error> {
        let blob = self.blob;
        let failed = |name| move |source| Error::Write { blob, name, source };
        let _files = self.data();
        self.make_dir()?;
        let file = disk::unnamed(&self.dir).map_err(failed(INODES))?;
        file.write_all_at(inodes, 0).map_err(failed(INODES))?;
        self.space.charge(inodes.len() as u64);
        let (shape, subject) = ((data_len, chunks), *subject.as_bytes());
        let data = LayerData::unnamed(blob, &self.dir, shape, subject, &self.space)?;
        Ok((file, Arc::new(data)))
    }

    /// `file` is open for reading and writing, by an earlier process. If it is the data file, that is opened by it: whoever
    /// watches the file for others who open it doesn't see us.
    pub fn lend_data(&self, file: File) {
        if data::is_at(&file, &self.data_path()).unwrap_or(false) {
            *self.lent() = Some(file);
        }
    }

    fn lent(&self) -> MutexGuard<'_, Option<File>> {
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_file(
        &self,
        open: &mut Option<Arc<LayerData>>,
        subject: [u8; 32],
        data_len: u64,
        chunks: usize,
    ) -> Result<Arc<LayerData>, Error> {
        // Kept, for when the file is closed and opened again.
        let lent = self.lent().as_ref().map(File::try_clone).transpose();
        let failed = |source| Error::Read { blob: self.blob, name: DATA, source };
        let (lent, shape) = (lent.map_err(failed)?, (data_len, chunks));
        let data = LayerData::open(self.blob, &self.dir, lent, shape, subject, &self.space)?;
        Ok(Arc::clone(open.insert(Arc::new(data))))
    }

    /// An empty file to decode a layer into whose index isn't known yet. An earlier one that wasn't
    /// adopted is dropped. Blocks.
    pub fn new_data(&self) -> Result<File, Error> {
        let (blob, path) = (self.blob, self.dir.join(NEW_DATA));
        let failed = |source| Error::Write { blob, name: NEW_DATA, source };
        let _files = self.data();
        self.make_dir()?;
        disk::remove(&path).map_err(failed)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).open(&path).map_err(failed)
    }

    /// Drops the file of [`Self::new_data`]: it came to nothing. Blocks.
    pub fn discard_new_data(&self) -> Result<(), Error> {
        let removed = disk::remove(&self.dir.join(NEW_DATA));
        removed.map(drop).map_err(|source| Error::Remove { blob: self.blob, source })
    }

    /// Takes the file of [`Self::new_data`], completely decoded, as the data file with all its
    /// chunks. To be called after [`Self::store`]. Reaches disk in the background. Whoever has an
    /// older data file open keeps that. The layer must be pinned from [`Self::new_data`] on. Blocks.
    pub fn adopt_data(&self, data_len: u64, chunks: usize) -> Result<Arc<LayerData>, Error> {
        let (blob, path) = (self.blob, self.dir.join(NEW_DATA));
        let failed = |source| Error::Write { blob, name: NEW_DATA, source };
        let mut open = self.data();
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
        file.set_len(data_len).map_err(failed)?;
        self.remove_data(&mut open)?;
        fs::rename(&path, self.data_path()).map_err(failed)?;
        let subject = self.subject()?;
        let data =
            LayerData::whole(blob, &self.dir, file, (data_len, chunks), subject, &self.space);
        self.space.charge(data_len);
        self.space.upkeep.notify_one();
        Ok(Arc::clone(open.insert(Arc::new(data))))
    }

    /// Removes everything: the objects are wrong, or nobody wants the layer any more. Open handles
    /// keep reading the file they have. Blocks.
    pub fn remove(&self) -> Result<(), Error> {
        self.remove_all(&mut self.data())
    }

    /// Bytes that the layer occupies on disk, holes not counted. Blocks.
    pub fn allocated(&self) -> Result<u64, Error> {
        let blob = self.blob;
        disk::allocated(&self.dir).map_err(|source| Error::Read { blob, name: "directory", source })
    }

    /// Removes the data file, if nobody has it open, nor `wants` to, which is asked when nobody else can change the files.
    /// Whether it did.
    pub fn evict_data(&self, wants: impl FnOnce() -> bool) -> Result<bool, Error> {
        let mut data = self.data();
        if data.as_ref().is_some_and(is_shared) || wants() {
            return Ok(false);
        }
        self.remove_data(&mut data)?;
        disk::remove(&self.dir.join(NEW_DATA))
            .map_err(|source| Error::Remove { blob: self.blob, source })?;
        Ok(true)
    }

    /// Bytes that [`Self::punch_cold`] can free, about. 0 also while the files are being changed.
    pub(crate) fn cold_bytes(&self) -> u64 {
        let data = self.data.try_lock().map_or(None, |data| data.clone());
        data.map_or(0, |data| data.cold_bytes())
    }

    /// Frees `wanted` bytes of chunks that nobody reads, if there are so many, though the data file is
    /// in use. The bytes freed.
    pub(crate) fn punch_cold(&self, wanted: u64) -> Result<u64, Error> {
        let data = self.data().clone();
        data.map_or(Ok(0), |data| data.punch_cold(wanted))
    }

    /// Removes everything, if nobody has the data file open, nor `wants` to, as in [`Self::evict_data`]. Whether it did.
    pub fn evict(&self, wants: impl FnOnce() -> bool) -> Result<bool, Error> {
        let mut data = self.data();
        if data.as_ref().is_some_and(is_shared) || wants() {
            return Ok(false);
        }
        self.remove_all(&mut data)?;
        Ok(true)
    }

    pub(crate) fn checkpoint(&self) -> Result<(), Error> {
        let data = self.data().clone();
        data.map_or(Ok(()), |data| data.checkpoint())
    }

    /// Whether there is something to record. True also while the files are being changed: never
    /// waits for the disk.
    pub(crate) fn is_dirty(&self) -> bool {
        self.data.try_lock().map_or(true, |data| data.as_ref().is_some_and(|data| data.is_dirty()))
    }

    /// Whether somebody has the data file open. Likewise.
    pub(crate) fn is_read(&self) -> bool {
        self.data.try_lock().map_or(true, |data| data.as_ref().is_some_and(is_shared))
    }

    /// Whether there is a [lent](Self::lend_data) descriptor, which nobody can get a second time.
    pub(crate) fn is_lent(&self) -> bool {
        self.lent().is_some()
    }

    fn data(&self) -> MutexGuard<'_, Option<Arc<LayerData>>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn same(
        &self,
        data: &Arc<LayerData>,
        len: u64,
        chunks: usize,
    ) -> Result<Arc<LayerData>, Error> {
        if (data.len(), data.chunks()) == (len, chunks) {
            return Ok(Arc::clone(data));
        }
        let text = |len, chunks| format!("{len} bytes in {chunks} chunks");
        let (known, claimed) = (text(data.len(), data.chunks()), text(len, chunks));
        Err(Error::InUse { blob: self.blob, known, claimed })
    }

    /// The bitmap first: it must never describe a file that is gone.
    fn remove_data(&self, open: &mut Option<Arc<LayerData>>) -> Result<(), Error> {
        let blob = self.blob;
        *self.lent() = None;
        if let Some(data) = open.take() {
            data.retire();
        }
        disk::remove_durably(&self.dir, CHUNKS)
            .and_then(|()| disk::remove(&self.dir.join(DATA)))
            .map(|_| ())
            .map_err(|source| Error::Remove { blob, source })
    }

    fn remove_all(&self, open: &mut Option<Arc<LayerData>>) -> Result<(), Error> {
        if !self.dir.exists() {
            return Ok(());
        }
        self.remove_data(open)?;
        disk::remove_durably(&self.dir, TABLE)
            .and_then(|()| fs::remove_dir_all(&self.dir))
            .map_err(|source| Error::Remove { blob: self.blob, source })
    }

    /// What the chunk bits were decoded by: the index that the stored table names, or zeros.
    fn subject(&self) -> Result<[u8; 32], Error> {
        Ok(self.stored_index()?.map_or([0; 32], |index| *index.as_bytes()))
    }

    fn stored_index(&self) -> Result<Option<Digest>, Error> {
        let table = self.read(TABLE)?;
        Ok(table.and_then(|table| PieceTable::decode(&table).ok()).map(|table| table.index))
    }

    fn read(&self, name: &'static str) -> Result<Option<Vec<u8>>, Error> {
        let blob = self.blob;
        disk::read_optional(&self.dir.join(name)).map_err(|source| Error::Read {
            blob,
            name,
            source,
        })
    }

    fn make_dir(&self) -> Result<(), Error> {
        let blob = self.blob;
        fs::create_dir_all(&self.dir).map_err(|source| Error::Write {
            blob,
            name: "directory",
            source,
        })
    }
}

/// The bytes that the data files in `dir` occupy.
pub(crate) fn data_allocated(dir: &Path) -> io::Result<u64> {
    let mut total = 0;
    for name in [DATA, NEW_DATA, CHUNKS] {
        total += match fs::metadata(dir.join(name)) {
            Ok(metadata) => metadata.blocks() * 512,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
    }
    Ok(total)
}

fn is_shared(data: &Arc<LayerData>) -> bool {
    Arc::strong_count(data) > 1
}
