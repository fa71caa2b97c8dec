//! Buffers for pieces that come in, used again: fresh ones would be zeroed and faulted in, page by page.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Bytes that are kept for the next pieces.
const KEPT: usize = 16 << 20;

/// Buffers that nobody uses, shared by a node's streams.
#[derive(Default)]
pub struct Pool(Mutex<Free>);

#[derive(Default)]
struct Free {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

impl Pool {
    /// A buffer of `len` bytes of anything.
    pub fn take(&self, len: usize) -> Vec<u8> {
        let mut buffer = {
            let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let fitting = free.buffers.iter().rposition(|buffer| buffer.capacity() >= len);
            let buffer = fitting.map(|at| free.buffers.swap_remove(at)).unwrap_or_default();
            free.bytes -= buffer.capacity();
            buffer
        };
        buffer.resize(len, 0);
        buffer
    }

    /// The buffer as bytes, which bring it back here when the last of them is dropped.
    pub fn lend(self: &Arc<Self>, buffer: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent { buffer, pool: Arc::clone(self) })
    }
}

struct Lent {
    buffer: Vec<u8>,
    pool: Arc<Pool>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut free = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.bytes + buffer.capacity() <= KEPT {
            free.bytes += buffer.capacity();
            free.buffers.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_up_to_a_bound() {
        let pool = Arc::new(Pool::default());
        let many: Vec<_> = (0..20).map(|_| pool.lend(pool.take(1 << 20))).collect();
        let part = many[0].slice(5..9);
        drop(many);
        let kept = || pool.0.lock().unwrap().bytes;
        assert_eq!(kept(), KEPT);
        drop(part);
        assert_eq!(kept(), KEPT);
        for len in [1 << 20, 5, 0] {
            let buffer = pool.take(len);
            assert_eq!(buffer.len(), len);
        }
        assert!(kept() < KEPT);
        assert_eq!(pool.take(2 << 20).len(), 2 << 20);
    }
}
