//! Whether a layer whose bytes are all here is what it was taken for.
//!
//! An index that others made is no more than their word until now: it could name the right bytes wrongly, or give a
//! file a mode that it hasn't. So it is made once more from the blob, and has to be the same.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest as _, Sha256};
use skimmer_cache::Blob;
use skimmer_index::build::{self, BlobSums, Built, DataScan, assemble};
use skimmer_index::codec::Decoder;
use skimmer_index::erofs;
use skimmer_index::index::{LayerIndex, Layout};
use skimmer_index::tar::Limits;
use skimmer_index::toc;
use skimmer_proto::Digest;

use super::{Cause, Layer, Open};

/// Read at a time.
const STEP_BYTES: usize = 1 << 20;

/// Why a complete layer isn't what it was taken for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read the blob")]
    ReadBlob { source: io::Error },
    #[error("read the data file")]
    ReadData { source: io::Error },
    #[error("decode the blob from end to end")]
    Decode { source: skimmer_index::codec::Error },
    #[error("the blob on disk has the digest {actual}: its piece table was wrong")]
    Digest { actual: Digest },
    #[error("the layer on disk has the DiffID {actual}, expected {expected}: its index was wrong")]
    DiffId { expected: Digest, actual: Digest },
    #[error("make its index once more")]
    Rebuild { source: build::Error },
    #[error("make its inodes once more")]
    Inodes { source: erofs::WriteError },
    #[error("its index is not the one that its bytes give")]
    Index,
    #[error("compare the table of contents by which it was mounted with its tar")]
    Toc { source: Box<toc::Error> },
    #[error("the table of contents by which it was mounted is not the one that is in the blob")]
    OtherToc,
}

/// How much of a layer was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whole {
    /// Nothing: it was proved before.
    Known,
    /// Its files; of the blob, a part has been evicted.
    Files,
    /// Its index and piece table were made once more.
    Rebuilt,
}

impl Layer {
    /// Checks what is on disk against the digests of manifest and config, and the index against
    /// what is on disk; remembers it.
    pub(super) fn verify(&self, open: &Open) -> Result<Whole, Cause> {
        let whole = if open.is_proved() {
            Whole::Known
        } else {
            let whole = self.check(open).map_err(|source| Cause::Verify { source })?;
            self.shared.record_proved(self.digest())?;
            whole
        };
        open.checkpoint();
        Ok(whole)
    }

    fn check(&self, open: &Open) -> Result<Whole, Error> {
        let (index, blob) = (open.fill.index(), open.fill.blob());
        let expected = self.spec().diff_id;
        let is_expected = |actual: Digest| {
            if actual == expected { Ok(()) } else { Err(Error::DiffId { expected, actual }) }
        };
        if index.layout == Layout::Tar {
            if !blob.is_complete() {
                return same_files(open, self.patient_limits(), is_expected);
            }
            is_expected(hash_data(open.fill.data().file(), index)?)?;
        }
        let built = rebuild(blob, index, self.patient_limits())?;
        if built.table.blob != blob.digest() {
            return Err(Error::Digest { actual: built.table.blob });
        }
        is_expected(built.table.diff_id)?;
        if blob.table().is_none_or(|table| *table != built.table) {
            return Err(Error::Index);
        }
        blob.matched(&built.table);
        Ok(Whole::Rebuilt)
    }

    /// Who built the index may have allowed its tree more memory than this node does: that is no lie.
    fn patient_limits(&self) -> Limits {
        let (ours, usual) = (self.shared.config.limits.clone(), Limits::default());
        Limits { metadata_bytes: ours.metadata_bytes.max(usual.metadata_bytes), ..ours }
    }
}

/// SHA-256 of the data file's tar range.
fn hash_data(file: &File, index: &LayerIndex) -> Result<Digest, Error> {
    let mut hash = Sha256::new();
    let read = |buffer: &mut [u8], at| file.read_exact_at(buffer, at);
    each_step(index.tar_len, read, |bytes| hash.update(bytes))
        .map_err(|source| Error::ReadData { source })?;
    Ok(Digest::from_bytes(hash.finalize().into()))
}

/// Compares the inodes with those that the tar in the data file gives.
fn same_files(
    open: &Open,
    limits: Limits,
    is_expected: impl Fn(Digest) -> Result<(), Error>,
) -> Result<Whole, Error> {
    let (file, index) = (open.fill.data().file(), open.fill.index());
    let mut scan = DataScan::new(limits);
    let mut failed = None;
    let read = |buffer: &mut [u8], at| file.read_exact_at(buffer, at);
    let push = |bytes: &[u8]| {
        if failed.is_none() {
            failed = scan.push(bytes).err();
        }
    };
    each_step(index.tar_len, read, push).map_err(|source| Error::ReadData { source })?;
    let scanned = failed.map_or_else(|| scan.finish(), Err);
    let scanned = scanned.map_err(|source| Error::Rebuild { source })?;
    is_expected(scanned.diff_id)?;
    let image = erofs::write(&scanned.tree, scanned.tar_len);
    let image = image.map_err(|source| Error::Inodes { source })?;
    let same = image.bytes == open.inodes.bytes()
        && image.data_len == index.data_len
        && image.copies == index.copies;
    if same { Ok(Whole::Files) } else { Err(Error::Index) }
}

/// Index and piece table by the blob alone, which is all here.
fn rebuild(blob: &Blob, index: &LayerIndex, limits: Limits) -> Result<Built, Error> {
    let failed = |source| Error::Rebuild { source };
    // A TOC layout leaves out what lies between files: headers and padding.
    let limit = index.tar_len.saturating_mul(4).saturating_add(1 << 30);
    let mut decoder = Decoder::new(limit);
    let mut sums = BlobSums::new(blob.len()).map_err(failed)?;
    let mut scan = DataScan::new(limits);
    let (mut of_build, mut of_decoder) = (None, None);
    let push = |bytes: &[u8]| {
        if of_build.is_some() || of_decoder.is_some() {
            return;
        }
        of_build = sums.push(bytes).err();
        let mut take = |bytes: &[u8]| {
            if of_build.is_none() {
                of_build = scan.push(bytes).err();
            }
        };
        of_decoder = decoder.push(bytes, &mut take).err();
    };
    each_step(blob.len(), |buffer, at| blob.read_at(buffer, at), push)
        .map_err(|source| Error::ReadBlob { source })?;
    of_build.map_or(Ok(()), Err).map_err(failed)?;
    of_decoder.map_or(Ok(()), Err).map_err(|source| Error::Decode { source })?;
    let mut late = None;
    let mut take = |bytes: &[u8]| {
        if late.is_none() {
            late = scan.push(bytes).err();
        }
    };
    let decoded = decoder.finish(&mut take).map_err(|source| Error::Decode { source })?;
    late.map_or(Ok(()), Err).map_err(failed)?;
    let (sums, scanned) = (sums.finish().map_err(failed)?, scan.finish().map_err(failed)?);
    assemble(sums, decoded, scanned).map_err(failed)
}

/// Reads `0..len` with `read` and hands it to `take`, a step at a time.
fn each_step(
    len: u64,
    read: impl Fn(&mut [u8], u64) -> io::Result<()>,
    mut take: impl FnMut(&[u8]),
) -> io::Result<()> {
    let mut buffer = vec![0; STEP_BYTES];
    let mut at = 0;
    while at < len {
        let left = usize::try_from(len - at).unwrap_or(usize::MAX);
        let step = &mut buffer[..left.min(STEP_BYTES)];
        read(step, at)?;
        take(step);
        at += step.len() as u64;
    }
    Ok(())
}
