//! Tables by which symbols are decoded, up to five at a time.
//!
//! A table's first `2^ROOT` entries are indexed by the next bits of the stream. What a code longer than that stands for
//! is in a table of its own behind them, which the first one names. Where literals and the code of a copy's length behind
//! them are not longer than `ROOT` bits together, one entry of [`Joined`] stands for all of them.

use super::Error;

/// Longest code that deflate has, in bits.
pub(super) const MAX_BITS: usize = 15;

/// What the next bits stand for.
///
/// From the lowest bit on: 8 bits, by how many bits to go on, extra bits among them; 4 bits, the length of the code (of
/// another table: the number of bits that choose from it); 4 bits, a [`Kind`]; 16 bits, the literal, or the value to
/// which the extra bits are added (where the other table starts).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry(u32);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// A length or distance.
    Value,
    Literal,
    /// Another table.
    Table,
    EndOfBlock,
    /// Nothing that there is.
    Invalid,
}

impl Entry {
    pub const INVALID: Self = Self::of(Kind::Invalid, 0, 0, 0);
    /// Its code's length is still to be set, as of all but the first.
    pub const END: Self = Self::of(Kind::EndOfBlock, 0, 0, 0);

    pub const fn literal(byte: u8) -> Self {
        Self::of(Kind::Literal, 0, 0, byte as u16)
    }

    /// `base`, to which the value of so many `extra` bits is added.
    pub const fn value(base: u16, extra: u8) -> Self {
        Self::of(Kind::Value, extra as u32, 0, base)
    }

    const fn of(kind: Kind, bits: u32, code: u32, base: u16) -> Self {
        Self(bits | code << 8 | (kind as u32) << 12 | (base as u32) << 16)
    }

    /// With a code of so many bits.
    const fn with_code(self, len: u32) -> Self {
        Self((self.0 + len) | len << 8)
    }

    /// By how many bits to go on.
    pub const fn bits(self) -> u32 {
        self.0 & 0xff
    }

    /// The length of its code in bits.
    const fn code(self) -> u32 {
        self.0 >> 8 & 15
    }

    pub const fn kind(self) -> Kind {
        match self.0 >> 12 & 15 {
            0 => Kind::Value,
            1 => Kind::Literal,
            2 => Kind::Table,
            3 => Kind::EndOfBlock,
            _ => Kind::Invalid,
        }
    }

    /// The value, whose code and extra bits are the lowest of `hold`.
    #[inline(always)]
    pub const fn value_of(self, hold: u64) -> usize {
        self.base() + extra(hold, self.0, self.code())
    }

    /// Without the extra bits.
    pub const fn base(self) -> usize {
        (self.0 >> 16) as usize
    }

    pub const fn byte(self) -> u8 {
        self.0.to_le_bytes()[2]
    }
}

/// The lowest `bits` of `hold` without the first `code` of them.
#[inline(always)]
const fn extra(hold: u64, bits: u32, code: u32) -> usize {
    let taken = hold & 1_u64.wrapping_shl(bits).wrapping_sub(1);
    low(taken.wrapping_shr(code))
}

/// Literals and a copy behind them, either of which may be missing.
///
/// From the lowest bit on: 8 bits, by how many bits to go on, extra bits among them; 8 bits, where the extra bits begin;
/// 3 bits, the number of literals; 1 bit, whether there is only them; 12 bits, the length of the copy to which the extra
/// bits are added (0: there is no copy); 8 bits for each literal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Joint(u64);

impl Joint {
    /// Literals that one has at most.
    pub const LITERALS: usize = 4;

    const NOTHING: Self = Self(0);

    /// A single literal or a copy; nothing if `entry` is neither.
    const fn of(entry: Entry) -> Self {
        let (bits, code) = (entry.bits() as u64, entry.code() as u64);
        match entry.kind() {
            Kind::Literal => Self(bits | 1 << 16 | 1 << 19 | (entry.byte() as u64) << 32),
            Kind::Value => Self(bits | code << 8 | (entry.base() as u64) << 20),
            _ => Self::NOTHING,
        }
    }

    /// This one behind a literal with a code of `bits`.
    const fn behind(self, byte: u8, bits: u32) -> Self {
        let literals = self.0 >> 32 << 40 | (byte as u64) << 32;
        let bits = bits as u64;
        Self(((self.0 & 0xffff_ffff) + (bits | bits << 8 | 1 << 16)) | literals)
    }

    /// By how many bits to go on.
    #[inline(always)]
    pub const fn bits(self) -> u32 {
        self.head() & 0xff
    }

    /// How many literals there are.
    #[inline(always)]
    pub const fn literals(self) -> usize {
        low(self.0 >> 16) & 7
    }

    /// The literals, and zeros.
    #[inline(always)]
    pub const fn bytes(self) -> [u8; Self::LITERALS] {
        let [_, _, _, _, bytes @ ..] = self.0.to_le_bytes();
        bytes
    }

    /// Whether there are literals and no copy.
    #[inline(always)]
    pub const fn is_literals(self) -> bool {
        self.0 & 1 << 19 != 0
    }

    #[inline(always)]
    pub const fn has_copy(self) -> bool {
        self.base() > 0
    }

    /// The length of the copy, whose extra bits are in `hold`.
    #[inline(always)]
    pub const fn len(self, hold: u64) -> usize {
        self.base() + extra(hold, self.head(), self.head() >> 8)
    }

