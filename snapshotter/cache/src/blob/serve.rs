//! What it takes to serve a blob to other nodes: which pieces are there, their bytes, and under
//! whose rights they came.
//!
//! `blobs-v1/<sha256 hex>/scopes`: the names of the scopes ([`Scope::name`]), one a line, each ended
//! by a line feed. A name that isn't there was never proved; a damaged file proves nothing.

use std::collections::BTreeSet;
use std::io;
use std::sync::PoisonError;

use bytes::{Bytes, BytesMut};
use skimmer_proto::{PieceSet, PieceTable, Scope};

use super::Blob;
use crate::disk;

const SCOPES: &str = "scopes";

/// Most scopes that a blob is remembered for.
const MAX_SCOPES: usize = 64;

impl Blob {
    /// The pieces on disk, verified or not.
    pub fn present(&self) -> PieceSet {
        let pieces = self.pieces();
        (0..self.geometry.pieces()).filter(|p| pieces.present.get(*p as usize)).collect()
    }

    /// The pieces on disk that match `table`, as far as has been checked.
    pub fn verified(&self, table: &PieceTable) -> PieceSet {
        let pieces = self.pieces();
        (0..self.geometry.pieces()).filter(|p| pieces.is_verified(*p, table)).collect()
    }

    /// Whether the piece is on disk, and, if there is a table, matches it.
    pub fn has(&self, piece: u32, table: Option<&PieceTable>) -> bool {
        let pieces = self.pieces();
        match table {
            Some(table) => pieces.is_verified(piece, table),
            None => pieces.present.get(piece as usize),
        }
    }

    /// The bytes of a piece that is on disk, as they are there; `None` if it isn't. Blocks.
    pub fn read_piece(&self, piece: u32) -> io::Result<Option<Bytes>> {
        let pieces = self.pieces();
        if !pieces.present.get(piece as usize) {
            return Ok(None);
        }
        pieces.read(piece, BytesMut::new()).map(Some)
    }

    /// Under which rights the bytes came here. Blocks briefly the first time.
    pub fn scopes(&self) -> BTreeSet<Scope> {
        let mut scopes = self.scopes.lock().unwrap_or_else(PoisonError::into_inner);
        scopes.get_or_insert_with(|| self.stored_scopes()).clone()
    }

    /// The node has proved its right to read the blob in `scope`: it may be served there. Blocks.
    pub fn allow(&self, scope: &Scope) -> io::Result<()> {
        let mut scopes = self.scopes.lock().unwrap_or_else(PoisonError::into_inner);
        let known = scopes.get_or_insert_with(|| self.stored_scopes());
        let is_writable = !scope.name().contains('\n') && known.len() < MAX_SCOPES;
        if !is_writable || !known.insert(scope.clone()) {
            return Ok(());
        }
        let lines: String = known.iter().map(|scope| format!("{}\n", scope.name())).collect();
        disk::write_atomically(&self.dir, SCOPES, lines.as_bytes())
    }

    fn stored_scopes(&self) -> BTreeSet<Scope> {
        let stored = disk::read_optional(&self.dir.join(SCOPES)).ok().flatten().unwrap_or_default();
        let text = String::from_utf8(stored).unwrap_or_default();
        text.split_terminator('\n').take(MAX_SCOPES).map(Scope::from_name).collect()
    }
}
