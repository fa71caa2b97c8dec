//! Bytes that were verified when they came, read once more: disks forget.

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, PoisonError};

use bytes::{Bytes, BytesMut};
use sha2::{Digest as _, Sha256};
use skimmer_proto::{Digest, PieceTable};

use super::pieces::Pieces;
use super::{Blob, Content, Error};

/// What a check of a blob found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rot {
    /// Read and compared.
    pub bytes: u64,
    /// Pieces that weren't what they had been; they are absent now.
    pub wrong: Vec<u32>,
}

impl Blob {
    /// Compares what is on disk, as far as it was verified, with `table`, or with the blob's digest if
    /// there is none and all of it is there. What is wrong is forgotten: it will be fetched again.
    /// `pause` is told of bytes read, and may end the check. Blocks, and not for async callers.
    pub fn check(
        &self,
        table: Option<&Arc<PieceTable>>,
        pause: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Rot, Error> {
        let pieces = self.pieces();
        let rot = match table {
            Some(table) => self.check_pieces(&pieces, table, pause)?,
            None if self.is_verified() => self.check_whole(&pieces, pause)?,
            None => Rot::default(),
        };
        if rot.wrong.is_empty() || !Arc::ptr_eq(&pieces, &self.pieces()) {
            return Ok(Rot { wrong: Vec::new(), ..rot });
        }
        self.forget_verified(&pieces, &rot.wrong)?;
        Ok(rot)
    }

    /// Whether the pieces of `range` still match `table`; those that don't are forgotten. Blocks.
    pub fn is_still_right(
        &self,
        range: std::ops::Range<u64>,
        table: &PieceTable,
    ) -> Result<bool, Error> {
        let pieces = self.pieces();
        let mut wrong = Vec::new();
        for piece in self.geometry.covering(range) {
            if !pieces.is_verified(piece, table) {
                return Ok(false);
            }
            if !self.read_again(&pieces, piece)?.is_some_and(|bytes| table.verify(piece, &bytes)) {
                wrong.push(piece);
            }
        }
        if !wrong.is_empty() {
            self.forget_verified(&pieces, &wrong)?;
        }
        Ok(wrong.is_empty())
    }

    fn check_pieces(
        &self,
        pieces: &Pieces,
        table: &PieceTable,
        pause: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Rot, Error> {
        let mut rot = Rot::default();
        for piece in 0..self.geometry.pieces() {
            if !pieces.is_verified(piece, table) {
                continue;
            }
            let span = self.geometry.span(piece);
            rot.bytes += span.end - span.start;
            if !self.read_again(pieces, piece)?.is_some_and(|bytes| table.verify(piece, &bytes)) {
                rot.wrong.push(piece);
            }
            if pause(span.end - span.start).is_break() {
                break;
            }
        }
        Ok(rot)
    }

    /// Nobody knows which piece it is if the whole is wrong: all of them, then.
    fn check_whole(
        &self,
        pieces: &Pieces,
        pause: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Rot, Error> {
        let (mut rot, mut hash) = (Rot::default(), Sha256::new());
        let all = 0..self.geometry.pieces();
        for piece in all.clone() {
            let Some(bytes) = self.read_again(pieces, piece)? else {
                return Ok(Rot { wrong: all.collect(), ..rot });
            };
            hash.update(&bytes);
            rot.bytes += bytes.len() as u64;
            if pause(bytes.len() as u64).is_break() {
                return Ok(rot);
            }
        }
        if Digest::from_bytes(hash.finalize().into()) != self.digest {
            rot.wrong = all.collect();
        }
        Ok(rot)
    }

    /// `None`: the disk can't read it any more.
    fn read_again(&self, pieces: &Pieces, piece: u32) -> Result<Option<Bytes>, Error> {
        match pieces.read(piece, BytesMut::new()) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(source) => Err(Error::Read { digest: self.digest, piece, source }),
        }
    }

    /// Another file takes the place of one that may not be written.
    fn forget_verified(&self, pieces: &Arc<Pieces>, wrong: &[u32]) -> Result<(), Error> {
        if pieces.forget_verified(wrong) {
            return Ok(());
        }
        let failed = |source| Error::Distrust { digest: self.digest, source };
        let _turn = self.replacing.blocking_lock();
        if !Arc::ptr_eq(pieces, &self.pieces()) {
            return Ok(());
        }
        let fresh = pieces.salvage(wrong).or_else(|_| pieces.replace()).map_err(failed)?;
        let mut content = self.content.write().unwrap_or_else(PoisonError::into_inner);
        *content = Content { pieces: Arc::new(fresh), table: content.table.clone() };
        drop(content);
        if let Some(source) = self.shared.fetcher.piece_source() {
            source.forgotten(self.digest);
        }
        Ok(())
    }
}
