//! zstd (RFC 8878): frames, one behind the other, skippable ones among them, walked incrementally.

use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

use super::{Error, Event, Step};

pub(super) const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Skippable frames start with this, the lowest nibble being anything.
pub(super) const SKIPPABLE: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];

/// Windows up to 128 MiB, what zstd's own tools decode without being told to: bounds the memory.
const WINDOW_LOG_MAX: u32 = 27;

/// See the module's documentation.
pub(super) struct Frames {
    context: DCtx<'static>,
    /// Compressed bytes consumed: an offset in the blob.
    at: u64,
    /// Where the last complete frame ended.
    end: u64,
    inside: bool,
}

impl Frames {
    /// From the start of a frame at `at`.
    pub fn new(at: u64) -> Result<Self, Error> {
        let mut context = DCtx::try_create().ok_or(Error::Memory)?;
        context
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))
            .map_err(|code| Error::Zstd { at, reason: get_error_name(code) })?;
        Ok(Self { context, at, end: at, inside: false })
    }

    pub const fn end(&self) -> u64 {
        self.end
    }

    /// Whether the blob may end here.
    pub const fn is_complete(&self) -> bool {
        !self.inside
    }

    /// Consumes some of `input`, fills some of `room`. No progress and no event: input is needed.
    pub fn step(&mut self, input: &[u8], room: &mut [u8]) -> Result<Step, Error> {
        if !self.inside {
            let event = if input.is_empty() { Event::None } else { Event::Start { at: self.at } };
            self.inside = !input.is_empty();
            return Ok(Step { consumed: 0, produced: 0, event });
        }
        let at = self.at;
        let mut source = InBuffer::around(input);
        let mut target = OutBuffer::around(room);
        let hint = self
            .context
            .decompress_stream(&mut target, &mut source)
            .map_err(|code| Error::Zstd { at, reason: get_error_name(code) })?;
        let (consumed, produced) = (source.pos(), target.pos());
        self.at += consumed as u64;
        if hint == 0 {
            self.inside = false;
            self.end = self.at;
        }
        Ok(Step { consumed, produced, event: Event::None })
    }
}
