//! How a blob is cut into pieces. Both ends of a transfer compute it from the blob's length alone.

use std::ops::Range;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The most pieces that a blob can have.
pub const MAX_PIECES: u32 = 1 << 20;

/// The pieces of one blob: all `piece_len` bytes long but the last, which may be shorter.
///
/// Piece lengths are powers of two and multiples of BLAKE3's 1 KiB chunk, so that the chaining
/// values of the pieces roll up to the blob's BLAKE3 root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    blob_len: u64,
}

impl Geometry {
    /// The largest blob: 4 TiB, a million pieces.
    pub const MAX_BLOB_LEN: u64 = 4 << 40;

    /// The geometry of a blob of `blob_len` bytes; `None` above [`Self::MAX_BLOB_LEN`].
    pub const fn of(blob_len: u64) -> Option<Self> {
        if blob_len > Self::MAX_BLOB_LEN { None } else { Some(Self { blob_len }) }
    }

    pub const fn blob_len(self) -> u64 {
        self.blob_len
    }

    /// 256 KiB for blobs up to 64 MiB, 1 MiB up to 8 GiB, 4 MiB above.
    pub const fn piece_len(self) -> u64 {
        if self.blob_len <= 64 * MIB {
            256 * KIB
        } else if self.blob_len <= 8 * GIB {
            MIB
        } else {
            4 * MIB
        }
    }

    /// The number of pieces; none for an empty blob.
    #[expect(clippy::cast_possible_truncation, reason = "at most 4 TiB / 4 MiB = 2^20 pieces")]
    pub const fn pieces(self) -> u32 {
        self.blob_len.div_ceil(self.piece_len()) as u32
    }

    /// The bytes of piece `piece`; empty past the end.
    pub fn span(self, piece: u32) -> Range<u64> {
        let start = (u64::from(piece) * self.piece_len()).min(self.blob_len);
        start..(start + self.piece_len()).min(self.blob_len)
    }

    /// The pieces that `bytes`, cut to the blob, touches.
    #[expect(clippy::cast_possible_truncation, reason = "bounded by the number of pieces")]
    pub fn covering(self, bytes: Range<u64>) -> Range<u32> {
        let end = bytes.end.min(self.blob_len);
        if bytes.start >= end {
            return 0..0;
        }
        (bytes.start / self.piece_len()) as u32..end.div_ceil(self.piece_len()) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    proptest! {
        #[test]
        fn spans_tile_the_blob(len in 0..40 * GIB) {
            let g = Geometry::of(len).unwrap();
            let n = g.pieces();
            prop_assert_eq!(g.covering(0..len), 0..n);
            prop_assert!(n == 0 || g.span(n - 1).end == len);
            prop_assert!(g.span(n).is_empty());
            if n > 1 {
                prop_assert_eq!(g.span(0).end, g.span(1).start);
            }
        }

        #[test]
        fn covering_covers(len in 1..4 * GIB, a in 0..5 * GIB, n in 0..GIB) {
            let g = Geometry::of(len).unwrap();
            let pieces = g.covering(a..a + n);
            if pieces.is_empty() {
                prop_assert!(n == 0 || a >= len);
            } else {
                prop_assert!(g.span(pieces.start).contains(&a));
                prop_assert!(g.span(pieces.end - 1).end >= (a + n).min(len));
            }
        }
    }

    #[test]
    fn piece_lengths() {
        for (len, piece_len, pieces) in [
            (0, 256 * KIB, 0),
            (1, 256 * KIB, 1),
            (64 * MIB, 256 * KIB, 256),
            (64 * MIB + 1, MIB, 65),
            (8 * GIB, MIB, 8192),
            (8 * GIB + 1, 4 * MIB, 2049),
            (Geometry::MAX_BLOB_LEN, 4 * MIB, 1 << 20),
        ] {
            let g = Geometry::of(len).unwrap();
            assert_eq!((g.piece_len(), g.pieces()), (piece_len, pieces), "{len}");
        }
        assert_eq!(Geometry::of(Geometry::MAX_BLOB_LEN + 1), None);
    }
}
