//! HTTP/2 as Go's clients speak it to a unix socket, with an authority that servers take. Pure: bytes in, bytes out.
//!
//! kubelet and crictl dial a path, and grpc-go makes it the requests' `:authority`: `%2Frun%2Fskimmer%2Fcri.sock`. That
//! is none by RFC 3986, hyper refuses such a request, and there is no setting for either. So `:authority` becomes
//! `localhost` before hyper sees it.
//!
//! Owns: the client's header compression (RFC 7541). Its header blocks are decoded, and go on as literals that leave no
//! trace in anybody's table.
//! Does not own: anything else that is in the stream. Frames without headers pass untouched, whatever they are.
//!
//! Invariants:
//! - No more than one frame with headers and one header block are held, and both are bounded.
//! - After an error there is nothing to do but to close the connection.

#[cfg(test)]
pub mod tests;

use bytes::{BufMut, BytesMut};
use loona_hpack::Decoder;
use loona_hpack::decoder::DecoderError;
use loona_hpack::encoder::encode_integer_into;

/// What every client begins with (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD: usize = 9;
/// Payload of a frame, as long as nobody announces more; servers here don't.
const FRAME_BYTES: usize = 16 << 10;
/// A request's headers, encoded by the client or by us. hyper takes 16 KiB of them.
const BLOCK_BYTES: usize = 64 << 10;
/// A client's table, as long as nobody announces another.
const TABLE_BYTES: usize = 4096;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
const PRIORITY_BYTES: usize = 5;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the client doesn't speak HTTP/2")]
    Preface,
    #[error("a frame with headers has {0} bytes, more than {FRAME_BYTES}")]
    Frame(usize),
    #[error("a request has more than {BLOCK_BYTES} bytes of headers")]
    Block,
    #[error("a frame of type {0} is where headers have to go on")]
    Interrupted(u8),
    #[error("headers go on that never began")]
    Continuation,
    #[error("a frame with headers is shorter than its padding")]
    Padding,
    #[error("decompress headers")]
    Compression(#[source] DecoderError),
}

/// One client's side of a connection.
pub struct Rewriter {
    awaited: Awaited,
    /// The beginning of what is awaited.
    partial: Vec<u8>,
    /// Bytes that are still to come of a frame that is none of our business.
    passing: usize,
    block: Option<Block>,
    decoder: Decoder<'static>,
}

enum Awaited {
    Preface,
    Head,
    /// A frame with headers, of this length.
    Frame(usize),
}

/// Headers that aren't complete.
struct Block {
    /// As frames have it.
    stream: [u8; 4],
    end_stream: u8,
    bytes: Vec<u8>,
}

/// The first bytes of a frame.
struct Head {
    len: usize,
    kind: u8,
    flags: u8,
    stream: [u8; 4],
}

impl Head {
    fn of(bytes: &[u8]) -> Option<Self> {
        let [a, b, c, kind, flags, s0, s1, s2, s3] = *bytes.first_chunk::<HEAD>()?;
        let len = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        Some(Self { len, kind, flags, stream: [s0, s1, s2, s3] })
    }
}

impl Default for Rewriter {
    fn default() -> Self {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(TABLE_BYTES);
        Self { awaited: Awaited::Preface, partial: Vec::new(), passing: 0, block: None, decoder }
    }
}

impl Rewriter {
    /// Takes in what the client sent, in any portions, and adds to `output` what a server is to see of it.
    pub fn push(&mut self, mut input: &[u8], output: &mut BytesMut) -> Result<(), Error> {
        loop {
            let passing = take(&mut input, self.passing);
            output.put_slice(passing);
            self.passing -= passing.len();
            let awaited = match self.awaited {
                Awaited::Preface => PREFACE.len(),
                Awaited::Head => HEAD,
                Awaited::Frame(len) => HEAD + len,
            };
            let missing = awaited - self.partial.len();
            self.partial.extend_from_slice(take(&mut input, missing));
            if self.passing > 0 || self.partial.len() < awaited {
                return Ok(());
            }
            self.step(output)?;
        }
    }

