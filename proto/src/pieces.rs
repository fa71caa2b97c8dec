//! Sets of pieces: what a node has, wants, is told to fetch.

use std::ops::Range;

use crate::geometry::MAX_PIECES;

/// A set of piece numbers, as a bitmap.
#[derive(Clone, Debug, Default)]
pub struct PieceSet {
    /// Bit `i % 64` of word `i / 64` is piece `i`; no zero words at the end.
    words: Vec<u64>,
    len: u32,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("a piece set ends in the middle of a run")]
    Odd,
    #[error("a piece set's runs are empty, overlap, or are out of order")]
    Order,
    #[error("a piece set names piece {0}; a blob has at most {MAX_PIECES}")]
    TooHigh(u64),
}

impl PieceSet {
    pub const fn new() -> Self {
        Self { words: Vec::new(), len: 0 }
    }

    /// Pieces `0..pieces`.
    pub fn all(pieces: u32) -> Self {
        std::iter::once(0..pieces).collect()
    }

    #[inline]
    pub const fn len(&self) -> u32 {
        self.len
    }

    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    pub fn contains(&self, piece: u32) -> bool {
        let (word, bit) = place(piece);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Whether it wasn't there before.
    pub fn insert(&mut self, piece: u32) -> bool {
        let (word, bit) = place(piece);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.len += u32::from(new);
        new
    }

    /// Whether it was there.
    pub fn remove(&mut self, piece: u32) -> bool {
        let there = self.contains(piece);
        if there {
            let (word, bit) = place(piece);
            self.words[word] &= !bit;
            self.len -= 1;
            self.trim();
        }
        there
    }

    pub fn insert_all(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        self.recount();
    }

    pub fn remove_all(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
        self.trim();
        self.recount();
    }

    pub fn intersection(&self, other: &Self) -> Self {
        let words = self.words.iter().zip(&other.words).map(|(a, b)| a & b).collect();
        let mut both = Self { words, len: 0 };
        both.trim();
        both.recount();
        both
    }

    pub fn difference(&self, other: &Self) -> Self {
        let mut left = self.clone();
        left.remove_all(other);
        left
    }

    #[inline]
    pub fn intersects(&self, other: &Self) -> bool {
        self.words.iter().zip(&other.words).any(|(a, b)| a & b != 0)
    }

    pub fn contains_all(&self, other: &Self) -> bool {
        let words = other.words.iter().enumerate();
        words.into_iter().all(|(i, word)| word & !self.words.get(i).copied().unwrap_or(0) == 0)
    }

    /// The 64 pieces from `64 × word` on, lowest bit first.
    #[inline]
    pub fn word(&self, word: usize) -> u64 {
        self.words.get(word).copied().unwrap_or(0)
    }

    pub const fn words(&self) -> usize {
        self.words.len()
    }

    /// In ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0_u32..).zip(&self.words).flat_map(|(i, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some(i * 64 + bit)
            })
        })
    }

    pub fn first(&self) -> Option<u32> {
        self.iter().next()
    }

    /// Maximal runs, ascending.
    pub fn runs(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let mut pieces = self.iter().peekable();
        std::iter::from_fn(move || {
            let start = pieces.next()?;
            let mut end = start + 1;
            while pieces.next_if_eq(&end).is_some() {
                end += 1;
            }
            Some(start..end)
        })
    }

    /// The wire form: start, length, start, length …
    pub fn to_wire(&self) -> Vec<u32> {
        self.runs().flat_map(|run| [run.start, run.end - run.start]).collect()
    }

    /// Reads the wire form. Every run is checked; at most 128 KiB is allocated.
    pub fn from_wire(runs: &[u32]) -> Result<Self, Error> {
        let (pairs, rest) = runs.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(Error::Odd);
        }
        let mut next = 0_u64;
        let mut set = Self::new();
        for (i, [start, len]) in pairs.iter().enumerate() {
            let (start_at, end) = (u64::from(*start), u64::from(*start) + u64::from(*len));
            // Runs that touch would be one run.
            if *len == 0 || (i > 0 && start_at <= next) {
                return Err(Error::Order);
            }
            if end > u64::from(MAX_PIECES) {
                return Err(Error::TooHigh(end - 1));
            }
            set.extend(std::iter::once(*start..*start + *len));
            next = end;
        }
        Ok(set)
    }

    fn trim(&mut self) {
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
    }

    fn recount(&mut self) {
        self.len = self.words.iter().map(|word| word.count_ones()).sum();
    }
}

