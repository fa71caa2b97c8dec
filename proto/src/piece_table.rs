//! The piece table: what lets any piece of a blob be verified on its own, and says what the blob
//! decodes to. Content-addressed, byte-identical wherever it is built; it is what gets signed.
//!
//! On the wire and on disk (integers little-endian):
//!
//! | bytes | what |
//! |---|---|
//! | 8 | magic `SKPIECE1` |
//! | 8 | blob length |
//! | 32 | blob SHA-256 |
//! | 32 | DiffID: SHA-256 of the decoded tar |
//! | 32 | SHA-256 of the encoded layer index |
//! | 32 | BLAKE3 root of the blob |
//! | 32 × pieces | BLAKE3 chaining value of each piece (the root, if there is one piece) |
//!
//! The number of pieces follows from the length by [`Geometry`]. The values must roll up to the root.

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::{Digest, Geometry};

const MAGIC: &[u8; 8] = b"SKPIECE1";
const HEADER_LEN: usize = 8 + 8 + 4 * 32;

/// See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PieceTable {
    pub geometry: Geometry,
    pub blob: Digest,
    pub diff_id: Digest,
    /// SHA-256 of the encoded layer index.
    pub index: Digest,
    root: [u8; 32],
    values: Vec<[u8; 32]>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("piece table is {actual} bytes, expected {expected}")]
    Length { actual: usize, expected: usize },
    #[error("piece table has an unknown magic number")]
    Magic,
    #[error("piece table is for a blob of {0} bytes, more than the maximum")]
    BlobLength(u64),
    #[error("piece table needs {expected} values, has {actual}")]
    Values { actual: usize, expected: u32 },
    #[error("piece values do not roll up to the table's root")]
    Root,
}

impl PieceTable {
    /// The table of a blob whose pieces have the chaining `values` (see [`piece_value`]).
    pub fn new(
        geometry: Geometry,
        blob: Digest,
        diff_id: Digest,
        index: Digest,
        values: Vec<[u8; 32]>,
    ) -> Result<Self, Error> {
        if values.len() != geometry.pieces() as usize {
            return Err(Error::Values { actual: values.len(), expected: geometry.pieces() });
        }
        let root = roll_up(&values);
        Ok(Self { geometry, blob, diff_id, index, root, values })
    }

    /// Whether `bytes` are piece `piece` of the blob. False for a piece that doesn't exist.
    pub fn verify(&self, piece: u32, bytes: &[u8]) -> bool {
        self.values
            .get(piece as usize)
            .is_some_and(|value| *value == piece_value(self.geometry, piece, bytes))
    }

    /// The value of piece `piece` (see [`piece_value`]); `None` if there is no such piece.
    pub fn value(&self, piece: u32) -> Option<&[u8; 32]> {
        self.values.get(piece as usize)
    }

    /// BLAKE3 root of the whole blob.
    pub const fn root(&self) -> &[u8; 32] {
        &self.root
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN + 32 * self.values.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&self.geometry.blob_len().to_le_bytes());
        for digest in [&self.blob, &self.diff_id, &self.index] {
            out.extend_from_slice(digest.as_bytes());
        }
        out.extend_from_slice(&self.root);
        out.extend_from_slice(self.values.as_flattened());
        out
    }

    /// Reads a table from outside: every field is checked, nothing is allocated beyond `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let short = Error::Length { actual: bytes.len(), expected: HEADER_LEN };
        let (header, values) = bytes.split_at_checked(HEADER_LEN).ok_or(short)?;
        let (magic, header) = header.split_at(8);
        let (len, digests) = header.split_at(8);
        if magic != MAGIC {
            return Err(Error::Magic);
        }
        let len = len.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
        let geometry = Geometry::of(len).ok_or(Error::BlobLength(len))?;
        let expected = HEADER_LEN + 32 * geometry.pieces() as usize;
        if bytes.len() != expected {
            return Err(Error::Length { actual: bytes.len(), expected });
        }
        let digests = digests.as_chunks::<32>().0;
        let values = values.as_chunks::<32>().0.to_vec();
        let [blob, diff_id, index] = [0, 1, 2].map(|i| Digest::from_bytes(digests[i]));
        let table = Self::new(geometry, blob, diff_id, index, values)?;
        if table.root != digests[3] {
            return Err(Error::Root);
        }
        Ok(table)
    }
}

/// The BLAKE3 value of piece `piece`: its chaining value inside the blob, or the root of a blob
/// that has no other piece.
pub fn piece_value(geometry: Geometry, piece: u32, bytes: &[u8]) -> [u8; 32] {
    if geometry.pieces() == 1 {
        return *blake3::hash(bytes).as_bytes();
    }
    let offset = u64::from(piece) * geometry.piece_len();
    blake3::Hasher::new().set_input_offset(offset).update(bytes).finalize_non_root()
}

/// The root of a tree whose complete subtrees, left to right, have these values.
fn roll_up(values: &[[u8; 32]]) -> [u8; 32] {
    match values {
        [] => *blake3::hash(b"").as_bytes(),
        [one] => *one,
        many => {
            let (left, right) = many.split_at(left_len(many.len()));
            *merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash).as_bytes()
        }
    }
}

/// Recursion depth is log2 of the number of pieces, at most 20.
fn subtree(values: &[[u8; 32]]) -> [u8; 32] {
    match values {
        [one] => *one,
        many => {
            let (left, right) = many.split_at(left_len(many.len()));
            merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

/// BLAKE3's left subtree is the largest power of two of leaves that leaves something on the right.
const fn left_len(leaves: usize) -> usize {
    leaves.next_power_of_two() / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    fn table_of(blob: &[u8]) -> PieceTable {
        let geometry = Geometry::of(blob.len() as u64).unwrap();
        let values = (0..geometry.pieces())
            .map(|piece| piece_value(geometry, piece, part(geometry, piece, blob)))
            .collect();
        let [diff_id, index] = [Digest::of(b"tar"), Digest::of(b"index")];
        PieceTable::new(geometry, Digest::of(blob), diff_id, index, values).unwrap()
    }

    #[expect(clippy::cast_possible_truncation, reason = "test blobs are small")]
    fn part(geometry: Geometry, piece: u32, blob: &[u8]) -> &[u8] {
        let span = geometry.span(piece);
        &blob[span.start as usize..span.end as usize]
    }

    #[test]
    fn root_is_the_blobs_blake3_whatever_the_number_of_pieces() {
        for len in [0, 1, 262_143, 262_144, 262_145, 700_000, 3 << 20, (5 << 20) + 17] {
            let blob: Vec<u8> = (0..=250).cycle().step_by(7).take(len).collect();
            let table = table_of(&blob);
            assert_eq!(table.root(), blake3::hash(&blob).as_bytes(), "{len}");
            assert_eq!(PieceTable::decode(&table.encode()), Ok(table.clone()), "{len}");
            for piece in 0..table.geometry.pieces() {
                assert!(table.verify(piece, part(table.geometry, piece, &blob)));
                assert!(!table.verify(piece, b"something else"));
            }
            assert!(!table.verify(table.geometry.pieces(), b""));
        }
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_noticed_or_changes_the_table(at in any::<proptest::sample::Index>(), flip in 1..=255u8) {
            let table = table_of(&vec![7; 600_000]);
            let mut bytes = table.encode();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(other) = PieceTable::decode(&bytes) {
                prop_assert!(other != table);
                prop_assert_eq!(other.encode(), bytes);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1000)) {
            prop_assert!(PieceTable::decode(&bytes).is_err());
        }
    }
}
