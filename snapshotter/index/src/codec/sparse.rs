//! Windows without the bytes that nothing refers to.
//!
//! A checkpoint's window is 32 KiB, but what is decoded behind it refers to a small part of them; with
//! the others zeroed it compresses several times better, which makes closer checkpoints affordable.
//!
//! How to find that part without an inflate of one's own: inflating only copies, never looks. So decode
//! the first 32 KiB behind the checkpoint (what comes later can't reach the window) once more, with
//! every window byte changed by a mark. Where the output differs from the true one, the difference
//! is the mark of the byte that was copied there. Marks are arranged so that two in a row name their
//! place; the shortest copy that deflate has is of three.

use super::inflate::{At, Error, Inflate, WINDOW_LEN};

/// Most compressed bytes kept of what follows a checkpoint. Only a stream full of empty blocks
/// needs more for 32 KiB; there the window stays whole. Part of the index format.
const MAX_COMPRESSED: usize = 64 << 10;

/// All bits of a byte.
const USED: u8 = 0xff;

/// A checkpoint, and the beginning of what follows it.
pub(super) struct Checkpoint {
    window: Box<[u8; WINDOW_LEN]>,
    /// The first bit of the first byte of `compressed` that belongs to what follows.
    bit: u8,
    compressed: Vec<u8>,
    data: Vec<u8>,
}

impl Checkpoint {
    /// At bit `bit` of the byte with which `compressed` starts.
    pub fn new(window: Box<[u8; WINDOW_LEN]>, bit: u8, compressed: &[u8]) -> Self {
        Self { window, bit, compressed: compressed.to_vec(), data: Vec::with_capacity(WINDOW_LEN) }
    }

    /// What was read and decoded next.
    pub fn follow(&mut self, compressed: &[u8], data: &[u8]) {
        let room = MAX_COMPRESSED.saturating_sub(self.compressed.len());
        self.compressed.extend_from_slice(&compressed[..compressed.len().min(room)]);
        let room = WINDOW_LEN - self.data.len();
        self.data.extend_from_slice(&data[..data.len().min(room)]);
    }

    /// The window, with zeros in place of bytes that nothing refers to.
    pub fn sparse(mut self, scratch: &mut Scratch) -> Box<[u8; WINDOW_LEN]> {
        // What decoded once decodes again; where it doesn't, because too little was kept, the window
        // stays whole.
        if scratch.find_used(&self).is_ok_and(|complete| complete) {
            self.window.iter_mut().zip(&scratch.used).for_each(|(byte, used)| *byte &= used);
        }
        self.window
    }
}

/// What finding the used bytes takes, kept from one checkpoint to the next.
pub(super) struct Scratch {
    inflate: Inflate,
    marks: Marks,
    /// The checkpoint's window, marked.
    window: Box<[u8; WINDOW_LEN]>,
    data: Vec<u8>,
    /// All ones for a byte of the window that is used, zeros for another.
    used: Vec<u8>,
}

impl Scratch {
    pub fn new() -> Self {
        Self {
            inflate: Inflate::new(),
            marks: Marks::new(),
            window: Box::new([0; WINDOW_LEN]),
            data: vec![0; WINDOW_LEN],
            used: vec![0; WINDOW_LEN],
        }
    }

