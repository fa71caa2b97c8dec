//! Symbols away from the ends of input and room: nothing here looks whether they are near.

use super::bits::Bits;
use super::history::History;
use super::huffman::{Joint, Kind};
use super::{Codes, Error, Given};

/// What one round may read, and the first one before it.
const INPUT: usize = 24;

/// Bytes that are copied at a time.
const STRIDE: usize = 16;
const HALF: usize = 8;

/// What one round may write at most: literals, a copy of 258 bytes and what it goes beyond its end.
const ROOM: usize = 2 * Joint::LITERALS + 258 + 2 * STRIDE;

pub(super) fn has_room(given: &Given<'_>) -> bool {
    given.input.len() - given.read >= INPUT && given.room.len() - given.filled >= ROOM
}

/// Decodes as long as there [is room](has_room). True at the end of a block.
#[cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "needs what the processor has"))]
pub(super) fn symbols(
    codes: &Codes,
    bits: &mut Bits,
    given: &mut Given<'_>,
    history: &mut History,
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
    history: &mut History,
) -> Result<bool, Error> {
    rounds(codes, bits, given, history)
}

#[inline(always)]
fn rounds(
    codes: &Codes,
    bits: &mut Bits,
    given: &mut Given<'_>,
    history: &mut History,
) -> Result<bool, Error> {
    let mut next =
        Next { hold: bits.hold(), count: bits.count(), input: &given.input[given.read..] };
    let mut ended = false;
    let mut filled = given.filled;
    let room = &mut *given.room;
    next.fill();
    let mut joint = codes.joined.get(next.hold);
    while next.input.len() >= INPUT && room.len() - filled >= ROOM {
        next.fill();
        let mut hold = next.hold;
        filled += put(joint, room, filled);
        next.skip(joint.bits());
        if joint.is_literals() {
            joint = codes.joined.get(next.hold);
            hold = next.hold;
            filled += put(joint, room, filled);
            next.skip(joint.bits());
        }
        if joint.is_literals() {
            joint = codes.joined.get(next.hold);
            continue;
        }
        let len = if joint.has_copy() {
            joint.len(hold)
        } else {
            let single = codes.literals.get(hold);
            next.skip(single.bits());
            next.fill();
            match single.kind() {
                Kind::Value => single.value_of(hold),
                Kind::Literal => {
                    room[filled] = single.byte();
                    filled += 1;
                    joint = codes.joined.get(next.hold);
                    continue;
                }
                Kind::EndOfBlock => {
                    ended = true;
                    break;
                }
                Kind::Table | Kind::Invalid => {
                    return Err(Error::Data("invalid literal/length code"));
                }
            }
        };
        let mut found = codes.distances.first(next.hold);
        if found.kind() == Kind::Table {
            next.fill();
            found = codes.distances.behind(found, next.hold);
        }
        if found.kind() != Kind::Value {
            return Err(Error::Data("invalid distance code"));
        }
        let distance = found.value_of(next.hold);
        next.skip(found.bits());
        // It is there when the copy is done.
        joint = codes.joined.get(next.hold);
        match filled.checked_sub(distance) {
            Some(from) => copy(room, from, filled, len),
            None => copy_from_before(room, history, distance, filled, len)?,
        }
        filled += len;
    }
    *bits = Bits::new(next.hold, next.count);
    (given.read, given.filled) = (given.input.len() - next.input.len(), filled);
    bits.give_back(given);
    Ok(ended)
}

/// Puts literals to `filled`, and something behind them where there are few. How many there are.
#[inline(always)]
fn put(joint: Joint, room: &mut [u8], filled: usize) -> usize {
    room[filled..filled + Joint::LITERALS].copy_from_slice(&joint.bytes());
    joint.literals()
}

/// The input's next bits; all of `hold` are true, and the lowest `count` of them are counted as read.
struct Next<'a> {
    hold: u64,
    count: u32,
    input: &'a [u8],
}

impl Next<'_> {
    /// From here on all of `hold` is read: two times what `joined` has and a distance from the first entries are at most
    /// 49 bits, so that it can be looked what comes behind them.
    #[inline(always)]
    fn fill(&mut self) {
        if let Some(bytes) = self.input.first_chunk() {
            self.hold |= u64::from_le_bytes(*bytes).wrapping_shl(self.count);
            self.input = &self.input[((63 - self.count) >> 3 & 7) as usize..];
            self.count |= 56;
        }
    }

    #[inline(always)]
    fn skip(&mut self, bits: u32) {
        self.hold = self.hold.wrapping_shr(bits);
        self.count = self.count.wrapping_sub(bits);
    }
}

/// Copies within `room`, to `to` from before it, byte after byte. It may write up to two strides beyond the end.
#[inline(always)]
fn copy(room: &mut [u8], from: usize, to: usize, len: usize) {
    if to - from < STRIDE {
        return copy_near(room, from, to, len);
    }
    // Most copies are no longer; the processor can't foresee which.
    stride(room, from, to);
    stride(room, from + STRIDE, to + STRIDE);
    for done in (2 * STRIDE..len).step_by(STRIDE) {
        stride(room, from + done, to + done);
    }
}

#[inline(always)]
fn stride(room: &mut [u8], from: usize, to: usize) {
    room.copy_within(from..from + STRIDE, to);
}

/// The same where the distance is less than a stride.
fn copy_near(room: &mut [u8], mut from: usize, mut to: usize, len: usize) {
    let end = to + len;
    match to - from {
        1 => {
            let byte = room[from];
            room[to..end].fill(byte);
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
    history: &mut History,
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