    #[inline(always)]
    const fn base(self) -> usize {
        (self.head() >> 20) as usize
    }

    #[inline(always)]
    const fn head(self) -> u32 {
        let [a, b, c, d, ..] = self.0.to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }
}

/// A table of `2^ROOT` entries, and at most `LEN` with those behind them.
pub(super) struct Table<const ROOT: usize, const LEN: usize> {
    entries: [Entry; LEN],
}

impl<const ROOT: usize, const LEN: usize> Table<ROOT, LEN> {
    /// Of a code without symbols.
    pub fn new() -> Self {
        Self { entries: [Entry::INVALID; LEN] }
    }

    /// What the lowest bits of `hold` stand for; where it has too few of them, the entry has more.
    #[inline(always)]
    pub fn get(&self, hold: u64) -> Entry {
        let entry = self.first(hold);
        if entry.kind() == Kind::Table { self.behind(entry, hold) } else { entry }
    }

    /// The entry for the lowest `ROOT` bits.
    #[inline(always)]
    pub fn first(&self, hold: u64) -> Entry {
        self.entries[low(hold) & ((1 << ROOT) - 1)]
    }

    /// What follows `entry`, which names another table.
    #[inline(always)]
    pub fn behind(&self, entry: Entry, hold: u64) -> Entry {
        let bits = entry.code();
        let at = low(hold >> ROOT) & ((1 << bits) - 1);
        self.entries.get(entry.base() + at).copied().unwrap_or(Entry::INVALID)
    }

    /// The canonical code with these lengths (0: not used), `entry(n)` being what its symbol `n` stands for.
    ///
    /// False if codes are missing. That is refused, as by zlib, except for a single one of one bit and none at all.
    ///
    /// `short` is told of the codes of up to `ROOT` bits, shortest first.
    pub fn build(
        &mut self,
        lens: &[u8],
        entry: impl Fn(usize) -> Entry,
        short: impl FnMut(usize, Entry),
    ) -> Result<bool, Error> {
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
        self.fill(&counts, longest, lens, entry, short)?;
        Ok(left == 0)
    }

    fn fill(
        &mut self,
        counts: &[u16; MAX_BITS + 1],
        longest: usize,
        lens: &[u8],
        entry: impl Fn(usize) -> Entry,
        mut short: impl FnMut(usize, Entry),
    ) -> Result<(), Error> {
        let symbols = Sorted::new(counts, lens);
        self.entries[..2].fill(Entry::INVALID);
        // The code, first bit lowest.
        let mut code = 0;
        let mut next = symbols.order.iter();
        for len in 1..=ROOT {
            // So far one entry for each value of `len` bits.
            for symbol in next.by_ref().take(usize::from(counts[len])) {
                let entry = entry(usize::from(*symbol)).with_code(narrow(len));
                self.entries[code] = entry;
                short(code, entry);
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
    entries: [Joint; LEN],
    /// What stands for something and is shorter than `ROOT` bits, shortest first.
    shorter: Box<[(usize, Joint); LEN]>,
}

impl<const ROOT: usize, const LEN: usize> Joined<ROOT, LEN> {
    /// Of a code without symbols.
    pub fn new() -> Self {
        let shorter = Box::new([(0, Joint::NOTHING); LEN]);
        Self { entries: [Joint::NOTHING; LEN], shorter }
    }

    /// What the lowest bits of `hold` stand for; nothing at all if it isn't in the first entries or neither literal
    /// nor copy.
    #[inline(always)]
    pub fn get(&self, hold: u64) -> Joint {
        self.entries[low(hold) & (LEN - 1)]
    }

    /// Joins what `codes`, of up to `ROOT` bits and shortest first, stand for.
    pub fn build(&mut self, codes: &[(usize, Entry)]) {
        self.entries[..2].fill(Joint::NOTHING);
        let (mut end, mut codes) = (0, codes.iter().peekable());
        // By length: where in `shorter` it starts, and how many single literals it starts with.
        let (mut starts, mut literals) = ([0; MAX_BITS + 1], [0; MAX_BITS + 1]);
        for len in 1..=ROOT {
            starts[len] = end;
            while let Some((code, entry)) = codes.next_if(|(_, entry)| entry.code() == narrow(len))
            {
                let joint = Joint::of(*entry);
                self.put(*code, joint, len, &mut end);
                literals[len] += usize::from(joint.is_literals());
            }
            for first in 1..len {
                let behind = len - first;
                for at in starts[first]..starts[first] + literals[first] {
                    let (code, literal) = self.shorter[at];
                    for at in starts[behind]..starts[behind + 1] {
                        let (next, joint) = self.shorter[at];
                        if joint.literals() < Joint::LITERALS {
                            let joint = joint.behind(literal.bytes()[0], narrow(first));
                            self.put(code | next << first, joint, len, &mut end);
                        }
                    }
                }
            }
            if len < ROOT {
                let (done, rest) = self.entries.split_at_mut(1 << len);
                rest[..1 << len].copy_from_slice(done);
            }
        }
    }

    /// `joint` has the `len` bits of `code`.
    #[inline(always)]
    fn put(&mut self, code: usize, joint: Joint, len: usize, end: &mut usize) {
        if joint != Joint::NOTHING {
            self.entries[code] = joint;
            if len < ROOT {
                self.shorter[*end] = (code, joint);
                *end += 1;
            }
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