impl PartialEq for PieceSet {
    fn eq(&self, other: &Self) -> bool {
        self.words == other.words
    }
}

impl Eq for PieceSet {}

impl Extend<Range<u32>> for PieceSet {
    fn extend<I: IntoIterator<Item = Range<u32>>>(&mut self, runs: I) {
        for piece in runs.into_iter().flatten() {
            self.insert(piece);
        }
    }
}

impl FromIterator<Range<u32>> for PieceSet {
    fn from_iter<I: IntoIterator<Item = Range<u32>>>(runs: I) -> Self {
        let mut set = Self::new();
        set.extend(runs);
        set
    }
}

impl FromIterator<u32> for PieceSet {
    fn from_iter<I: IntoIterator<Item = u32>>(pieces: I) -> Self {
        pieces.into_iter().map(|piece| piece..piece + 1).collect()
    }
}

const fn place(piece: u32) -> (usize, u64) {
    ((piece / 64) as usize, 1 << (piece % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    fn of(pieces: &BTreeSet<u32>) -> PieceSet {
        pieces.iter().copied().collect()
    }

    #[test]
    fn hostile_wire_forms_are_refused() {
        for (runs, expected) in [
            (&[1][..], Error::Odd),
            (&[1, 0], Error::Order),
            (&[1, 2, 2, 1], Error::Order),
            (&[1, 2, 3, 1], Error::Order),
            (&[9, 1, 3, 1], Error::Order),
            (&[0, u32::MAX], Error::TooHigh(u64::from(u32::MAX) - 1)),
            (&[u32::MAX, u32::MAX], Error::TooHigh(2 * u64::from(u32::MAX) - 1)),
        ] {
            assert_eq!(PieceSet::from_wire(runs), Err(expected), "{runs:?}");
        }
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(
            a in proptest::collection::btree_set(0..300u32, 0..80),
            b in proptest::collection::btree_set(0..300u32, 0..80),
        ) {
            let (x, y) = (of(&a), of(&b));
            prop_assert_eq!(x.iter().collect::<BTreeSet<_>>(), a.clone());
            prop_assert_eq!(x.len() as usize, a.len());
            prop_assert_eq!(x.intersection(&y), of(&(&a & &b)));
            prop_assert_eq!(x.difference(&y), of(&(&a - &b)));
            prop_assert_eq!(x.intersection(&y).len() as usize, (&a & &b).len());
            prop_assert_eq!(x.intersects(&y), !a.is_disjoint(&b));
            prop_assert_eq!(x.contains_all(&y), b.is_subset(&a));
            let mut both = x.clone();
            both.insert_all(&y);
            prop_assert_eq!(&both, &of(&(&a | &b)));
            prop_assert_eq!(both.len() as usize, (&a | &b).len());
            for piece in &b {
                prop_assert_eq!(both.remove(*piece), true);
            }
            prop_assert_eq!(&both, &of(&(&a - &b)));
            prop_assert_eq!(PieceSet::from_wire(&x.to_wire()), Ok(x));
        }

        #[test]
        fn arbitrary_wire_forms_never_panic(runs in proptest::collection::vec(any::<u32>(), 0..50)) {
            if let Ok(set) = PieceSet::from_wire(&runs) {
                prop_assert!(set.len() <= MAX_PIECES);
                prop_assert_eq!(set.to_wire(), runs);
            }
        }
    }
}