    /// What was awaited is there.
    fn step(&mut self, output: &mut BytesMut) -> Result<(), Error> {
        let partial = std::mem::take(&mut self.partial);
        match self.awaited {
            Awaited::Preface if partial == PREFACE => output.put_slice(&partial),
            Awaited::Preface => return Err(Error::Preface),
            Awaited::Frame(_) => self.headers(&partial, output)?,
            Awaited::Head => {
                let Some(head) = Head::of(&partial) else { return Ok(()) };
                if matches!(head.kind, HEADERS | CONTINUATION) {
                    if head.len > FRAME_BYTES {
                        return Err(Error::Frame(head.len));
                    }
                    (self.partial, self.awaited) = (partial, Awaited::Frame(head.len));
                    return Ok(());
                }
                if self.block.is_some() {
                    return Err(Error::Interrupted(head.kind));
                }
                output.put_slice(&partial);
                self.passing = head.len;
            }
        }
        self.awaited = Awaited::Head;
        Ok(())
    }

    fn headers(&mut self, frame: &[u8], output: &mut BytesMut) -> Result<(), Error> {
        let Some(head) = Head::of(frame) else { return Ok(()) };
        let payload = &frame[HEAD..];
        let block = match (self.block.take(), head.kind) {
            (None, HEADERS) => {
                let bytes = fragment(payload, head.flags).ok_or(Error::Padding)?.to_vec();
                Block { stream: head.stream, end_stream: head.flags & END_STREAM, bytes }
            }
            (Some(mut block), CONTINUATION) if block.stream == head.stream => {
                block.bytes.extend_from_slice(payload);
                block
            }
            (None, _) => return Err(Error::Continuation),
            (Some(_), kind) => return Err(Error::Interrupted(kind)),
        };
        if block.bytes.len() > BLOCK_BYTES {
            return Err(Error::Block);
        }
        if head.flags & END_HEADERS == 0 {
            self.block = Some(block);
            return Ok(());
        }
        let literals = self.literals(&block.bytes)?;
        put_frames(&block, &literals, output);
        Ok(())
    }

    /// The same header fields as literals.
    fn literals(&mut self, block: &[u8]) -> Result<Vec<u8>, Error> {
        let mut literals = Vec::new();
        let decoded = self.decoder.decode_with_cb(block, |name, value| {
            // A short reference to the table may stand for much.
            if literals.len() <= BLOCK_BYTES {
                let is_authority = *name == *b":authority";
                let value = if is_authority { &b"localhost"[..] } else { &value };
                put_literal(&name, value, &mut literals);
            }
        });
        decoded.map_err(Error::Compression)?;
        if literals.len() > BLOCK_BYTES { Err(Error::Block) } else { Ok(literals) }
    }
}

/// Up to `most` bytes off the front.
fn take<'a>(input: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(most.min(input.len()));
    *input = rest;
    taken
}

/// A HEADERS frame's part of the header block: without padding, and without a priority, which is nothing any more.
fn fragment(payload: &[u8], flags: u8) -> Option<&[u8]> {
    let (payload, padding) = match flags & PADDED {
        0 => (payload, 0),
        _ => payload.split_first().map(|(padding, rest)| (rest, usize::from(*padding)))?,
    };
    let from = if flags & PRIORITY == 0 { 0 } else { PRIORITY_BYTES };
    payload.get(from..payload.len().checked_sub(padding)?)
}

/// "Literal Header Field without Indexing — New Name" (RFC 7541 §6.2.2), without Huffman's code.
fn put_literal(name: &[u8], value: &[u8], literals: &mut Vec<u8>) {
    literals.push(0);
    for text in [name, value] {
        // Writing to a Vec doesn't fail.
        let _ = encode_integer_into(text.len(), 7, 0, &mut *literals);
        literals.extend_from_slice(text);
    }
}

fn put_frames(block: &Block, literals: &[u8], output: &mut BytesMut) {
    let (mut rest, mut kind, mut flags) = (literals, HEADERS, block.end_stream);
    loop {
        let part = take(&mut rest, FRAME_BYTES);
        flags |= if rest.is_empty() { END_HEADERS } else { 0 };
        output.put_uint(part.len() as u64, 3);
        output.put_slice(&[kind, flags]);
        output.put_slice(&block.stream);
        output.put_slice(part);
        if rest.is_empty() {
            return;
        }
        (kind, flags) = (CONTINUATION, 0);
    }
}
