//! Symbols away from the ends of input and room: nothing here looks whether they are near.

use super::bits::Bits;
use super::history::History;
use super::huffman::{Entry, Kind};
use super::{Codes, Error, Given};

/// What one round may read, and the first one before it.
const INPUT: usize = 16;

/// Bytes that are copied at a time.
const STRIDE: usize = 16;
const HALF: usize = 8;

/// What one round may write at most: two literals, a copy of 258 bytes and what it goes beyond its end.
const ROOM: usize = 2 + 258 + STRIDE;

pub(super) fn has_room(given: &Given<'_>) -> bool {
    given.input.len() - given.read >= INPUT && given.room.len() - given.filled >= ROOM
}

/// Decodes as long as there [is room](has_room). True at the end of a block.
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "needs what the processor has"))]
pub(super) fn symbols(
    codes: &Codes,
    bits: &mut Bits,
    given: &mut Given<'_>,
    history: &History,
) -> Result<bool, Error> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("bmi2") {
        // SAFETY: the processor has it.
        return unsafe { symbols_bmi2(codes, bits, given, history) };
    }
    rounds(codes, bits, given, history)
}

/// The same with shifts of one instruction each.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "bmi2")]
fn symbols_bmi2(
    codes: &Codes,
    bits: &mut Bits,
    given: &mut Given<'_>,
    history: &History,
) -> Result<bool, Error> {
    rounds(codes, bits, given, history)
}

#[inline(always)]
fn rounds(
    codes: &Codes,
    bits: &mut Bits,
    given: &mut Given<'_>,
    history: &History,
) -> Result<bool, Error> {
    let mut next =
        Next { hold: bits.hold(), count: bits.count(), input: given.input, read: given.read };
    let mut ended = false;
    let mut filled = given.filled;
    let room = &mut *given.room;
    next.fill();
    let mut entry = codes.joined.get(next.hold);
    while next.input.len() - next.read >= INPUT && room.len() - filled >= ROOM {
        next.fill();
        let len = if entry.is_simple() {
            room[filled..filled + 2].copy_from_slice(&entry.bytes());
            filled += entry.literals();
            next.skip(entry);
            if entry.len() == 0 {
                entry = codes.joined.get(next.hold);
                continue;
            }
            entry.len()
        } else {
            if entry.kind() == Kind::Table {
                entry = codes.literals.behind(entry, next.hold);
            }
            if entry.is_simple() && entry.literals() > 0 {
                [room[filled], _] = entry.bytes();
                filled += 1;
                next.skip(entry);
                entry = codes.joined.get(next.hold);
                continue;
            }
            let len = match entry {
                simple if simple.is_simple() => simple.len(),
                value if value.kind() == Kind::Value => value.value_of(next.hold),
                end if end.kind() == Kind::EndOfBlock => {
                    next.skip(end);
                    ended = true;
                    break;
                }
                _ => return Err(Error::Data("invalid literal/length code")),
            };
            next.skip(entry);
            len
        };
        let found = codes.distances.get(next.hold);
        if found.kind() != Kind::Value {
            return Err(Error::Data("invalid distance code"));
        }
        let distance = found.value_of(next.hold);
        next.skip(found);
        // It is there when the copy is done.
        entry = codes.joined.get(next.hold);
        match filled.checked_sub(distance) {
            Some(from) => copy(room, from, filled, len),
            None => copy_from_before(room, history, distance, filled, len)?,
        }
        filled += len;
    }
    *bits = Bits::new(next.hold, next.count);
    (given.read, given.filled) = (next.read, filled);
    bits.give_back(given);
    Ok(ended)
}

/// The input's next bits; all of `hold` are true, and the lowest `count` of them are counted as read.
struct Next<'a> {
    hold: u64,
    count: u32,
    input: &'a [u8],
    read: usize,
}

impl Next<'_> {
    /// From here on at least 56 bits are read.
    #[inline(always)]
    fn fill(&mut self) {
        if let Some(bytes) = self.input[self.read..].first_chunk() {
            self.hold |= u64::from_le_bytes(*bytes).wrapping_shl(self.count);
            self.read += ((63 - self.count) >> 3) as usize;
            self.count |= 56;
        }
    }

    #[inline(always)]
    fn skip(&mut self, entry: Entry) {
        self.hold = self.hold.wrapping_shr(entry.bits());
        self.count = self.count.wrapping_sub(entry.bits());
    }
}

/// Copies within `room`, to `to` from before it, byte after byte. It may write up to a stride beyond the end.
#[inline(always)]
fn copy(room: &mut [u8], mut from: usize, mut to: usize, len: usize) {
    let end = to + len;
    match to - from {
        1 => {
            let byte = room[from];
            room[to..end].fill(byte);
        }
        STRIDE.. => {
            while to < end {
                room.copy_within(from..from + STRIDE, to);
                (from, to) = (from + STRIDE, to + STRIDE);
            }
        }
        HALF.. => {
            while to < end {
                room.copy_within(from..from + HALF, to);
                (from, to) = (from + HALF, to + HALF);
            }
        }
        distance => {
            // So often as it fits eight bytes, over and over.
            let mut pattern = [0; HALF];
            for (place, byte) in pattern.iter_mut().zip((from..to).cycle()) {
                *place = room[byte];
            }
            while to < end {
                room[to..to + HALF].copy_from_slice(&pattern);
                to += HALF / distance * distance;
            }
        }
    }
}

/// The same of what begins before `room`.
#[cold]
fn copy_from_before(
    room: &mut [u8],
    history: &History,
    distance: usize,
    filled: usize,
    len: usize,
) -> Result<(), Error> {
    let before = distance - filled;
    if before > history.len() {
        return Err(Error::Data("invalid distance too far back"));
    }
    let first = before.min(len);
    history.copy(before, &mut room[filled..filled + first]);
    if first < len {
        copy(room, 0, filled + first, len - first);
    }
    Ok(())
}
