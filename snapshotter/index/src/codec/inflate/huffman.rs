//! Tables by which symbols are decoded, up to three at a time.
//!
//! A table's first `2^ROOT` entries are indexed by the next bits of the stream. What a code longer than that stands for
//! is in a table of its own behind them, which the first one names. Where two literals and a copy's length, or some of
//! them, are not longer than `ROOT` bits together, one entry of [`Joined`] stands for all of them.

use super::Error;

/// Longest code that deflate has, in bits.
pub(super) const MAX_BITS: usize = 15;

/// What the next bits stand for.
///
/// From the lowest bit on: 6 bits, by how many bits to go on, extra bits among them; 2 bits, the number of literals, or 3
/// for something else. Behind literals or none, 16 bits of them, the first one lowest, and 8 bits, the length of the copy
/// that follows (0: none does). Else 4 bits, the length of the code (of another table: the number of bits that choose from
/// it), 2 bits, a [`Kind`], 2 bits of nothing, and 16 bits, the value to which the extra bits are added (where the other
/// table starts).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry(u32);

/// Of entries that are neither literals nor a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// A length or distance.
    Value,
    /// Another table.
    Table,
    EndOfBlock,
    /// Nothing that there is.
    Invalid,
}

/// What is neither literals nor a copy.
const OTHER: u32 = 3;

impl Entry {
    pub const INVALID: Self = Self::of(Kind::Invalid, 0, 0, 0);
    /// Its code's length is still to be set, as of all but the first.
    pub const END: Self = Self::of(Kind::EndOfBlock, 0, 0, 0);

    pub const fn literal(byte: u8) -> Self {
        Self(1 << 6 | (byte as u32) << 8)
    }

    /// A copy of this length, with no extra bits.
    pub const fn copy(len: u8) -> Self {
        Self((len as u32) << 24)
    }

    /// `base`, to which the value of so many `extra` bits is added.
    pub const fn value(base: u16, extra: u8) -> Self {
        Self::of(Kind::Value, extra as u32, 0, base)
    }

    const fn of(kind: Kind, bits: u32, code: u32, base: u16) -> Self {
        Self(OTHER << 6 | bits | code << 8 | (kind as u32) << 12 | (base as u32) << 16)
    }

    /// With a code of so many bits.
    const fn with_code(self, len: u32) -> Self {
        let len_of_code = if self.is_simple() { 0 } else { len << 8 };
        Self((self.0 + len) | len_of_code)
    }

    /// By how many bits to go on.
    pub const fn bits(self) -> u32 {
        self.0 & 63
    }

    /// Whether it is literals, a copy without extra bits, or a copy behind literals.
    pub const fn is_simple(self) -> bool {
        self.0 >> 6 & 3 != OTHER
    }

    /// Of a simple one: how many literals there are.
    pub const fn literals(self) -> usize {
        (self.0 >> 6 & 3) as usize
    }

    /// Of a simple one: the literals, and another byte where there is one.
    pub const fn bytes(self) -> [u8; 2] {
        let [_, first, second, _] = self.0.to_le_bytes();
        [first, second]
    }

    /// Of a simple one: the length of the copy that follows; 0: none does.
    pub const fn len(self) -> usize {
        (self.0 >> 24) as usize
    }

    /// Of one that isn't simple.
    pub const fn kind(self) -> Kind {
        match self.0 >> 12 & 3 {
            0 => Kind::Value,
            1 => Kind::Table,
            2 => Kind::EndOfBlock,
            _ => Kind::Invalid,
        }
    }

    /// The value, whose code and extra bits are the lowest of `hold`.
    #[inline(always)]
    pub const fn value_of(self, hold: u64) -> usize {
        let extra = hold & (1_u64.wrapping_shl(self.0)).wrapping_sub(1);
        self.base() + low(extra.wrapping_shr(self.0 >> 8 & 15))
    }

    /// Without the extra bits.
    pub const fn base(self) -> usize {
        (self.0 >> 16) as usize
    }

    /// Both, where a literal or copy follows one literal, or a copy two.
    const fn then(self, next: Self) -> Self {
        let literals = (next.0 >> 8 & 0xff) << (8 + 8 * self.literals());
        let bits = self.0 + next.bits() + (next.0 & 0xc0);
        Self(bits | literals | (next.0 & 0xff00_0000))
    }
}

/// A table of `2^ROOT` entries, and at most `LEN` with those behind them.
pub(super) struct Table<const ROOT: usize, const LEN: usize> {
    entries: Box<[Entry; LEN]>,
}

impl<const ROOT: usize, const LEN: usize> Table<ROOT, LEN> {
    /// Of a code without symbols.
    pub fn new() -> Self {
        Self { entries: Box::new([Entry::INVALID; LEN]) }
    }

    /// What the lowest bits of `hold` stand for; where it has too few of them, the entry has more.
    #[inline(always)]
    pub fn get(&self, hold: u64) -> Entry {
        let entry = self.first(hold);
        if !entry.is_simple() && entry.kind() == Kind::Table {
            return self.behind(entry, hold);
        }
        entry
    }

    /// The entry for the lowest `ROOT` bits.
    #[inline(always)]
    pub fn first(&self, hold: u64) -> Entry {
        self.entries[low(hold) & ((1 << ROOT) - 1)]
    }

    /// What follows `entry`, which names another table.
    #[inline(always)]
    pub fn behind(&self, entry: Entry, hold: u64) -> Entry {
        let bits = entry.0 >> 8 & 15;
        let at = low(hold >> ROOT) & ((1 << bits) - 1);
        self.entries.get(entry.base() + at).copied().unwrap_or(Entry::INVALID)
    }

