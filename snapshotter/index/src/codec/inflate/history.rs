//! What was decoded before the current call, as far back as deflate may refer.

use super::checkpoint::Checkpoint;

/// How far back deflate may refer.
pub(crate) const WINDOW_LEN: usize = 32 << 10;

/// The last bytes decoded, moved to the front only once in a while.
pub(super) struct History {
    bytes: Box<[u8; 3 * WINDOW_LEN]>,
    end: usize,
    /// Of those before `end`: at most a window.
    len: usize,
    /// The last one, if any was asked for.
    checkpoint: Option<Checkpoint>,
}

impl History {
    pub fn new() -> Self {
        Self { bytes: Box::new([0; 3 * WINDOW_LEN]), end: 0, len: 0, checkpoint: None }
    }

    pub fn clear(&mut self) {
        (self.end, self.len) = (0, 0);
    }

    pub fn set(&mut self, window: &[u8; WINDOW_LEN]) {
        self.clear();
        self.push(window);
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Adds what was decoded.
    pub fn push(&mut self, decoded: &[u8]) {
        let all = decoded.len();
        let decoded = &decoded[decoded.len().saturating_sub(WINDOW_LEN)..];
        if self.end + decoded.len() > self.bytes.len() {
            self.bytes.copy_within(self.end - self.len..self.end, 0);
            self.end = self.len;
        }
        self.bytes[self.end..self.end + decoded.len()].copy_from_slice(decoded);
        self.end += decoded.len();
        self.len = WINDOW_LEN.min(self.len + decoded.len());
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.pass(all);
        }
    }

    /// The byte `distance` (1: the last one) before the end; at most [`len`](Self::len).
    pub fn back(&mut self, distance: usize) -> u8 {
        let mut byte = 0;
        self.copy(distance, std::slice::from_mut(&mut byte));
        byte
    }

    /// Copies what begins `distance` before the end.
    pub fn copy(&mut self, distance: usize, to: &mut [u8]) {
        let start = self.end - distance;
        to.copy_from_slice(&self.bytes[start..start + to.len()]);
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.refer(distance, to.len());
        }
    }

    /// The end becomes a checkpoint, in place of the one before.
    pub fn set_checkpoint(&mut self) {
        let mut window = Box::new([0; WINDOW_LEN]);
        window[WINDOW_LEN - self.len..].copy_from_slice(&self.bytes[self.end - self.len..self.end]);
        self.checkpoint = Some(Checkpoint::new(window));
    }

    pub fn take_checkpoint(&mut self) -> Option<Checkpoint> {
        self.checkpoint.take()
    }
}
