//! Inflate (RFC 1951) that can stop at block boundaries and start in the middle of a stream.
//!
//! Decoding is most of what a node does with an image that arrives, and the index needs two things that decoders don't
//! give together: the bit at which a block starts, and speed. Away from the ends of what it is given it decodes up to five
//! symbols by one look ([`fast`]); near them, one by one.
//!
//! What is refused is what zlib refuses.

mod bits;
mod checkpoint;
mod fast;
mod history;
mod huffman;
mod lengths;
#[cfg(test)]
mod tests;

use bits::Bits;
use checkpoint::Checkpoint;
use history::History;
use huffman::{Entry, Joined, Kind, Table};
use lengths::Lengths;

pub(crate) use history::WINDOW_LEN;

/// See the module's documentation.
pub(super) struct Inflate {
    bits: Bits,
    state: State,
    /// The current block is the last one.
    last: bool,
    codes: Box<Codes>,
    history: History,
}

/// What a block's symbols stand for.
struct Codes {
    literals: Table<11, 3072>,
    /// The same, several at a time.
    joined: Joined<11, 2048>,
    /// What `joined` is built of.
    short: Vec<(usize, Entry)>,
    distances: Table<9, 832>,
    /// They are those that RFC 1951 fixes.
    fixed: bool,
}

enum State {
    Header,
    StoredLen,
    Stored {
        left: usize,
    },
    Lengths(Box<Lengths>),
    Symbols,
    /// A copy that there was no room for.
    Copy {
        len: usize,
        distance: usize,
    },
    End,
}

/// What one call did.
pub(super) struct Step {
    pub consumed: usize,
    pub produced: usize,
    pub at: At,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum At {
    /// Input or room ran out.
    Middle,
    /// Behind a block that isn't the last; so many of the consumed bits belong to the next block.
    Block { unused_bits: u32 },
    /// Behind the last block, on a byte boundary.
    End,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("{0}")]
    Data(&'static str),
}

/// What a call was given, and how far it has got.
struct Given<'a> {
    input: &'a [u8],
    read: usize,
    room: &'a mut [u8],
    filled: usize,
}

/// Why decoding pauses.
enum Pause {
    /// For input or room.
    Want,
    EndOfBlock,
}

impl Given<'_> {
    fn is_full(&self) -> bool {
        self.filled == self.room.len()
    }

    fn put(&mut self, byte: u8) {
        self.room[self.filled] = byte;
        self.filled += 1;
    }
}

impl Inflate {
    pub fn new() -> Self {
        let (literals, distances) = (Table::new(), Table::new());
        let (joined, short) = (Joined::new(), Vec::new());
        let codes = Box::new(Codes { literals, joined, short, distances, fixed: false });
        let (bits, state) = (Bits::default(), State::Header);
        Self { bits, state, last: false, codes, history: History::new() }
    }

    /// Back to the state of a new one, but for the checkpoint: nothing that follows refers to what is before it.
    pub fn reset(&mut self) {
        (self.bits, self.state, self.last) = (Bits::default(), State::Header, false);
        self.history.clear();
    }

    /// Before the first step: `value` are the `count` (1 to 7) bits that precede the input.
    pub fn resume(&mut self, count: u8, value: u8) {
        self.bits = Bits::of(value, count);
    }

    /// Before the first step: what was decoded before.
    pub fn set_window(&mut self, window: &[u8; WINDOW_LEN]) {
        self.history.set(window);
    }

    /// Makes a checkpoint of the place behind the last step, in place of the one before.
    pub fn set_checkpoint(&mut self) {
        self.history.set_checkpoint();
    }

    /// What was decoded before the checkpoint and what came behind it referred to: the last 32 KiB, zeros in place of all
    /// other bytes. `None` if there is no checkpoint, which there isn't afterwards.
    pub fn take_window(&mut self) -> Option<Box<[u8; WINDOW_LEN]>> {
        self.history.take_checkpoint().map(Checkpoint::sparse)
    }

    /// Decodes until input or room runs out, the stream ends or, if asked, a block does. What is in `room` behind the
    /// bytes produced is of no meaning.
    pub fn step(&mut self, input: &[u8], room: &mut [u8], stop: bool) -> Result<Step, Error> {
        let mut given = Given { input, read: 0, room, filled: 0 };
        let at = self.run(&mut given, stop)?;
        let Given { read, room, filled, .. } = given;
        self.history.push(&room[..filled]);
        Ok(Step { consumed: read, produced: filled, at })
    }

