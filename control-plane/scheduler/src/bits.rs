//! Dense bit sets over the slots of a task, and matrices of pieces × slots.

/// One bit a slot.
#[derive(Clone, Debug, Default)]
pub struct Bits {
    words: Vec<u64>,
}

impl Bits {
    /// Room for `words × 64` slots at least.
    pub fn grow(&mut self, words: usize) {
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
    }

    pub fn set(&mut self, slot: u32, value: bool) {
        write(&mut self.words[slot as usize / 64], slot, value);
    }

    pub fn get(&self, slot: u32) -> bool {
        self.words.get(slot as usize / 64).is_some_and(|word| word & mask(slot) != 0)
    }

    pub fn word(&self, word: u32) -> u64 {
        self.words[word as usize]
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
