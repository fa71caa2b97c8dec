//! A blob from its first byte to its last: the decoded bytes, and the chunks.

use super::gzip::Members;
use super::stream::Stream;
use super::table::{Start, Table};
use super::zstd::Frames;
use super::{Compression, Decoded, Error, Event, stored};
use crate::chunk::State;

/// Decoded bytes between two checkpoints inside a gzip member: the closer, the less a reader fetches that it doesn't
/// need, and the more the index weighs and costs. Part of the index format.
pub const SPAN: u64 = 512 << 10;

/// Members and frames shorter than this (decoded) share a chunk. Part of the index format.
const MIN_CHUNK: u64 = SPAN / 4;

/// Bytes that go out at a time: fits the second-level cache, and is long against a window.
const ROOM: usize = 256 << 10;

/// Decodes a blob that is pushed in from its first byte on.
///
/// Where chunks are cut (part of the index format):
/// - stored: every 256 KiB;
/// - gzip: at the first block boundary more than [`SPAN`] behind the chunk's start, and at every
///   member at least `SPAN / 4` behind it;
/// - zstd: at every frame at least `SPAN / 4` behind the chunk's start.
pub struct Decoder {
    limit: u64,
    /// The first bytes, until there are enough to know the compression.
    head: Vec<u8>,
    stream: Option<(Compression, Stream)>,
    room: Box<[u8]>,
    /// Compressed bytes seen, decoded bytes out.
    read: u64,
    data: u64,
    table: Table,
}

impl Decoder {
    /// `limit`: most decoded bytes. A blob that holds more is refused when they come, whatever it
    /// declared.
    pub fn new(limit: u64) -> Self {
        let room = vec![0; ROOM].into_boxed_slice();
        let (head, table) = (Vec::with_capacity(4), Table::new());
        Self { limit, head, stream: None, room, read: 0, data: 0, table }
    }

    /// The next bytes of the blob; what they decode to goes to `out` before this returns.
    pub fn push(&mut self, bytes: &[u8], out: &mut dyn FnMut(&[u8])) -> Result<(), Error> {
        self.read += bytes.len() as u64;
        if self.stream.is_some() {
            return self.decode(bytes, out);
        }
        let (head, rest) = bytes.split_at(bytes.len().min(4 - self.head.len()));
        self.head.extend_from_slice(head);
        if self.head.len() < 4 {
            return Ok(());
        }
        self.begin(out)?;
        self.decode(rest, out)
    }

    /// The blob's end: what is left goes to `out`.
    pub fn finish(mut self, out: &mut dyn FnMut(&[u8])) -> Result<Decoded, Error> {
        if self.stream.is_none() {
            self.begin(out)?;
        }
        let (data_len, blob_len) = (self.data, self.read);
        let Some((compression, mut stream)) = self.stream else {
            return Err(Error::Truncated { at: blob_len });
        };
        if !stream.is_complete() {
            return Err(Error::Truncated { at: blob_len });
        }
        let (chunks, windows) = match compression {
            Compression::Stored => (stored::chunks(data_len), Vec::new()),
            Compression::Gzip | Compression::Zstd => {
                self.table.finish(data_len, stream.end(), stream.take_window())?
            }
        };
        Ok(Decoded { compression, blob_len, data_len, chunks, windows })
    }

    fn begin(&mut self, out: &mut dyn FnMut(&[u8])) -> Result<(), Error> {
        let compression = Compression::sniff(&self.head);
        let stream = match compression {
            Compression::Stored => Stream::Stored { at: 0 },
            Compression::Gzip => Stream::Gzip(Members::new(0)),
            Compression::Zstd => Stream::Zstd(Frames::new(0)?),
        };
        self.stream = Some((compression, stream));
        let head = std::mem::take(&mut self.head);
        self.decode(&head, out)
    }

    fn decode(&mut self, bytes: &[u8], out: &mut dyn FnMut(&[u8])) -> Result<(), Error> {
        match &mut self.stream {
            Some((Compression::Stored, Stream::Stored { at })) => {
                *at += bytes.len() as u64;
                self.data += bytes.len() as u64;
                if self.data > self.limit {
                    return Err(Error::TooLarge { limit: self.limit });
                }
                out(bytes);
                Ok(())
            }
            Some((_, stream)) if !bytes.is_empty() => {
                let mut pass = Pass {
                    limit: self.limit,
                    stream,
                    room: &mut self.room,
                    filled: 0,
                    data: &mut self.data,
                    table: &mut self.table,
                };
                let done = pass.run(bytes, out);
                let filled = pass.filled;
                out(&self.room[..filled]);
                done
            }
            _ => Ok(()),
        }
    }
}

/// One push into a compressed stream.
struct Pass<'a> {
    limit: u64,
    stream: &'a mut Stream,
    room: &'a mut [u8],
    filled: usize,
    data: &'a mut u64,
    table: &'a mut Table,
}

impl Pass<'_> {
    fn run(&mut self, mut input: &[u8], out: &mut dyn FnMut(&[u8])) -> Result<(), Error> {
        loop {
            // Decoding stops at blocks only past the span: stopping costs a copy of the window.
            let missing = (self.table.start() + SPAN).saturating_sub(*self.data);
            let room = &mut self.room[self.filled..];
            let room_len = usize::try_from(missing).map_or(room.len(), |m| match m {
                0 => room.len(),
                m => m.min(room.len()),
            });
            let step = self.stream.step(input, &mut room[..room_len], missing == 0)?;
            input = &input[step.consumed..];
            self.filled += step.produced;
            *self.data += step.produced as u64;
            if *self.data > self.limit {
                return Err(Error::TooLarge { limit: self.limit });
            }
            self.note(step.event)?;
            if self.filled == self.room.len() {
                out(self.room);
                self.filled = 0;
            }
            if input.is_empty() && step.event == Event::None && step.produced < room_len {
                return Ok(());
            }
        }
    }

    /// Only what lies *behind* the span is a checkpoint: a boundary exactly there may have been
    /// passed unseen, depending on where the input was cut.
    fn note(&mut self, event: Event) -> Result<(), Error> {
        let len = *self.data - self.table.start();
        match event {
            Event::Block { bit } if len > SPAN => {
                let state = State::Gzip { bit: (bit % 8) as u8, window: None };
                self.cut(bit.div_ceil(8), bit / 8, state)?;
                self.stream.set_checkpoint();
                Ok(())
            }
            Event::Start { at } if len == 0 || len >= MIN_CHUNK => {
                let state = match self.stream {
                    Stream::Zstd(_) => State::ZstdFrame,
                    _ => State::Gzip { bit: 0, window: None },
                };
                self.cut(at, at, state)
            }
            _ => Ok(()),
        }
    }

    /// Ends a chunk at `end` in the blob and starts the next at `blob`, in this state.
    fn cut(&mut self, end: u64, blob: u64, state: State) -> Result<(), Error> {
        let next = Start { data: *self.data, blob, state };
        self.table.cut(end, next, self.stream.take_window())
    }
}
