//! Pieces in the order of how many copies there are, kept while the numbers change one by one.
//!
//! Invariants:
//! - `order` is a permutation of the pieces, ascending in `copies`; `place` is its inverse.
//! - `starts[c]` is the first place of a piece with at least `c` copies.

/// Copies of each piece, those on their way included.
#[derive(Debug, Default)]
pub struct Rarity {
    copies: Vec<u32>,
    order: Vec<u32>,
    place: Vec<u32>,
    starts: Vec<u32>,
}

impl Rarity {
    pub fn new(pieces: u32) -> Self {
        Self {
            copies: vec![0; pieces as usize],
            order: (0..pieces).collect(),
            place: (0..pieces).collect(),
            starts: vec![0, pieces],
        }
    }

    pub fn copies(&self, piece: u32) -> u32 {
        self.copies[piece as usize]
    }

    /// The pieces that have copies, rarest first.
    pub fn existing(&self) -> &[u32] {
        &self.order[self.starts[1] as usize..]
    }

    /// One copy more.
    pub fn add(&mut self, piece: u32) {
        let copies = self.copies[piece as usize];
        let above = copies as usize + 1;
        self.starts[above] -= 1;
        self.swap(piece, self.starts[above]);
        self.copies[piece as usize] = copies + 1;
        if self.starts.len() == above + 1 {
            self.starts.push(u32::try_from(self.order.len()).unwrap_or(u32::MAX));
        }
    }

    /// One copy less.
    pub fn remove(&mut self, piece: u32) {
        let copies = self.copies[piece as usize];
        self.swap(piece, self.starts[copies as usize]);
        self.starts[copies as usize] += 1;
        self.copies[piece as usize] = copies - 1;
    }

    fn swap(&mut self, piece: u32, to: u32) {
        let from = self.place[piece as usize];
        let other = self.order[to as usize];
        self.order.swap(from as usize, to as usize);
        self.place[piece as usize] = to;
        self.place[other as usize] = from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    proptest! {
        #[test]
        fn stays_in_order(steps in proptest::collection::vec((0..7u32, proptest::bool::ANY), 0..200)) {
            let mut rarity = Rarity::new(7);
            let mut expected = [0u32; 7];
            for (piece, more) in steps {
                let count = &mut expected[piece as usize];
                if more {
                    *count += 1;
                    rarity.add(piece);
                } else if *count > 0 {
                    *count -= 1;
                    rarity.remove(piece);
                }
                prop_assert_eq!(&rarity.copies[..], &expected[..]);
                let ordered: Vec<u32> = rarity.order.iter().map(|p| expected[*p as usize]).collect();
                prop_assert!(ordered.is_sorted(), "{:?}", ordered);
                let existing = expected.iter().filter(|count| **count > 0).count();
                prop_assert_eq!(rarity.existing().len(), existing);
                for (place, piece) in rarity.order.iter().enumerate() {
                    prop_assert_eq!(rarity.place[*piece as usize] as usize, place);
                }
            }
        }
    }
}
