//! Presence bits: in memory, where setting one takes no lock, and as a checkpoint file.
//!
//! A bit goes from 0 to 1 after its bytes are written: concurrent writers commute, and a snapshot
//! taken before the data is synced is a safe record of it. It goes back to 0 when the bytes turn out
//! wrong, or are to be given up. Who clears it keeps away meanwhile whoever may be setting it; right
//! bytes go only after a checkpoint without their bit. To forget all, the owner starts a new set.
//!
//! A checkpoint file (integers little-endian), version 1, named `pieces` or `chunks`:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | magic `SKBITS01` |
//! | 8 | length of the data file |
//! | 8 | number of bits, n |
//! | 8 | number of planes, p |
//! | 32 | subject: what the bits were checked against (the owner says), or zeros |
//! | p × 8 × ⌈n/64⌉ | the planes; bit i is bit i mod 64 of word ⌊i/64⌋; bits past n are 0 |
//! | 32 | SHA-256 of everything before |
//!
//! A file that is cut short, damaged or of another shape is an error here and *nothing is present*
//! to the owner.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use skimmer_proto::Digest;

const MAGIC: &[u8; 8] = b"SKBITS01";
const HEADER_LEN: usize = 8 + 3 * 8 + 32;
const SUM_LEN: usize = 32;

/// A set of small numbers below a fixed length.
#[derive(Debug)]
pub struct Bits {
    words: Box<[AtomicU64]>,
    len: usize,
    ones: AtomicUsize,
}

impl Bits {
    pub fn new(len: usize) -> Self {
        let words = (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, len, ones: AtomicUsize::new(0) }
    }

    pub fn full(len: usize) -> Self {
        let bits = Self::new(len);
        for bit in 0..len {
            bits.set(bit);
        }
        bits
    }

    pub const fn len(&self) -> usize {
        self.len
    }

    /// False past the end.
    pub fn get(&self, bit: usize) -> bool {
        let word = self.words.get(bit / 64);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (bit % 64) & 1 == 1)
    }

    /// Whether the bit was 0. A bit past the end is ignored.
    pub fn set(&self, bit: usize) -> bool {
        if bit >= self.len {
            return false;
        }
        let mask = 1 << (bit % 64);
        let fresh = self.words[bit / 64].fetch_or(mask, Ordering::AcqRel) & mask == 0;
        self.ones.fetch_add(usize::from(fresh), Ordering::AcqRel);
        fresh
    }

    /// Whether the bit was 1. Only for owners that keep away meanwhile whoever may be setting it.
    pub fn clear(&self, bit: usize) -> bool {
        if bit >= self.len {
            return false;
        }
        let mask = 1 << (bit % 64);
        let stale = self.words[bit / 64].fetch_and(!mask, Ordering::AcqRel) & mask != 0;
        self.ones.fetch_sub(usize::from(stale), Ordering::AcqRel);
        stale
    }

    pub fn ones(&self) -> usize {
        self.ones.load(Ordering::Acquire)
    }

    pub fn all(&self) -> bool {
        self.ones() == self.len
    }

    /// The bits of `range`, cut to the length, that are 0.
    pub fn zeros_in(&self, range: Range<usize>) -> Vec<usize> {
        (range.start..range.end.min(self.len)).filter(|bit| !self.get(*bit)).collect()
    }

    pub fn snapshot(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    fn from_words(words: Vec<u64>, len: usize) -> Self {
        let ones = words.iter().map(|word| word.count_ones() as usize).sum();
        let words = words.into_iter().map(AtomicU64::new).collect();
        Self { words, len, ones: AtomicUsize::new(ones) }
    }
}

/// What a checkpoint must agree with to be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub data_len: u64,
    pub bits: usize,
    pub planes: usize,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("checkpoint is {actual} bytes, expected {expected}")]
    Length { actual: usize, expected: usize },
    #[error("checkpoint has an unknown magic number")]
    Magic,
    #[error("checkpoint does not match its checksum")]
    Sum,
    #[error("checkpoint is of another file: {actual:?}, expected {expected:?}")]
    Shape { actual: [u64; 3], expected: [u64; 3] },
    #[error("checkpoint sets bits past its end")]
    Stray,
}

