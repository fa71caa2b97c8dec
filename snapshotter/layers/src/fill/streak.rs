//! How readers go through a layer: what is worth decoding before they ask. Pure.

use std::ops::Range;

/// Chunks decoded ahead of a reader that reads on and on, at most.
pub const AHEAD: usize = 32;

/// Chunks that a reader has to wait for one after the other before more are decoded ahead: one, and twice as
/// many with each chunk that follows. Most files end sooner: the chunks behind them are somebody else's.
const STREAK: usize = 3;

/// The chunks, one behind the other, that readers waited for last.
#[derive(Debug, Default)]
pub struct Streak {
    chunks: Range<usize>,
}

impl Streak {
    /// Readers now wait for `run`: how many chunks behind it are worth decoding ahead.
    pub fn extend(&mut self, run: Range<usize>) -> usize {
        // Several reads wait for one chunk, and nobody waits for what was decoded ahead.
        let reach = self.chunks.start..=self.chunks.end + self.ahead();
        if !self.chunks.is_empty() && reach.contains(&run.start) {
            self.chunks.end = run.end.max(self.chunks.end);
        } else {
            self.chunks = run;
        }
        self.ahead()
    }

    /// The first of the chunks that are worth decoding ahead.
    pub fn foreseen(&self) -> Option<usize> {
        (self.ahead() > 0).then_some(self.chunks.end)
    }

    fn ahead(&self) -> usize {
        match self.chunks.len().checked_sub(STREAK + 1) {
            None => 0,
            Some(doublings) => AHEAD.min(1 << doublings.min(AHEAD)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streaks() {
        let check = |runs: &[Range<usize>], expected: &[usize]| {
            let mut streak = Streak::default();
            let ahead: Vec<usize> = runs.iter().map(|run| streak.extend(run.clone())).collect();
            assert_eq!(ahead, expected, "{runs:?}");
        };
        check(
            &[0..1, 1..2, 2..3, 3..4, 4..5, 5..6, 6..7, 7..8, 8..9, 9..10],
            &[0, 0, 0, 1, 2, 4, 8, 16, 32, 32],
        );
        // Several reads wait for the same chunk.
        check(&[5..6, 5..6, 6..7, 6..7, 7..8, 8..9, 8..9], &[0, 0, 0, 0, 0, 1, 1]);
        // What was decoded ahead is not waited for.
        check(&[0..2, 2..4, 5..6, 8..9], &[0, 1, 4, 32]);
        // Leaps, back or far ahead, end it.
        check(&[0..4, 9..10, 10..11], &[1, 0, 0]);
        check(&[5..9, 2..3, 3..4], &[1, 0, 0]);
        check(&[0..1, 2..3, 4..5, 6..7], &[0, 0, 0, 0]);
    }
}
