//! What was decoded before the current call, as far back as deflate may refer.

/// How far back deflate may refer.
pub(crate) const WINDOW_LEN: usize = 32 << 10;

/// The last bytes decoded, moved to the front only once in a while.
pub(super) struct History {
    bytes: Box<[u8; 3 * WINDOW_LEN]>,
    end: usize,
    /// Of those before `end`: at most a window.
    len: usize,
}

impl History {
    pub fn new() -> Self {
        Self { bytes: Box::new([0; 3 * WINDOW_LEN]), end: 0, len: 0 }
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
        let decoded = &decoded[decoded.len().saturating_sub(WINDOW_LEN)..];
        if self.end + decoded.len() > self.bytes.len() {
            self.bytes.copy_within(self.end - self.len..self.end, 0);
            self.end = self.len;
        }
        self.bytes[self.end..self.end + decoded.len()].copy_from_slice(decoded);
        self.end += decoded.len();
        self.len = WINDOW_LEN.min(self.len + decoded.len());
    }

    /// The byte `distance` (1: the last one) before the end; at most [`len`](Self::len).
    pub fn back(&self, distance: usize) -> u8 {
        self.bytes[self.end - distance]
    }

    /// Copies what begins `distance` before the end.
    pub fn copy(&self, distance: usize, to: &mut [u8]) {
        let start = self.end - distance;
        to.copy_from_slice(&self.bytes[start..start + to.len()]);
    }

    /// The window, zeros before it if it is shorter.
    pub fn window(&self) -> Box<[u8; WINDOW_LEN]> {
        let mut window = Box::new([0; WINDOW_LEN]);
        self.copy(self.len, &mut window[WINDOW_LEN - self.len..]);
        window
    }
}
