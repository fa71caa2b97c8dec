//! Dense bit sets over the slots of a task, and matrices of pieces × slots.

/// One bit a slot, and one for each word of them that isn't zero.
#[derive(Clone, Debug, Default)]
pub struct Bits {
    words: Vec<u64>,
    filled: Vec<u64>,
}

impl Bits {
    /// Room for `words × 64` slots at least.
    pub fn grow(&mut self, words: usize) {
        if self.words.len() < words {
            self.words.resize(words, 0);
            self.filled.resize(words.div_ceil(64), 0);
        }
    }

    pub fn set(&mut self, slot: u32, value: bool) {
        let word = slot / 64;
        write(&mut self.words[word as usize], slot, value);
        write(&mut self.filled[word as usize / 64], word, self.words[word as usize] != 0);
    }

    pub fn get(&self, slot: u32) -> bool {
        self.words.get(slot as usize / 64).is_some_and(|word| word & mask(slot) != 0)
    }

    pub fn word(&self, word: u32) -> u64 {
        self.words[word as usize]
    }

    pub fn is_empty(&self) -> bool {
        self.filled.iter().all(|filled| *filled == 0)
    }

    /// Shows `visit` the words that aren't zero, among those in `within`, beginning somewhere that depends on `turn`, until it
    /// returns true. Returns whether it did.
    pub fn visit(&self, within: &Words, turn: u32, mut visit: impl FnMut(u32) -> bool) -> bool {
        let count = self.filled.len().min(within.bits.len());
        if count == 0 {
            return false;
        }
        let begin = turn as usize % (count * 64);
        let (first, high) = (begin / 64, u64::MAX << (begin % 64));
        // The first of these comes twice: its upper part, and at the end what is below.
        for step in 0..=count {
            let at = (first + step) % count;
            let mut rest = self.filled[at] & within.bits[at];
            if step == 0 {
                rest &= high;
            } else if step == count {
                rest &= !high;
            }
            let base = u32::try_from(at).unwrap_or(0) * 64;
            while rest != 0 {
                if visit(base + rest.trailing_zeros()) {
                    return true;
                }
                rest &= rest - 1;
            }
        }
        false
    }
}

/// A set of words of slots.
#[derive(Clone, Debug, Default)]
pub struct Words {
    bits: Vec<u64>,
}

impl Words {
    pub fn insert(&mut self, word: u32) {
        let at = word as usize / 64;
        if self.bits.len() <= at {
            self.bits.resize(at + 1, 0);
        }
        write(&mut self.bits[at], word, true);
    }

    /// Ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        (0..).zip(&self.bits).flat_map(|(at, bits)| slots(at, *bits))
    }
}

/// One row of slots a piece.
#[derive(Debug, Default)]
pub struct Matrix {
    rows: u32,
    /// Words of a row.
    width: usize,
    words: Vec<u64>,
}

impl Matrix {
    pub fn new(rows: u32) -> Self {
        Self { rows, width: 0, words: Vec::new() }
    }

    /// Makes room for `width × 64` slots at least.
    pub fn grow(&mut self, width: usize) {
        if width <= self.width {
            return;
        }
        let wider = width.max(self.width * 2);
        let mut words = vec![0; self.rows as usize * wider];
        if self.width > 0 {
            for (new, old) in words.chunks_mut(wider).zip(self.words.chunks(self.width)) {
                new[..self.width].copy_from_slice(old);
            }
        }
        (self.width, self.words) = (wider, words);
    }

    pub fn set(&mut self, row: u32, slot: u32, value: bool) {
        let at = row as usize * self.width + slot as usize / 64;
        write(&mut self.words[at], slot, value);
    }

    pub fn row(&self, row: u32) -> &[u64] {
        &self.words[row as usize * self.width..][..self.width]
    }
}

/// The slots of `word`'s bits.
pub fn slots(word: u32, mut bits: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = (bits != 0).then(|| bits.trailing_zeros())?;
        bits &= bits - 1;
        Some(word * 64 + bit)
    })
}

const fn mask(slot: u32) -> u64 {
    1 << (slot % 64)
}

const fn write(word: &mut u64, slot: u32, value: bool) {
    if value {
        *word |= mask(slot);
    } else {
        *word &= !mask(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filled_words_come_once_from_anywhere_on() {
        let (mut bits, mut within) = (Bits::default(), Words::default());
        bits.grow(130);
        [0, 7, 64, 100, 129].into_iter().for_each(|word| within.insert(word));
        for slot in [3, 64 * 7, 64 * 7 + 1, 64 * 64, 64 * 129 + 63, 64 * 100] {
            bits.set(slot, true);
        }
        bits.set(64 * 100, false);
        let all = |bits: &Bits, turn| {
            let mut words = Vec::new();
            bits.visit(&within, turn, |word| {
                words.push(word);
                false
            });
            words
        };
        for turn in 0..400 {
            let mut words = all(&bits, turn);
            words.sort_unstable();
            assert_eq!(words, [0, 7, 64, 129], "turn {turn}");
        }
        assert_eq!(all(&bits, 8)[0], 64);
        assert_eq!(all(&bits, 65)[0], 129);
        assert_eq!(within.iter().count(), 5);
        assert!(!bits.is_empty() && Bits::default().is_empty());
        assert!(all(&Bits::default(), 3).is_empty());
    }

    #[test]
    fn a_grown_matrix_keeps_its_bits() {
        let mut matrix = Matrix::new(3);
        matrix.grow(1);
        matrix.set(1, 5, true);
        matrix.set(2, 63, true);
        matrix.grow(2);
        matrix.set(2, 64, true);
        matrix.set(1, 6, true);
        matrix.set(1, 6, false);
        let all: Vec<Vec<u32>> = (0..3)
            .map(|row| (0..).zip(matrix.row(row)).flat_map(|(w, bits)| slots(w, *bits)).collect())
            .collect();
        assert_eq!(all, [vec![], vec![5], vec![63, 64]]);
    }
}
