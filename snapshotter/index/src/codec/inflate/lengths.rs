//! The lengths of a block's codes, and what their symbols stand for.

use super::bits::Bits;
use super::huffman::{Entry, Table};
use super::{Codes, Error, Given};

/// In this order the lengths of the lengths' own codes come.
const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

const END_OF_BLOCK: usize = 256;

/// Symbols of code lengths: the last one 3 times or more often, 3 zeros or more, 11 zeros or more.
const AGAIN: usize = 16;
const ZEROS: usize = 17;
const MANY_ZEROS: usize = 18;

/// First lengths and extra bits of the symbols from 257 on.
const LENGTHS: [(u16, u8); 29] = [
    (3, 0),
    (4, 0),
    (5, 0),
    (6, 0),
    (7, 0),
    (8, 0),
    (9, 0),
    (10, 0),
    (11, 1),
    (13, 1),
    (15, 1),
    (17, 1),
    (19, 2),
    (23, 2),
    (27, 2),
    (31, 2),
    (35, 3),
    (43, 3),
    (51, 3),
    (59, 3),
    (67, 4),
    (83, 4),
    (99, 4),
    (115, 4),
    (131, 5),
    (163, 5),
    (195, 5),
    (227, 5),
    (258, 0),
];

/// First distances and extra bits.
const DISTANCES: [(u16, u8); 30] = [
    (1, 0),
    (2, 0),
    (3, 0),
    (4, 0),
    (5, 1),
    (7, 1),
    (9, 2),
    (13, 2),
    (17, 3),
    (25, 3),
    (33, 4),
    (49, 4),
    (65, 5),
    (97, 5),
    (129, 6),
    (193, 6),
    (257, 7),
    (385, 7),
    (513, 8),
    (769, 8),
    (1025, 9),
    (1537, 9),
    (2049, 10),
    (3073, 10),
    (4097, 11),
    (6145, 11),
    (8193, 12),
    (12289, 12),
    (16385, 13),
    (24577, 13),
];

fn of_literal_table(symbol: usize) -> Entry {
    match symbol {
        0..END_OF_BLOCK => Entry::literal(symbol.to_le_bytes()[0]),
        END_OF_BLOCK => Entry::END,
        _ => LENGTHS.get(symbol - END_OF_BLOCK - 1).map_or(Entry::INVALID, of_pair),
    }
}

fn of_distance_table(symbol: usize) -> Entry {
    DISTANCES.get(symbol).map_or(Entry::INVALID, of_pair)
}

/// The symbol itself; what its extra bits say comes on top.
fn of_length_table(symbol: usize) -> Entry {
    let extra = match symbol {
        AGAIN => 2,
        ZEROS => 3,
        MANY_ZEROS => 7,
        _ => 0,
    };
    Entry::value(u16::from_le_bytes([symbol.to_le_bytes()[0], 0]), extra)
}

fn of_pair((base, extra): &(u16, u8)) -> Entry {
    Entry::value(*base, *extra)
}

impl Codes {
    /// Takes the codes with these lengths.
    pub fn set(&mut self, (literals, distances): (&[u8], &[u8])) -> Result<(), Error> {
        self.fixed = false;
        self.short.clear();
        let short = |code, entry| self.short.push((code, entry));
        self.literals.build(literals, of_literal_table, short)?;
        self.joined.build(&self.short);
        self.distances.build(distances, of_distance_table, |_, _| {})?;
        Ok(())
    }

    pub fn set_fixed(&mut self) -> Result<(), Error> {
        if !self.fixed {
            let mut literals = [8; 288];
            literals[144..256].fill(9);
            literals[256..280].fill(7);
            self.set((&literals, &[5; 32]))?;
            self.fixed = true;
        }
        Ok(())
    }
}

/// The head of a block with codes of its own, as far as it was read.
pub(super) struct Lengths {
    stage: Stage,
    literals: usize,
    distances: usize,
    table: Table<7, 128>,
    /// Of the stage's, this many are there.
    have: usize,
    lens: [u8; 320],
}

enum Stage {
    Counts,
    OfLengths { count: usize },
    OfSymbols,
}

impl Default for Lengths {
    fn default() -> Self {
        let (stage, table) = (Stage::Counts, Table::new());
        Self { stage, literals: 0, distances: 0, table, have: 0, lens: [0; 320] }
    }
}

impl Lengths {
    /// The lengths of literals' and distances' codes, once all of them are there.
    pub fn read(
        &mut self,
        bits: &mut Bits,
        given: &mut Given<'_>,
    ) -> Result<Option<(&[u8], &[u8])>, Error> {
        loop {
            match self.stage {
                Stage::Counts => {
                    if !bits.fill(14, given) {
                        return Ok(None);
                    }
                    self.literals = bits.take(5) + 257;
                    self.distances = bits.take(5) + 1;
                    if self.literals > 286 || self.distances > DISTANCES.len() {
                        return Err(Error::Data("too many length or distance symbols"));
                    }
                    self.stage = Stage::OfLengths { count: bits.take(4) + 4 };
                }
                Stage::OfLengths { count } => {
                    for place in &ORDER[self.have..count] {
                        if !bits.fill(3, given) {
                            return Ok(None);
                        }
                        self.lens[*place] = bits.take(3).to_le_bytes()[0];
                        self.have += 1;
                    }
                    if !self.table.build(&self.lens[..ORDER.len()], of_length_table, |_, _| {})? {
                        return Err(Error::Data("codes of code lengths are missing"));
                    }
                    (self.stage, self.have) = (Stage::OfSymbols, 0);
                }
                Stage::OfSymbols => {
                    let all = self.literals + self.distances;
                    while self.have < all {
                        if !self.read_some(bits, given)? {
                            return Ok(None);
                        }
                    }
                    if self.lens[END_OF_BLOCK] == 0 {
                        return Err(Error::Data("no code for the end of the block"));
                    }
                    return Ok(Some(self.lens[..all].split_at(self.literals)));
                }
            }
        }
    }

    /// One length, or several that are the same.
    fn read_some(&mut self, bits: &mut Bits, given: &mut Given<'_>) -> Result<bool, Error> {
        let Some(entry) = bits.entry(&self.table, 0, given) else { return Ok(false) };
        let value = entry.value_of(bits.hold());
        bits.skip(entry.bits());
        let before = self.have.checked_sub(1).map(|at| self.lens[at]);
        let (len, count) = match (entry.base(), before) {
            (AGAIN, None) => return Err(Error::Data("a code length repeats none")),
            (AGAIN, Some(len)) => (len, 3 + value - AGAIN),
            (ZEROS, _) => (0, 3 + value - ZEROS),
            (MANY_ZEROS, _) => (0, 11 + value - MANY_ZEROS),
            (len, _) => (len.to_le_bytes()[0], 1),
        };
        let end = self.have + count;
        if end > self.literals + self.distances {
            return Err(Error::Data("more code lengths than symbols"));
        }
        self.lens[self.have..end].fill(len);
        self.have = end;
        Ok(true)
    }
}
