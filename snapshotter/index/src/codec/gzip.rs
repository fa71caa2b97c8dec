//! gzip (RFC 1952): members, one behind the other, walked incrementally, from the blob's first byte
//! or from a checkpoint inside a member.
//!
//! What follows the last member must be another member, or zeros until the end of the blob: GNU gzip
//! and unpigz, which containerd prefers, ignore such padding; anything else is refused, as Go's
//! reader does.

use crc32fast::Hasher;

use super::inflate::{At, Inflate, WINDOW_LEN};
use super::{Error, Event, Step};

pub(super) const MAGIC: [u8; 3] = [0x1f, 0x8b, 8];

/// See the module's documentation.
pub(super) struct Members {
    inflate: Inflate,
    part: Part,
    /// Compressed bytes consumed: an offset in the blob.
    at: u64,
    /// Where the last complete member ended.
    end: u64,
    /// Whether the current member has been seen from its start, so that its checksum can be checked.
    whole: bool,
    crc: Hasher,
    /// Decoded length of the current member modulo 2^32.
    len: u32,
}

enum Part {
    Header(Header),
    /// The next byte's bits from this one on (1 to 7) belong to the block that starts there.
    Resume {
        bit: u8,
    },
    Body,
    Trailer {
        bytes: [u8; 8],
        have: usize,
    },
    Between,
    Padding,
}

impl Members {
    /// From the blob's first byte, or that of a member at `at`.
    pub fn new(at: u64) -> Self {
        let (inflate, part) = (Inflate::new(), Part::Header(Header::new()));
        Self { inflate, part, at, end: at, whole: true, crc: Hasher::new(), len: 0 }
    }

    /// As a new one.
    pub fn restart(&mut self, at: u64) {
        self.inflate.reset();
        (self.part, self.at, self.end) = (Part::Header(Header::new()), at, at);
        (self.whole, self.crc, self.len) = (true, Hasher::new(), 0);
    }

    /// As one that has decoded `window`, and what comes next is a block that starts with bit `bit` of the byte at `at`.
    pub fn resume(&mut self, at: u64, bit: u8, window: &[u8; WINDOW_LEN]) {
        self.restart(at);
        self.inflate.set_window(window);
        self.part = if bit == 0 { Part::Body } else { Part::Resume { bit } };
        self.whole = false;
    }

    /// As [`Inflate::set_checkpoint`].
    pub fn set_checkpoint(&mut self) {
        self.inflate.set_checkpoint();
    }

    /// As [`Inflate::take_window`]; nothing of another member refers to it.
    pub fn take_window(&mut self) -> Option<Box<[u8; WINDOW_LEN]>> {
        self.inflate.take_window()
    }

    pub const fn end(&self) -> u64 {
        self.end
    }

    /// Whether the blob may end here.
    pub const fn is_complete(&self) -> bool {
        matches!(self.part, Part::Between | Part::Padding)
    }

    /// Consumes some of `input`, fills some of `room`. No progress and no event: input is needed.
    pub fn step(&mut self, input: &[u8], room: &mut [u8], stop: bool) -> Result<Step, Error> {
        if matches!(self.part, Part::Body) {
            return self.body(input, room, stop);
        }
        let mut step = Step { consumed: 0, produced: 0, event: Event::None };
        for byte in input {
            if matches!(self.part, Part::Body) {
                break;
            }
            if matches!(self.part, Part::Between) && *byte == MAGIC[0] {
                step.event = Event::Start { at: self.at };
            }
            self.byte(*byte)?;
            self.at += 1;
            step.consumed += 1;
            if step.event != Event::None {
                break;
            }
        }
        Ok(step)
    }

    fn body(&mut self, input: &[u8], room: &mut [u8], stop: bool) -> Result<Step, Error> {
        let at = self.at;
        let step =
            self.inflate.step(input, room, stop).map_err(|source| Error::Inflate { at, source })?;
        self.at += step.consumed as u64;
        if self.whole {
            self.crc.update(&room[..step.produced]);
            #[expect(clippy::cast_possible_truncation, reason = "gzip counts modulo 2^32")]
            let produced = step.produced as u32;
            self.len = self.len.wrapping_add(produced);
        }
        let event = match step.at {
            At::Middle => Event::None,
            At::Block { unused_bits } => Event::Block { bit: self.at * 8 - u64::from(unused_bits) },
            At::End => {
                self.part = Part::Trailer { bytes: [0; 8], have: 0 };
                Event::None
            }
        };
        Ok(Step { consumed: step.consumed, produced: step.produced, event })
    }

