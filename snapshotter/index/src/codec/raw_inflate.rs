//! Raw inflate that can stop at block boundaries and start in the middle of a stream.
//!
//! The only door to zlib's C interface (its implementation, `libz-rs-sys`, is Rust); all unsafe code
//! of this crate is here.

use std::ffi::CStr;

use libz_rs_sys::{
    Z_BLOCK, Z_BUF_ERROR, Z_DATA_ERROR, Z_MEM_ERROR, Z_NO_FLUSH, Z_OK, Z_STREAM_END, crc32,
    inflate, inflateEnd, inflateGetDictionary, inflateInit2_, inflatePrime, inflateReset,
    inflateSetDictionary, z_stream, zlibVersion,
};

/// How far back deflate may refer.
pub(crate) const WINDOW_LEN: usize = 32 << 10;

/// Raw deflate (that is what the sign says) with windows of 2^15 bytes.
const WINDOW_BITS: i32 = -15;

/// `z_stream.data_type`: the stream stands right behind a block.
const AT_BLOCK: i32 = 128;
/// `z_stream.data_type`: the current (or just finished) block is the last.
const LAST_BLOCK: i32 = 64;
/// `z_stream.data_type`: how many bits were read but not used.
const UNUSED_BITS: i32 = 63;

pub(super) struct RawInflate {
    stream: Box<z_stream>,
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
    Block { unused_bits: u8 },
    /// Behind the last block, on a byte boundary.
    End,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("out of memory")]
    Memory,
    #[error("{0}")]
    Data(&'static str),
}

// SAFETY: the stream's pointers are to its own state, allocated by the default allocator and shared
// with nobody; `next_in` and `next_out` are not read outside `step`, which sets them.
#[expect(unsafe_code, reason = "z_stream holds raw pointers, to memory that only it uses")]
unsafe impl Send for RawInflate {}

impl RawInflate {
    #[expect(unsafe_code, reason = "zlib's C interface")]
    pub fn new() -> Result<Self, Error> {
        let mut stream = Box::new(z_stream::default());
        let size = i32::try_from(size_of::<z_stream>()).map_err(|_| Error::Memory)?;
        // SAFETY: the stream is valid and asks for the default allocator.
        let code = unsafe { inflateInit2_(&raw mut *stream, WINDOW_BITS, zlibVersion(), size) };
        if code == Z_OK { Ok(Self { stream }) } else { Err(Error::Memory) }
    }

    /// Back to the state of a new one.
    #[expect(unsafe_code, reason = "zlib's C interface")]
    pub fn reset(&mut self) {
        // SAFETY: the stream was initialised by `new`; this can't fail for such a stream.
        unsafe { inflateReset(&raw mut *self.stream) };
    }

    /// Before the first step: `bits` (1 to 7) bits that precede the input, and what was decoded before.
    #[expect(unsafe_code, reason = "zlib's C interface")]
    pub fn resume(&mut self, bits: u8, value: u8) -> Result<(), Error> {
        // SAFETY: the stream was initialised by `new`.
        let code =
            unsafe { inflatePrime(&raw mut *self.stream, i32::from(bits), i32::from(value)) };
        if code == Z_OK { Ok(()) } else { Err(Error::Data("no bit position")) }
    }

    /// Before the first step: what was decoded before.
    #[expect(unsafe_code, reason = "zlib's C interface")]
    pub fn set_window(&mut self, window: &[u8; WINDOW_LEN]) -> Result<(), Error> {
        const LEN: u32 = 32 << 10;
        // SAFETY: the stream was initialised by `new`; the pointer is to that many bytes.
        let code = unsafe { inflateSetDictionary(&raw mut *self.stream, window.as_ptr(), LEN) };
        if code == Z_OK { Ok(()) } else { Err(Error::Data("no window")) }
    }

    /// The last 32 KiB decoded, zeros before them if there were fewer.
    #[expect(unsafe_code, reason = "zlib's C interface")]
    pub fn window(&self) -> Box<[u8; WINDOW_LEN]> {
        let mut window = Box::new([0; WINDOW_LEN]);
        let mut len = 0;
        // SAFETY: the stream was initialised by `new`; zlib writes at most 32 KiB.
        unsafe { inflateGetDictionary(&raw const *self.stream, window.as_mut_ptr(), &raw mut len) };
        let len = WINDOW_LEN.min(len as usize);
        window.copy_within(..len, WINDOW_LEN - len);
        window[..WINDOW_LEN - len].fill(0);
        window
    }

    /// Decodes until input or room runs out, the stream ends or, if asked, a block does.
    #[expect(unsafe_code, reason = "zlib's C interface")]
    pub fn step(&mut self, input: &[u8], room: &mut [u8], stop: bool) -> Result<Step, Error> {
        let in_len = u32::try_from(input.len()).unwrap_or(u32::MAX);
        let out_len = u32::try_from(room.len()).unwrap_or(u32::MAX);
        let stream = &mut *self.stream;
        (stream.next_in, stream.avail_in) = (input.as_ptr(), in_len);
        (stream.next_out, stream.avail_out) = (room.as_mut_ptr(), out_len);
        // SAFETY: the stream was initialised by `new`; both pointers are to at least that many bytes,
        // which nobody else writes during the call.
        let code = unsafe { inflate(stream, if stop { Z_BLOCK } else { Z_NO_FLUSH }) };
        let mut consumed = (in_len - stream.avail_in) as usize;
        let produced = (out_len - stream.avail_out) as usize;
        let flags = stream.data_type;
        let unused_bits = u8::try_from(flags & UNUSED_BITS).unwrap_or(0);
        let at = match code {
            Z_STREAM_END => {
                // Whole bytes read ahead belong to what follows the stream.
                consumed = consumed
                    .checked_sub(usize::from(unused_bits / 8))
                    .ok_or(Error::Data("stream ends before the input given"))?;
                At::End
            }
            Z_OK | Z_BUF_ERROR if stop && flags & (AT_BLOCK | LAST_BLOCK) == AT_BLOCK => {
                At::Block { unused_bits }
            }
            Z_OK | Z_BUF_ERROR => At::Middle,
            Z_MEM_ERROR => return Err(Error::Memory),
            Z_DATA_ERROR => return Err(Error::Data(self.message())),
            _ => return Err(Error::Data("unexpected state")),
        };
        Ok(Step { consumed, produced, at })
    }

    #[expect(unsafe_code, reason = "zlib's C interface")]
    fn message(&self) -> &'static str {
        if self.stream.msg.is_null() {
            return "invalid data";
        }
        // SAFETY: zlib's messages are NUL-terminated string literals.
        let text = unsafe { CStr::from_ptr::<'static>(self.stream.msg) };
        text.to_str().unwrap_or("invalid data")
    }
}

impl Drop for RawInflate {
    #[expect(unsafe_code, reason = "zlib's C interface")]
    fn drop(&mut self) {
        // SAFETY: the stream was initialised by `new` and is not used afterwards.
        unsafe { inflateEnd(&raw mut *self.stream) };
    }
}

/// The CRC-32 of `bytes` after those whose CRC-32 is `crc` (0: none).
#[expect(unsafe_code, reason = "zlib's C interface")]
#[expect(clippy::cast_possible_truncation, reason = "a CRC-32 in C's unsigned long")]
pub(super) fn crc_of(crc: u32, bytes: &[u8]) -> u32 {
    bytes.chunks(1 << 30).fold(crc, |crc, part| {
        let len = u32::try_from(part.len()).unwrap_or(0);
        // SAFETY: the pointer is to that many bytes.
        unsafe { crc32(crc.into(), part.as_ptr(), len) as u32 }
    })
}