    /// Fills `used`; false if too little of what follows the checkpoint is known.
    fn find_used(&mut self, checkpoint: &Checkpoint) -> Result<bool, Error> {
        let real = checkpoint.window.iter().zip(self.marks.bytes.iter());
        self.window.iter_mut().zip(real).for_each(|(byte, (real, mark))| *byte = real ^ mark);
        let Some(len) = self.decode(checkpoint)? else { return Ok(false) };
        self.used.fill(0);
        // A copy that runs from the window into what follows may take only one or two bytes of it.
        self.used[WINDOW_LEN - 2..].fill(USED);
        let (data, real) = (&mut self.data[..len], &checkpoint.data[..len]);
        data.iter_mut().zip(real).for_each(|(byte, real)| *byte ^= real);
        let mut from = 0;
        while let Some(three) = data[from..].first_chunk::<3>() {
            if three[2] == 0 {
                from += 3;
                // Most of the output is the same: nothing of the window went there.
                while data[from..].starts_with(&[0; 16]) {
                    from += 16;
                }
                continue;
            }
            let len = match self.marks.place(*three) {
                Some(at) => {
                    let len = equal_len(&data[from..], &self.marks.bytes[at..]);
                    self.used[at..at + len].fill(USED);
                    len
                }
                None => 0,
            };
            // The last may be the first of another copy, the same by chance.
            from += len.saturating_sub(1).max(1);
        }
        Ok(true)
    }

    /// Decodes what follows behind the marked window: how many bytes were wanted and came, less if
    /// their member ends before.
    fn decode(&mut self, checkpoint: &Checkpoint) -> Result<Option<usize>, Error> {
        let mut input = &checkpoint.compressed[..];
        self.inflate.reset();
        self.inflate.set_window(&self.window);
        if let (1.., [first, rest @ ..]) = (checkpoint.bit, input) {
            self.inflate.resume(8 - checkpoint.bit, first >> checkpoint.bit);
            input = rest;
        }
        let (mut len, wanted) = (0, checkpoint.data.len());
        while len < wanted {
            let step = self.inflate.step(input, &mut self.data[len..wanted], false)?;
            input = &input[step.consumed..];
            len += step.produced;
            if step.at == At::End {
                return Ok(Some(len));
            }
            if step.produced == 0 && step.consumed == 0 {
                return Ok(None);
            }
        }
        Ok(Some(len))
    }
}

/// How many of the first bytes of both are equal.
fn equal_len(a: &[u8], b: &[u8]) -> usize {
    let words = a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0);
    let len = 8 * words.take_while(|(a, b)| a == b).count();
    len + a[len..].iter().zip(&b[len..]).take_while(|(a, b)| a == b).count()
}

/// What the bytes of a window are changed by.
struct Marks {
    bytes: Box<[u8; WINDOW_LEN]>,
    /// By two marks: the place of the first.
    places: Box<[u16]>,
}

impl Marks {
    /// No mark is zero, and none stands twice before the same other.
    fn new() -> Self {
        let pairs = |a: u8| (a..=u8::MAX).skip(1).flat_map(move |b| [a, b]);
        let sequence = (1..=u8::MAX).flat_map(|a| std::iter::once(a).chain(pairs(a)));
        let mut bytes = Box::new([0; WINDOW_LEN]);
        bytes.iter_mut().zip(sequence).for_each(|(byte, mark)| *byte = mark);
        let mut places = vec![u16::MAX; 1 << 16].into_boxed_slice();
        for (at, two) in (0..).zip(bytes.array_windows::<2>()) {
            places[usize::from(u16::from_be_bytes(*two))] = at;
        }
        Self { bytes, places }
    }

    /// Where these three marks stand, if anywhere.
    fn place(&self, three: [u8; 3]) -> Option<usize> {
        let at = self.places[usize::from(u16::from_be_bytes([three[0], three[1]]))];
        let at = usize::from(at);
        self.bytes.get(at..)?.starts_with(&three).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::{Marks, WINDOW_LEN};

    #[test]
    fn three_marks_name_their_place() {
        let marks = Marks::new();
        assert!(marks.bytes.iter().all(|mark| *mark > 0));
        for (at, three) in marks.bytes.array_windows::<3>().enumerate() {
            assert_eq!(marks.place(*three), Some(at));
        }
    }

    #[test]
    fn arbitrary_marks_are_somewhere_or_nowhere() {
        let marks = Marks::new();
        for n in (0..1u32 << 24).step_by(7) {
            let [a, b, c, _] = n.to_le_bytes();
            assert!(marks.place([a, b, c]).is_none_or(|at| at + 3 <= WINDOW_LEN));
        }
    }
}
