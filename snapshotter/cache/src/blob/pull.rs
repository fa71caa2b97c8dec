//! A whole blob in order, while several connections fetch ahead.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::task::spawn_blocking;

use super::{Blob, Error};
use crate::fetch::Ticket;
use crate::source::Class;

/// Asked for at a time; the planner cuts it into runs.
const SEGMENT: u64 = 8 << 20;

/// Delivered pieces whose memory may be used again.
const KEPT: usize = 4;

/// Pieces asked for at a time where a source takes the whole blob.
const WHOLE_STEP: u32 = 1 << 14;

/// Delivers a blob piece by piece. Fetches at most the read-ahead window beyond what has been
/// delivered, unless a source takes the whole blob: that one is asked for all of it, so that it can
/// fetch what others lack first. What comes goes to disk, and one piece at a time into memory.
#[derive(Debug)]
pub struct PullThrough {
    blob: Arc<Blob>,
    class: Class,
    window: u64,
    /// The next piece to deliver.
    next: u32,
    /// The first piece not asked for.
    asked: u32,
    segments: VecDeque<(Range<u32>, Ticket)>,
    /// Delivered lately; their memory is used again once the caller is done with it.
    delivered: VecDeque<Bytes>,
}

impl PullThrough {
    pub(super) const fn new(blob: Arc<Blob>, class: Class, window: u64) -> Self {
        let segments = VecDeque::new();
        let delivered = VecDeque::new();
        Self { blob, class, window, next: 0, asked: 0, segments, delivered }
    }

    /// The next piece's bytes, or `None` after the last. After an error, calling it again tries
    /// again. May be cancelled.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        if self.next >= self.blob.geometry.pieces() {
            return Ok(None);
        }
        self.wait().await?;
        let (pieces, piece, memory) = (self.blob.pieces(), self.next, self.memory());
        let read = spawn_blocking(move || pieces.read(piece, memory)).await;
        let bytes = read
            .unwrap_or_else(|error| Err(std::io::Error::other(error)))
            .map_err(|source| Error::Read { digest: self.blob.digest, piece, source })?;
        self.next += 1;
        self.delivered.push_back(bytes.clone());
        Ok(Some(bytes))
    }

    /// Memory for the next piece: the oldest delivered one's, if the caller has let go of it.
    fn memory(&mut self) -> BytesMut {
        let oldest = self.delivered.pop_front_if(|oldest| oldest.is_unique());
        if self.delivered.len() >= KEPT {
            self.delivered.pop_front();
        }
        oldest.and_then(|oldest| oldest.try_into_mut().ok()).unwrap_or_default()
    }

    /// Returns when the next piece is on disk.
    async fn wait(&mut self) -> Result<(), Error> {
        let blob = Arc::clone(&self.blob);
        loop {
            let mut arrived = std::pin::pin!(blob.arrived.notified());
            arrived.as_mut().enable();
            self.ask_ahead();
            if blob.pieces().present.get(self.next as usize) {
                return Ok(());
            }
            let Some((_, ticket)) = self.segments.front_mut() else {
                // Forgotten after it had arrived.
                self.asked = self.next;
                continue;
            };
            let answer = tokio::select! {
                () = arrived => continue,
                answer = ticket.wait() => answer,
            };
            self.segments.pop_front();
            if let Err(failure) = answer {
                self.segments.clear();
                self.asked = self.next;
                return Err(blob.failed(failure));
            }
        }
    }

    /// Keeps the window full.
    fn ask_ahead(&mut self) {
        let geometry = self.blob.geometry;
        while self.segments.front().is_some_and(|(pieces, _)| pieces.end <= self.next) {
            self.segments.pop_front();
        }
        let step = u32::try_from(SEGMENT / geometry.piece_len()).unwrap_or(1).max(1);
        let edge = geometry.span(self.next).start + self.window;
        self.asked = self.asked.max(self.next);
        if self.asked < geometry.pieces()
            && self.asked - self.next < WHOLE_STEP / 2
            && self.blob.shared.fetcher.takes(&self.blob)
        {
            let pieces = self.asked..geometry.pieces().min(self.asked + WHOLE_STEP);
            self.asked = pieces.end;
            self.segments.push_back((pieces.clone(), self.blob.want(pieces, self.class)));
        }
        while self.asked < geometry.pieces()
            && (self.asked == self.next || geometry.span(self.asked).start < edge)
        {
            let pieces = self.asked..geometry.pieces().min(self.asked + step);
            self.asked = pieces.end;
            self.segments.push_back((pieces.clone(), self.blob.want(pieces, self.class)));
        }
    }
}
