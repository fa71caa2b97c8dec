//! A blob's files, and which pieces of it are there.
//!
//! `blobs-v1/<sha256 hex>/data` is a sparse file of the blob's length, mode 0444 once every piece is
//! verified. `pieces` is a checkpoint in the format of [`crate::bits`] with two planes, *present* and
//! *verified*; its subject is the BLAKE3 root of the piece table that *verified* refers to. `proved`
//! holds that root, 32 bytes, once the bytes with this root have matched the blob's SHA-256. The
//! directory's modification time is the blob's last use. Files `*.tmp` are left-overs.
//!
//! Invariants:
//! - A bit is set after its bytes are written; a checkpoint reaches disk after the bytes it
//!   describes.
//! - A `data` file that had to be made starts with nothing present, and no older checkpoint is left.
//! - A piece that is present isn't written again, unless it was forgotten as wrong.
//! - A complete, verified file is never written again: it may be shared with containerd.
//! - To forget bytes is to start another file under the same name: who still writes into or reads
//!   from the old one disturbs nobody. No checkpoint of the old one is written from then on.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::{Bytes, BytesMut};
use skimmer_proto::{Geometry, PieceTable};
use tracing::warn;

use crate::bits::{self, Bits, Shape};
use crate::disk;

pub const DATA: &str = "data";
pub const CHECKPOINT: &str = "pieces";
const PROVED: &str = "proved";

/// Locks for writers: two that were sent the same piece take turns, also with whoever forgets it.
const WRITERS: usize = 8;

/// One incarnation of a blob's data file.
#[derive(Debug)]
pub struct Pieces {
    dir: PathBuf,
    geometry: Geometry,
    pub file: File,
    pub present: Bits,
    verified: RwLock<Arc<Verified>>,
    /// Bits changed since the last checkpoint.
    dirty: AtomicBool,
    /// The file is read-only for good; others may share the inode.
    sealed: AtomicBool,
    /// The bytes with this root have matched the blob's SHA-256.
    proved: Mutex<Option<[u8; 32]>>,
    writing: [Mutex<()>; WRITERS],
    /// Held while a checkpoint is written. True once the file has lost its name.
    retired: Mutex<bool>,
}

/// Which pieces match the table with this root.
#[derive(Debug)]
pub struct Verified {
    pub root: [u8; 32],
    pub bits: Bits,
}

/// What a stored piece turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    Kept,
    /// And forgotten.
    Wrong,
    /// It can't be replaced in this file.
    Sealed,
}