    fn run(&mut self, given: &mut Given<'_>, stop: bool) -> Result<At, Error> {
        loop {
            let pause = match &mut self.state {
                State::Header => self.header(given)?,
                State::StoredLen => self.stored_len(given)?,
                State::Stored { left } => stored(left, given),
                State::Lengths(lengths) => match lengths.read(&mut self.bits, given)? {
                    Some(lens) => {
                        self.codes.set(lens)?;
                        self.state = State::Symbols;
                        None
                    }
                    None => Some(Pause::Want),
                },
                State::Symbols => self.symbols(given)?,
                State::Copy { len, distance } => {
                    let (len, distance) = (*len, *distance);
                    self.go_on(len, distance, given)
                }
                State::End => return Ok(At::End),
            };
            match pause {
                None => {}
                Some(Pause::Want) => return Ok(At::Middle),
                Some(Pause::EndOfBlock) if self.last => {
                    self.bits.align();
                    self.bits.give_back(given);
                    if self.bits.count() > 0 {
                        return Err(Error::Data("the stream ends before the input given"));
                    }
                    self.state = State::End;
                }
                Some(Pause::EndOfBlock) => {
                    self.state = State::Header;
                    if stop {
                        self.bits.give_back(given);
                        return Ok(At::Block { unused_bits: self.bits.count() });
                    }
                }
            }
        }
    }

    fn header(&mut self, given: &mut Given<'_>) -> Result<Option<Pause>, Error> {
        if !self.bits.fill(3, given) {
            return Ok(Some(Pause::Want));
        }
        self.last = self.bits.take(1) == 1;
        self.state = match self.bits.take(2) {
            0 => {
                self.bits.align();
                State::StoredLen
            }
            1 => {
                self.codes.set_fixed()?;
                State::Symbols
            }
            2 => State::Lengths(Box::default()),
            _ => return Err(Error::Data("invalid block type")),
        };
        Ok(None)
    }

    fn stored_len(&mut self, given: &mut Given<'_>) -> Result<Option<Pause>, Error> {
        if !self.bits.fill(32, given) {
            return Ok(Some(Pause::Want));
        }
        let (len, inverted) = (self.bits.take(16), self.bits.take(16));
        if len != inverted ^ 0xffff {
            return Err(Error::Data("invalid stored block lengths"));
        }
        self.state = State::Stored { left: len };
        Ok(None)
    }

    /// Symbols of a block, until its end, or until input or room is short.
    fn symbols(&mut self, given: &mut Given<'_>) -> Result<Option<Pause>, Error> {
        loop {
            if fast::has_room(given) {
                let ended = fast::symbols(&self.codes, &mut self.bits, given, &mut self.history)?;
                if ended {
                    return Ok(Some(Pause::EndOfBlock));
                }
            }
            let Some(entry) = self.bits.entry(&self.codes.literals, 0, given) else {
                return Ok(Some(Pause::Want));
            };
            match entry.kind() {
                Kind::Literal if given.is_full() => return Ok(Some(Pause::Want)),
                Kind::Literal => {
                    self.bits.skip(entry.bits());
                    given.put(entry.byte());
                    continue;
                }
                Kind::EndOfBlock => {
                    self.bits.skip(entry.bits());
                    return Ok(Some(Pause::EndOfBlock));
                }
                _ => {}
            }
            let Some((len, distance)) = self.copy(entry, given)? else {
                return Ok(Some(Pause::Want));
            };
            self.state = State::Copy { len, distance };
            return Ok(None);
        }
    }

    /// The length and distance of a copy that begins with `entry`, once all bits of both are there.
    fn copy(
        &mut self,
        entry: Entry,
        given: &mut Given<'_>,
    ) -> Result<Option<(usize, usize)>, Error> {
        if entry.kind() != Kind::Value {
            return Err(Error::Data("invalid literal/length code"));
        }
        let len = entry.value_of(self.bits.hold());
        let len_end = entry.bits();
        let Some(entry) = self.bits.entry(&self.codes.distances, len_end, given) else {
            return Ok(None);
        };
        if entry.kind() != Kind::Value {
            return Err(Error::Data("invalid distance code"));
        }
        let distance = entry.value_of(self.bits.hold() >> len_end);
        if distance > given.filled + self.history.len() {
            return Err(Error::Data("invalid distance too far back"));
        }
        self.bits.skip(len_end + entry.bits());
        Ok(Some((len, distance)))
    }

    /// Copies what there was no room for.
    fn go_on(&mut self, mut len: usize, distance: usize, given: &mut Given<'_>) -> Option<Pause> {
        while len > 0 && !given.is_full() {
            let byte = match given.filled.checked_sub(distance) {
                Some(at) => given.room[at],
                None => self.history.back(distance - given.filled),
            };
            given.put(byte);
            len -= 1;
        }
        if len == 0 {
            self.state = State::Symbols;
            return None;
        }
        self.state = State::Copy { len, distance };
        Some(Pause::Want)
    }
}

/// The bytes of a stored block.
fn stored(left: &mut usize, given: &mut Given<'_>) -> Option<Pause> {
    // Behind a block's length there are no bits that were taken and not used.
    let free = given.room.len() - given.filled;
    let len = free.min(*left).min(given.input.len() - given.read);
    let bytes = &given.input[given.read..given.read + len];
    given.room[given.filled..given.filled + len].copy_from_slice(bytes);
    (given.read, given.filled, *left) = (given.read + len, given.filled + len, *left - len);
    Some(if *left == 0 { Pause::EndOfBlock } else { Pause::Want })
}
