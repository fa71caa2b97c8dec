//! Windows without the bytes that nothing refers to.
//!
//! A checkpoint's window is 32 KiB, but what is decoded behind it refers to a small part of them; with
//! the others zeroed it compresses several times better, which makes closer checkpoints affordable.
//!
//! How to find that part without an inflate of one's own: inflating only copies, never looks. So decode
//! the first 32 KiB behind the checkpoint (what comes later can't reach the window) once more, with
//! every window byte changed by a mark. Where the output differs from the true one, the difference
//! is the mark of the byte that was copied there. Marks are arranged so that three in a row, the
//! shortest copy that deflate has, name their place.

use super::raw_inflate::{At, Error, RawInflate, WINDOW_LEN};

/// Most compressed bytes kept of what follows a checkpoint. Only a stream full of empty blocks
/// needs more for 32 KiB; there the window stays whole. Part of the index format.
const MAX_COMPRESSED: usize = 64 << 10;

/// Marks have three digits to this base, each of its own kind: 1 to 85, 86 to 170, 171 to 255.
const BASE: usize = 85;

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
    inflate: RawInflate,
    marks: Box<[u8; WINDOW_LEN]>,
    /// The checkpoint's window, marked.
    window: Box<[u8; WINDOW_LEN]>,
    data: Vec<u8>,
    /// All ones for a byte of the window that is used, zeros for another.
    used: Vec<u8>,
}

impl Scratch {
    pub fn new() -> Result<Self, Error> {
        let mut marks = Box::new([0; WINDOW_LEN]);
        marks.iter_mut().enumerate().for_each(|(at, byte)| *byte = mark(at));
        Ok(Self {
            inflate: RawInflate::new()?,
            marks,
            window: Box::new([0; WINDOW_LEN]),
            data: vec![0; WINDOW_LEN],
            used: vec![0; WINDOW_LEN],
        })
    }

    /// Fills `used`; false if too little of what follows the checkpoint is known.
    fn find_used(&mut self, checkpoint: &Checkpoint) -> Result<bool, Error> {
        let real = checkpoint.window.iter().zip(self.marks.iter());
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
                continue;
            }
            let place = place(*three).filter(|at| self.marks[*at..at + 3] == *three);
            let Some(at) = place else {
                from += 1;
                continue;
            };
            let same = |(data, mark): &(&u8, &u8)| data == mark;
            let len = data[from..].iter().zip(&self.marks[at..]).take_while(same).count();
            self.used[at..at + len].fill(USED);
            from += len - 2;
        }
        Ok(true)
    }

    /// Decodes what follows behind the marked window: how many bytes were wanted and came, less if
    /// their member ends before.
    fn decode(&mut self, checkpoint: &Checkpoint) -> Result<Option<usize>, Error> {
        let mut input = &checkpoint.compressed[..];
        self.inflate.reset();
        self.inflate.set_window(&self.window)?;
        if let (1.., [first, rest @ ..]) = (checkpoint.bit, input) {
            self.inflate.resume(8 - checkpoint.bit, first >> checkpoint.bit)?;
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

/// The mark of the window's byte at `at`: one of the three digits of `at / 3`. Never zero.
fn mark(at: usize) -> u8 {
    let (group, kind) = (at / 3, at % 3);
    let digit = match kind {
        0 => group / (BASE * BASE),
        1 => group / BASE % BASE,
        _ => group % BASE,
    };
    u8::try_from(1 + kind * BASE + digit).unwrap_or(0)
}

/// Where these three marks stand, if anywhere; to be checked.
fn place(marks: [u8; 3]) -> Option<usize> {
    if marks.contains(&0) {
        return None;
    }
    let [a, b, c] = marks.map(|mark| usize::from(mark - 1) % BASE);
    let kind = usize::from(marks[0] - 1) / BASE;
    let group = match kind {
        0 => (a * BASE + b) * BASE + c,
        // Two digits of this group, the first of the next.
        1 => [0, 1]
            .map(|first| (first * BASE + a) * BASE + b)
            .into_iter()
            .find(|group| (group + 1) / (BASE * BASE) == c)?,
        // The last digit of this group, two of the next.
        _ => ((b * BASE + c) * BASE + (a + 1) % BASE).checked_sub(1)?,
    };
    let at = group * 3 + kind;
    (at + 3 <= WINDOW_LEN).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::{BASE, WINDOW_LEN, mark, place};

    #[test]
    fn three_marks_name_their_place() {
        const { assert!(WINDOW_LEN / 3 < 2 * BASE * BASE) };
        for at in 0..WINDOW_LEN - 2 {
            assert_eq!(place([mark(at), mark(at + 1), mark(at + 2)]), Some(at));
        }
        assert!((0..WINDOW_LEN).all(|at| mark(at) > 0));
    }

    #[test]
    fn arbitrary_marks_are_somewhere_or_nowhere() {
        for n in (0..1u32 << 24).step_by(7) {
            let [a, b, c, _] = n.to_le_bytes();
            assert!(place([a, b, c]).is_none_or(|at| at + 3 <= WINDOW_LEN));
        }
    }
}
