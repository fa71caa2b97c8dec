//! A few buffers shared by all mounts and decoders, so that hundreds of idle mounts hold none, and busy ones have
//! theirs faulted in once.

use crate::fuse::device::MAX_READ;
use crate::kept::Kept;

/// Buffers of [`MAX_READ`] bytes.
#[derive(Debug, Default)]
pub struct Buffers(Kept<Vec<u8>>);

impl Buffers {
    /// Calls `use_it` with a buffer of `len` bytes of any content.
    pub fn with<T>(&self, len: usize, use_it: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut buffer = self.0.take().unwrap_or_else(|| vec![0; MAX_READ as usize]);
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        let result = use_it(&mut buffer[..len]);
        self.0.keep(buffer);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back() {
        let buffers = Buffers::default();
        let first = buffers.with(10, |buffer| {
            assert_eq!(buffer.len(), 10);
            buffer.as_ptr()
        });
        assert_eq!(buffers.with(20, |buffer| buffer.as_ptr()), first);
        assert_eq!(
            buffers.with(MAX_READ as usize + 1, |buffer| buffer.len()),
            MAX_READ as usize + 1
        );
    }
}
