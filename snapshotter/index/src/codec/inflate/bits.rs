//! Bits that were taken from the input and not yet used.

use super::Given;
use super::huffman::{Entry, Table};

/// At most 63 bits, the next one lowest.
#[derive(Clone, Copy, Default)]
pub(super) struct Bits {
    hold: u64,
    count: u32,
}

impl Bits {
    pub fn of(value: u8, count: u8) -> Self {
        let count = u32::from(count);
        Self::new(value.into(), count)
    }

    /// The lowest `count` bits of `hold`.
    pub fn new(hold: u64, count: u32) -> Self {
        Self { hold: hold & ((1 << count) - 1), count }
    }

    pub fn hold(self) -> u64 {
        self.hold
    }

    pub fn count(self) -> u32 {
        self.count
    }

    pub fn skip(&mut self, count: u32) {
        self.hold >>= count;
        self.count -= count;
    }

    /// `count` bits from bit `at` on.
    #[expect(clippy::cast_possible_truncation, reason = "at most 16 bits are asked for")]
    pub fn peek(self, at: u32, count: u32) -> usize {
        (self.hold >> at & ((1 << count) - 1)) as usize
    }

    pub fn take(&mut self, count: u32) -> usize {
        let value = self.peek(0, count);
        self.skip(count);
        value
    }

    /// Skips what is left of a byte.
    pub fn align(&mut self) {
        self.skip(self.count % 8);
    }

    /// The next byte of the input.
    fn pull(&mut self, given: &mut Given<'_>) -> bool {
        let Some(byte) = given.input.get(given.read) else { return false };
        self.hold |= u64::from(*byte) << self.count;
        self.count += 8;
        given.read += 1;
        true
    }

    /// Takes no more from the input than is needed for `count` (at most 48) bits. False if there are fewer.
    pub fn fill(&mut self, count: u32, given: &mut Given<'_>) -> bool {
        while self.count < count {
            if !self.pull(given) {
                return false;
            }
        }
        true
    }

    /// What the bits from bit `at` on stand for, once all of them are there.
    pub fn entry<const ROOT: usize, const LEN: usize>(
        &mut self,
        table: &Table<ROOT, LEN>,
        at: u32,
        given: &mut Given<'_>,
    ) -> Option<Entry> {
        loop {
            let entry = table.get(self.hold >> at);
            if at + entry.bits() <= self.count {
                return Some(entry);
            }
            if !self.pull(given) {
                return None;
            }
        }
    }

    /// Gives whole bytes that are left back to the input that they are from.
    pub fn give_back(&mut self, given: &mut Given<'_>) {
        let bytes = (self.count / 8).min(u32::try_from(given.read).unwrap_or(u32::MAX));
        given.read -= bytes as usize;
        *self = Self::new(self.hold, self.count - 8 * bytes);
    }
}