/// The checkpoint file of `planes`, each a [`Bits::snapshot`].
pub fn encode(shape: Shape, subject: &[u8; 32], planes: &[Vec<u64>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(file_len(shape));
    out.extend_from_slice(MAGIC);
    for field in fields(shape) {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.extend_from_slice(subject);
    for word in planes.iter().flatten() {
        out.extend_from_slice(&word.to_le_bytes());
    }
    let sum = Digest::of(&out);
    out.extend_from_slice(sum.as_bytes());
    out
}

/// Reads a checkpoint of a known shape: its subject and its planes. Allocates nothing beyond them.
pub fn decode(shape: Shape, bytes: &[u8]) -> Result<([u8; 32], Vec<Bits>), Error> {
    let expected = file_len(shape);
    if bytes.len() != expected {
        return Err(Error::Length { actual: bytes.len(), expected });
    }
    let (body, sum) = bytes.split_at(expected - SUM_LEN);
    if Digest::of(body).as_bytes() != sum {
        return Err(Error::Sum);
    }
    let (header, planes) = body.split_at(HEADER_LEN);
    let (magic, header) = header.split_at(MAGIC.len());
    let (numbers, subject) = header.split_at(3 * 8);
    if magic != MAGIC {
        return Err(Error::Magic);
    }
    let actual = <[u64; 3]>::try_from(words_of(numbers)).unwrap_or_default();
    if actual != fields(shape) {
        return Err(Error::Shape { actual, expected: fields(shape) });
    }
    let words = shape.bits.div_ceil(64);
    let planes: Vec<Vec<u64>> = (0..shape.planes)
        .map(|plane| words_of(&planes[plane * words * 8..(plane + 1) * words * 8]))
        .collect();
    let spare = shape.bits % 64;
    let stray = |plane: &Vec<u64>| spare != 0 && plane.last().is_some_and(|w| w >> spare != 0);
    if planes.iter().any(stray) {
        return Err(Error::Stray);
    }
    let subject = <[u8; 32]>::try_from(subject).unwrap_or_default();
    Ok((subject, planes.into_iter().map(|words| Bits::from_words(words, shape.bits)).collect()))
}

const fn file_len(shape: Shape) -> usize {
    HEADER_LEN + shape.planes * 8 * shape.bits.div_ceil(64) + SUM_LEN
}

const fn fields(shape: Shape) -> [u64; 3] {
    [shape.data_len, shape.bits as u64, shape.planes as u64]
}

fn words_of(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    fn shape(bits: usize, planes: usize) -> Shape {
        Shape { data_len: 77, bits, planes }
    }

    fn bits_of(len: usize, set: &[usize]) -> Bits {
        let bits = Bits::new(len);
        for bit in set {
            bits.set(*bit);
        }
        bits
    }

    proptest! {
        #[test]
        fn a_checkpoint_reads_back(len in 0usize..500, a in any::<Vec<u16>>(), subject in any::<[u8; 32]>()) {
            let set: Vec<usize> = a.iter().map(|n| usize::from(*n)).collect();
            let planes = [bits_of(len, &set), Bits::full(len)];
            let bytes = encode(shape(len, 2), &subject, &planes.each_ref().map(Bits::snapshot));
            let (read, back) = decode(shape(len, 2), &bytes).unwrap();
            prop_assert_eq!(read, subject);
            for (was, is) in planes.iter().zip(&back) {
                prop_assert_eq!(was.snapshot(), is.snapshot());
                prop_assert_eq!(was.ones(), is.ones());
            }
            prop_assert!(back[1].all());
            let mut expected: Vec<usize> = set.into_iter().filter(|n| *n < len).collect();
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(back[0].ones(), expected.len());
            let zeros = back[0].zeros_in(0..len + 9);
            prop_assert_eq!(zeros.len() + expected.len(), len);
            prop_assert!(zeros.iter().all(|bit| !expected.contains(bit)));
        }

        #[test]
        fn any_damage_is_noticed(at in any::<proptest::sample::Index>(), flip in 1..=255u8, cut in any::<proptest::sample::Index>()) {
            let shape = shape(100, 2);
            let planes = [bits_of(100, &[3, 64]), bits_of(100, &[99])];
            let bytes = encode(shape, &[9; 32], &planes.each_ref().map(Bits::snapshot));
            let mut damaged = bytes.clone();
            damaged[at.index(bytes.len())] ^= flip;
            prop_assert!(decode(shape, &damaged).is_err());
            prop_assert!(decode(shape, &bytes[..cut.index(bytes.len())]).is_err());
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in any::<Vec<u8>>(), bits in 0usize..300, planes in 0usize..3) {
            prop_assert!(decode(shape(bits, planes), &bytes).is_err());
        }

        #[test]
        fn hostile_words_with_a_right_checksum_stay_in_bounds(words in proptest::collection::vec(any::<u64>(), 2)) {
            let bytes = encode(shape(70, 1), &[0; 32], std::slice::from_ref(&words));
            match decode(shape(70, 1), &bytes) {
                Ok((_, planes)) => {
                    prop_assert!(planes[0].ones() <= 70);
                    prop_assert_eq!(planes[0].ones() + planes[0].zeros_in(0..70).len(), 70);
                }
                Err(error) => prop_assert_eq!((error, words[1] >> 6 != 0), (Error::Stray, true)),
            }
        }
    }

    #[test]
    fn another_shape_is_refused() {
        let bytes = encode(shape(64, 1), &[0; 32], &[Bits::new(64).snapshot()]);
        for other in
            [Shape { data_len: 78, ..shape(64, 1) }, Shape { data_len: 77, bits: 63, planes: 1 }]
        {
            assert!(matches!(decode(other, &bytes), Err(Error::Shape { .. })), "{other:?}");
        }
    }

    #[test]
    fn bits_past_the_end_do_not_exist() {
        let bits = Bits::new(5);
        assert!(!bits.set(5) && !bits.get(5) && !bits.clear(1000) && !bits.get(1000));
        assert!(bits.set(4) && !bits.set(4) && bits.clear(4) && !bits.clear(4));
        assert_eq!(bits.ones(), 0);
    }
}