impl Pieces {
    /// Opens or makes the files in `dir`.
    pub fn open(dir: &Path, geometry: Geometry) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let path = dir.join(DATA);
        let metadata = match fs::metadata(&path) {
            Ok(metadata) if metadata.len() == geometry.blob_len() => metadata,
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => return Self::fresh(dir, geometry),
        };
        let sealed = metadata.permissions().readonly();
        let checkpoint = disk::read_optional(&dir.join(CHECKPOINT))?;
        let planes = checkpoint.and_then(|bytes| match bits::decode(shape(geometry), &bytes) {
            Ok((root, planes)) => {
                <[Bits; 2]>::try_from(planes).ok().map(|[present, bits]| (present, root, bits))
            }
            Err(error) => {
                warn!(dir = %dir.display(), %error, "blob checkpoint dropped, its pieces are fetched again");
                None
            }
        });
        let (present, root, bits) = planes.unwrap_or_else(|| empty(geometry));
        if sealed && !(present.all() && bits.all()) {
            return Self::fresh(dir, geometry);
        }
        let file = OpenOptions::new().read(true).write(!sealed).open(&path)?;
        let proved = disk::read_optional(&dir.join(PROVED))?.unwrap_or_default();
        let pieces = Self::with(dir, geometry, file, sealed, present, Verified { root, bits });
        *pieces.proved() = proved.try_into().ok();
        Ok(pieces)
    }

    /// Another incarnation, empty; this one has no checkpoint from now on, unless that fails. Blocks.
    pub fn replace(&self) -> io::Result<Self> {
        self.succeeded_by(|| Self::fresh(&self.dir, self.geometry))
    }

    /// What `make` makes takes over the name: no checkpoint of this one is written meanwhile, nor ever again. If it
    /// can't be made, this one goes on.
    fn succeeded_by(&self, make: impl FnOnce() -> io::Result<Self>) -> io::Result<Self> {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        let made = make();
        if made.is_ok() {
            *retired = true;
        } else {
            // The checkpoint on disk may have gone already.
            self.dirty.store(true, Ordering::Release);
        }
        made
    }

    /// Starts over with an empty data file, whatever there was.
    fn fresh(dir: &Path, geometry: Geometry) -> io::Result<Self> {
        let (file, temporary) = new_file(dir, geometry)?;
        disk::remove_durably(dir, CHECKPOINT)?;
        disk::remove(&dir.join(PROVED))?;
        fs::rename(&temporary, dir.join(DATA))?;
        let (present, root, bits) = empty(geometry);
        Ok(Self::with(dir, geometry, file, false, present, Verified { root, bits }))
    }

    /// The length of the data file in `dir`, and whether a verified whole vouches for it.
    pub fn stored_len(dir: &Path) -> io::Result<Option<(u64, bool)>> {
        let len = match fs::metadata(dir.join(DATA)) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let checkpoint = disk::read_optional(&dir.join(CHECKPOINT))?.unwrap_or_default();
        let planes = Geometry::of(len).and_then(|g| bits::decode(shape(g), &checkpoint).ok());
        Ok(Some((len, planes.is_some_and(|(_, planes)| planes.iter().all(Bits::all)))))
    }

    fn with(
        dir: &Path,
        geometry: Geometry,
        file: File,
        sealed: bool,
        present: Bits,
        verified: Verified,
    ) -> Self {
        Self {
            dir: dir.to_owned(),
            geometry,
            file,
            present,
            verified: RwLock::new(Arc::new(verified)),
            dirty: AtomicBool::new(false),
            sealed: AtomicBool::new(sealed),
            proved: Mutex::default(),
            writing: Default::default(),
            retired: Mutex::new(false),
        }
    }

    pub fn verified(&self) -> Arc<Verified> {
        self.verified.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on *verified* means verified against the table with this root.
    pub fn verify_against(&self, root: [u8; 32]) {
        let mut verified = self.verified.write().unwrap_or_else(PoisonError::into_inner);
        if verified.root != root {
            let bits = Bits::new(self.present.len());
            *verified = Arc::new(Verified { root, bits });
        }
    }

    /// All that is present matches the table with this root: its whole matched its SHA-256.
    pub fn all_verified(&self, root: [u8; 32]) {
        let bits = Bits::full(self.present.len());
        let mut verified = self.verified.write().unwrap_or_else(PoisonError::into_inner);
        *verified = Arc::new(Verified { root, bits });
        *self.proved() = Some(root);
        self.dirty.store(true, Ordering::Release);
    }

    /// Whether every byte is here and has matched the blob's SHA-256.
    pub fn is_proved(&self) -> bool {
        let verified = self.verified();
        let whole = self.present.all() && verified.bits.all();
        whole && *self.proved() == Some(verified.root)
    }

    /// Whether the file is read-only for good.
    pub fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    fn proved(&self) -> MutexGuard<'_, Option<[u8; 32]>> {
        self.proved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `piece` is on disk and matches `table`.
    pub fn is_verified(&self, piece: u32, table: &PieceTable) -> bool {
        let verified = self.verified();
        let (piece, right) = (piece as usize, verified.root == *table.root());
        right && verified.bits.get(piece) && self.present.get(piece)
    }

    /// Whether all of `range` is on disk, and matches `table` if there is one.
    pub fn have(&self, mut range: Range<u32>, table: Option<&Arc<PieceTable>>) -> bool {
        range.all(|piece| match table {
            Some(table) => self.is_verified(piece, table),
            None => self.present.get(piece as usize),
        })
    }

    /// Says that an unverified piece isn't there, so that it is fetched again.
    pub fn forget(&self, piece: u32) {
        let _turn = self.turn(piece);
        if !self.verified().bits.get(piece as usize) && self.present.clear(piece as usize) {
            self.dirty.store(true, Ordering::Release);
        }
    }

    /// Says that pieces which were verified have gone bad. False: the file can't be written, so they
    /// can't come back in this one.
    pub fn forget_verified(&self, wrong: &[u32]) -> bool {
        if self.sealed.load(Ordering::Acquire) {
            return false;
        }
        let verified = self.verified();
        for piece in wrong {
            let _turn = self.turn(*piece);
            verified.bits.clear(*piece as usize);
            self.present.clear(*piece as usize);
        }
        self.dirty.store(true, Ordering::Release);
        true
    }

    /// Another incarnation, with the pieces of this one but for the `wrong` ones. This one has no
    /// checkpoint from then on, unless that fails. Blocks.
    pub fn salvage(&self, wrong: &[u32]) -> io::Result<Self> {
        let (file, temporary) = new_file(&self.dir, self.geometry)?;
        let (present, _, bits) = empty(self.geometry);
        let verified = self.verified();
        for piece in (0..self.geometry.pieces()).filter(|piece| !wrong.contains(piece)) {
            if self.present.get(piece as usize) && verified.bits.get(piece as usize) {
                let bytes = self.read(piece, BytesMut::new())?;
                file.write_all_at(&bytes, self.geometry.span(piece).start)?;
                present.set(piece as usize);
                bits.set(piece as usize);
            }
        }
        self.succeeded_by(|| {
            disk::remove_durably(&self.dir, CHECKPOINT)?;
            // Until every piece is there again.
            disk::remove(&self.dir.join(PROVED))?;
            fs::rename(&temporary, self.dir.join(DATA))?;
            let verified = Verified { root: verified.root, bits };
            let fresh = Self::with(&self.dir, self.geometry, file, false, present, verified);
            fresh.dirty.store(true, Ordering::Release);
            Ok(fresh)
        })
    }

    /// Writes a piece, if it matches the table, and says that it is there. Blocks.
    pub fn store(
        &self,
        piece: u32,
        bytes: &[u8],
        table: Option<&PieceTable>,
    ) -> io::Result<Checked> {
        if table.is_some_and(|table| !table.verify(piece, bytes)) {
            return Ok(Checked::Wrong);
        }
        let _turn = self.turn(piece);
        if !self.present.get(piece as usize) {
            self.file.write_all_at(bytes, self.geometry.span(piece).start)?;
        }
        self.note(piece, table);
        Ok(Checked::Kept)
    }

    /// Checks a piece that came without a table; a wrong one is forgotten. Blocks.
    pub fn recheck(&self, piece: u32, table: &PieceTable) -> io::Result<Checked> {
        // Else who is sent it now finds it present, leaves the wrong bytes in place, and says that they are right.
        let _turn = self.turn(piece);
        if table.verify(piece, &self.read(piece, BytesMut::new())?) {
            self.note(piece, Some(table));
            return Ok(Checked::Kept);
        }
        if self.sealed.load(Ordering::Acquire) {
            return Ok(Checked::Sealed);
        }
        self.present.clear(piece as usize);
        self.dirty.store(true, Ordering::Release);
        Ok(Checked::Wrong)
    }

    /// The bytes of a present piece, in the memory given if that is large enough. Blocks.
    pub fn read(&self, piece: u32, mut memory: BytesMut) -> io::Result<Bytes> {
        let span = self.geometry.span(piece);
        let len = usize::try_from(span.end - span.start).map_err(io::Error::other)?;
        memory.resize(len, 0);
        self.file.read_exact_at(&mut memory, span.start)?;
        Ok(memory.freeze())
    }

    fn turn(&self, piece: u32) -> MutexGuard<'_, ()> {
        self.writing[piece as usize % WRITERS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, piece: u32, table: Option<&PieceTable>) {
        let verified = self.verified();
        if table.is_some_and(|table| verified.root == *table.root()) {
            verified.bits.set(piece as usize);
        }
        self.present.set(piece as usize);
        self.dirty.store(true, Ordering::Release);
    }

    pub fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    /// Syncs the data, then records what was there before the sync. Blocks.
    pub fn checkpoint(&self) -> io::Result<()> {
        let retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        if *retired || !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let written = self.write_checkpoint();
        if written.is_err() {
            self.dirty.store(true, Ordering::Release);
        }
        written
    }

    fn write_checkpoint(&self) -> io::Result<()> {
        let verified = self.verified();
        // In this order a bit of the second plane is in the first too.
        let second = verified.bits.snapshot();
        let first = self.present.snapshot();
        self.file.sync_data()?;
        let bytes = bits::encode(shape(self.geometry), &verified.root, &[first, second]);
        disk::write_atomically(&self.dir, CHECKPOINT, &bytes)?;
        if self.present.all() && verified.bits.all() {
            if !self.sealed.swap(true, Ordering::AcqRel) {
                self.file.set_permissions(Permissions::from_mode(0o444))?;
            }
            if *self.proved() == Some(verified.root) {
                disk::write_atomically(&self.dir, PROVED, &verified.root)?;
            }
        }
        Ok(())
    }
}

