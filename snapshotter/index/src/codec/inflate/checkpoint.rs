//! A checkpoint's window without the bytes that nothing refers to.
//!
//! The window is 32 KiB, but what is decoded behind it refers to a small part of them; with the others zeroed it
//! compresses several times better, which makes closer checkpoints affordable.

use super::WINDOW_LEN;

pub(super) struct Checkpoint {
    window: Box<[u8; WINDOW_LEN]>,
    /// All ones for a byte of the window that is used, zeros for another.
    used: Box<[u8; WINDOW_LEN]>,
    /// Bytes decoded since.
    behind: usize,
}

impl Checkpoint {
    /// Behind `window`.
    pub fn new(window: Box<[u8; WINDOW_LEN]>) -> Self {
        Self { window, used: Box::new([0; WINDOW_LEN]), behind: 0 }
    }

    /// So many bytes more were decoded.
    pub fn pass(&mut self, len: usize) {
        self.behind += len;
    }

    /// `len` bytes are used that begin `distance` before the last one decoded.
    pub fn refer(&mut self, distance: usize, len: usize) {
        if let Some(before) = distance.checked_sub(self.behind) {
            let start = WINDOW_LEN - before;
            self.used[start..start + len.min(before)].fill(u8::MAX);
        }
    }

    /// The window, with zeros in place of bytes that nothing referred to.
    pub fn sparse(mut self) -> Box<[u8; WINDOW_LEN]> {
        self.window.iter_mut().zip(self.used.iter()).for_each(|(byte, used)| *byte &= used);
        self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_referred_to_stays() {
        let mut checkpoint = Checkpoint::new(Box::new([7; WINDOW_LEN]));
        checkpoint.refer(WINDOW_LEN, 3);
        checkpoint.pass(100);
        // Two of these are from behind the checkpoint.
        checkpoint.refer(105, 7);
        checkpoint.refer(100, 50);
        checkpoint.refer(1, 3);
        checkpoint.pass(WINDOW_LEN);
        checkpoint.refer(WINDOW_LEN, 258);
        let window = checkpoint.sparse();
        let used: Vec<usize> = (0..WINDOW_LEN).filter(|at| window[*at] != 0).collect();
        let end = WINDOW_LEN;
        assert_eq!(used, [0, 1, 2, end - 5, end - 4, end - 3, end - 2, end - 1]);
    }
}