    /// The canonical code with these lengths (0: not used), `entry(n)` being what its symbol `n` stands for.
    ///
    /// False if codes are missing. That is refused, as by zlib, except for a single one of one bit and none at all.
    pub fn build(&mut self, lens: &[u8], entry: impl Fn(usize) -> Entry) -> Result<bool, Error> {
        let mut counts = [0_u16; MAX_BITS + 1];
        for len in lens {
            counts[usize::from(*len)] += 1;
        }
        counts[0] = 0;
        let longest = (1..=MAX_BITS).rfind(|len| counts[*len] > 0).unwrap_or(1);
        let mut left = 1_i32;
        for count in &counts[1..] {
            left = left * 2 - i32::from(*count);
            if left < 0 {
                return Err(Error::Data("more codes than fit"));
            }
        }
        if left > 0 && longest > 1 {
            return Err(Error::Data("codes are missing"));
        }
        self.fill(&counts, longest, lens, entry)?;
        Ok(left == 0)
    }

    fn fill(
        &mut self,
        counts: &[u16; MAX_BITS + 1],
        longest: usize,
        lens: &[u8],
        entry: impl Fn(usize) -> Entry,
    ) -> Result<(), Error> {
        let symbols = Sorted::new(counts, lens);
        self.entries[..2].fill(Entry::INVALID);
        // The code, first bit lowest.
        let mut code = 0;
        let mut next = symbols.order.iter();
        for len in 1..=ROOT {
            // So far one entry for each value of `len` bits.
            for symbol in next.by_ref().take(usize::from(counts[len])) {
                self.entries[code] = entry(usize::from(*symbol)).with_code(narrow(len));
                code = following(code, len);
            }
            if len < ROOT {
                let (done, rest) = self.entries.split_at_mut(1 << len);
                rest[..1 << len].copy_from_slice(done);
            }
        }
        let (mut end, mut prefix, mut bits) = (1 << ROOT, usize::MAX, 0);
        for len in ROOT + 1..=longest {
            let mut count = usize::from(counts[len]);
            for symbol in next.by_ref().take(count) {
                if code & ((1 << ROOT) - 1) != prefix {
                    prefix = code & ((1 << ROOT) - 1);
                    bits = len - ROOT;
                    // Until it holds the codes that have this prefix: all that follow, shortest first.
                    let mut held = count;
                    while held < 1 << bits {
                        bits += 1;
                        held = held * 2 + usize::from(counts[ROOT + bits]);
                    }
                    let start = u16::try_from(end).unwrap_or(u16::MAX);
                    self.entries[prefix] = Entry::of(Kind::Table, 0, narrow(bits), start);
                    end += 1 << bits;
                }
                let table = self.entries.get_mut(end - (1 << bits)..end);
                let table = table.ok_or(Error::Data("too many long codes"))?;
                let entry = entry(usize::from(*symbol)).with_code(narrow(len));
                table[code >> ROOT..]
                    .iter_mut()
                    .step_by(1 << (len - ROOT))
                    .for_each(|e| *e = entry);
                code = following(code, len);
                count -= 1;
            }
        }
        Ok(())
    }
}

/// The first entries of a [`Table`], joined where what follows fits as well.
pub(super) struct Joined<const ROOT: usize, const LEN: usize> {
    entries: Box<[Entry; LEN]>,
}

impl<const ROOT: usize, const LEN: usize> Joined<ROOT, LEN> {
    /// Of a code without symbols.
    pub fn new() -> Self {
        Self { entries: Box::new([Entry::INVALID; LEN]) }
    }

    /// What the lowest bits of `hold` stand for.
    #[inline(always)]
    pub fn get(&self, hold: u64) -> Entry {
        self.entries[low(hold) & (LEN - 1)]
    }

    /// Joins what `table` has.
    pub fn build<const ALL: usize>(&mut self, table: &Table<ROOT, ALL>) {
        let single = &table.entries[..LEN];
        for (at, joined) in self.entries.iter_mut().enumerate() {
            let mut entry = single[at];
            while entry.is_simple() && entry.len() == 0 {
                let next = single[at >> entry.bits()];
                let fits = entry.bits() + next.bits() <= narrow(ROOT);
                if !fits || !next.is_simple() || entry.literals() + next.literals() > 2 {
                    break;
                }
                entry = entry.then(next);
            }
            *joined = entry;
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "only its lowest bits are used")]
const fn low(hold: u64) -> usize {
    hold as usize
}

#[expect(clippy::cast_possible_truncation, reason = "the length of a code: at most 15")]
const fn narrow(len: usize) -> u32 {
    len as u32
}

/// The canonical code behind `code`, both of `len` bits with the first one lowest.
const fn following(code: usize, len: usize) -> usize {
    let zeros = code ^ ((1 << len) - 1);
    if zeros == 0 {
        // It was the last one.
        return code;
    }
    let bit = 1 << zeros.ilog2();
    code & (bit - 1) | bit
}

/// Symbols by the length of their codes.
struct Sorted {
    order: [u16; 320],
}

impl Sorted {
    fn new(counts: &[u16; MAX_BITS + 1], lens: &[u8]) -> Self {
        let mut starts = [0_usize; MAX_BITS + 2];
        for len in 1..=MAX_BITS {
            starts[len + 1] = starts[len] + usize::from(counts[len]);
        }
        let mut order = [0; 320];
        for (symbol, len) in (0..).zip(lens).filter(|(_, len)| **len > 0) {
            let place = &mut starts[usize::from(*len)];
            order[*place] = symbol;
            *place += 1;
        }
        Self { order }
    }
}