    /// One byte outside the deflate streams.
    fn byte(&mut self, byte: u8) -> Result<(), Error> {
        let at = self.at;
        match &mut self.part {
            Part::Header(header) => {
                if header.push(byte).map_err(|reason| Error::Header { at, reason })? {
                    self.part = Part::Body;
                }
            }
            Part::Resume { bit } => {
                self.inflate.resume(8 - *bit, byte >> *bit);
                self.part = Part::Body;
            }
            Part::Body => {}
            Part::Trailer { bytes, have } => {
                bytes[*have] = byte;
                *have += 1;
                if *have == bytes.len() {
                    let [a, b, c, d, e, f, g, h] = *bytes;
                    let (crc, len) = ([a, b, c, d], [e, f, g, h]);
                    let found = (self.crc.clone().finalize(), self.len);
                    let matches = (u32::from_le_bytes(crc), u32::from_le_bytes(len)) == found;
                    if self.whole && !matches {
                        return Err(Error::Checksum { at });
                    }
                    self.part = Part::Between;
                    self.end = at + 1;
                }
            }
            Part::Between if byte == MAGIC[0] => {
                self.restart(at);
                let mut header = Header::new();
                header.push(byte).map_err(|reason| Error::Header { at, reason })?;
                self.part = Part::Header(header);
            }
            Part::Between | Part::Padding if byte == 0 => self.part = Part::Padding,
            Part::Between | Part::Padding => return Err(Error::Garbage { at }),
        }
        Ok(())
    }
}

/// A member's header, byte by byte.
struct Header {
    field: Field,
    flags: u8,
    /// Of everything before the header's own checksum.
    crc: Hasher,
}

enum Field {
    /// Magic, method, flags, time, extra flags, system: the byte at this offset is next.
    Fixed(usize),
    ExtraLen {
        low: Option<u8>,
    },
    Extra {
        left: u16,
    },
    Name,
    Comment,
    Crc {
        low: Option<u8>,
    },
}

const FHCRC: u8 = 2;
const FEXTRA: u8 = 4;
const FNAME: u8 = 8;
const FCOMMENT: u8 = 16;
const FIXED_LEN: usize = 10;

impl Header {
    fn new() -> Self {
        Self { field: Field::Fixed(0), flags: 0, crc: Hasher::new() }
    }

    /// True when `byte` was the header's last.
    fn push(&mut self, byte: u8) -> Result<bool, &'static str> {
        let mut done = None;
        match &mut self.field {
            Field::Fixed(n) => {
                match *n {
                    0..=2 if byte != MAGIC[*n] => {
                        return Err("no gzip member, or not compressed by deflate");
                    }
                    3 => self.flags = byte,
                    _ => {}
                }
                *n += 1;
                if *n == FIXED_LEN {
                    done = Some(0);
                }
            }
            Field::ExtraLen { low: low @ None } => *low = Some(byte),
            Field::ExtraLen { low: Some(low) } => match u16::from_le_bytes([*low, byte]) {
                0 => done = Some(FEXTRA),
                left => self.field = Field::Extra { left },
            },
            Field::Extra { left } => {
                *left -= 1;
                if *left == 0 {
                    done = Some(FEXTRA);
                }
            }
            Field::Name if byte == 0 => done = Some(FNAME),
            Field::Comment if byte == 0 => done = Some(FCOMMENT),
            Field::Name | Field::Comment => {}
            Field::Crc { low: low @ None } => {
                *low = Some(byte);
                return Ok(false);
            }
            Field::Crc { low: Some(low) } => {
                let crc = self.crc.clone().finalize() & 0xffff;
                return if crc == u32::from(u16::from_le_bytes([*low, byte])) {
                    Ok(true)
                } else {
                    Err("the header's checksum does not match")
                };
            }
        }
        self.crc.update(&[byte]);
        Ok(done.is_some_and(|done| self.next_field(done)))
    }

    /// Goes to the first field behind the one with flag `done`; true if there is none.
    fn next_field(&mut self, done: u8) -> bool {
        let order = [FEXTRA, FNAME, FCOMMENT, FHCRC];
        let behind = order.iter().position(|flag| *flag == done).map_or(0, |at| at + 1);
        let next = order[behind..].iter().find(|flag| self.flags & **flag != 0);
        self.field = match next {
            Some(&FEXTRA) => Field::ExtraLen { low: None },
            Some(&FNAME) => Field::Name,
            Some(&FCOMMENT) => Field::Comment,
            Some(_) => Field::Crc { low: None },
            None => return true,
        };
        false
    }
}