/// An empty data file that has no name yet but that of a left-over.
fn new_file(dir: &Path, geometry: Geometry) -> io::Result<(File, PathBuf)> {
    let temporary = dir.join("data.tmp");
    disk::remove(&temporary)?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&temporary)?;
    file.set_len(geometry.blob_len())?;
    Ok((file, temporary))
}

const fn shape(geometry: Geometry) -> Shape {
    Shape { data_len: geometry.blob_len(), bits: geometry.pieces() as usize, planes: 2 }
}

fn empty(geometry: Geometry) -> (Bits, [u8; 32], Bits) {
    let bits = geometry.pieces() as usize;
    (Bits::new(bits), [0; 32], Bits::new(bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_checkpoint_describes_a_successor() {
        let dir = tempfile::tempdir().unwrap();
        let geometry = Geometry::of(1000).unwrap();
        let old = Pieces::open(dir.path(), geometry).unwrap();
        assert_eq!(old.store(0, &[7; 1000], None).unwrap(), Checked::Kept);
        drop(old.replace().unwrap());
        old.checkpoint().unwrap();
        assert!(!Pieces::open(dir.path(), geometry).unwrap().present.get(0));
    }

    #[test]
    fn what_found_no_successor_goes_on() {
        type Make = fn(&Pieces) -> io::Result<Pieces>;
        let makes: [Make; 2] = [Pieces::replace, |old| old.salvage(&[])];
        for make in makes {
            let dir = tempfile::tempdir().unwrap();
            let geometry = Geometry::of(1000).unwrap();
            let old = Pieces::open(dir.path(), geometry).unwrap();
            assert_eq!(old.store(0, &[7; 1000], None).unwrap(), Checked::Kept);
            old.checkpoint().unwrap();
            // It can't be removed as a file.
            let obstacle = dir.path().join(PROVED);
            fs::create_dir(&obstacle).unwrap();
            make(&old).expect_err("there is an obstacle");
            fs::remove_dir(&obstacle).unwrap();
            old.checkpoint().unwrap();
            assert!(!old.is_dirty());
            assert!(Pieces::open(dir.path(), geometry).unwrap().present.get(0));
        }
    }
}
