//! Reads: what is there is answered on the spot, what is missing from the runtime once it has come.

use std::fs::File;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuser::Errno;
use skimmer_cache::Hold;
use skimmer_index::erofs::{FileExtent, Inode, Inodes, Nid};
use tokio::runtime::Handle;

use super::answer::{Answer, Leaving, To};
use super::journal::Entry;
use crate::buffers::Buffers;
use crate::turns::Share;

/// How often what a reader has waited for may go again before it is read.
const ATTEMPTS: usize = 3;

/// The bytes behind a mount: a data file that may have gaps.
pub trait Content: Send + Sync + 'static {
    /// The inodes' encoded form.
    type Bytes: AsRef<[u8]> + Send + Sync + 'static;
    type Error: std::error::Error + Send + Sync + 'static;

    fn inodes(&self) -> &Inodes<Self::Bytes>;

    fn file(&self) -> &File;

    /// Length of the data file.
    fn data_len(&self) -> u64;

    /// Nothing that is there goes while this lives.
    fn hold(&self) -> Hold<'_>;

    /// Somebody reads `range` of the data file. Said before [`Content::has`] is asked.
    fn touch(&self, range: &Range<u64>);

    /// Whether all of `range` of the data file can be read; to be asked under [`Content::hold`].
    fn has(&self, range: &Range<u64>) -> bool;

    /// Completes once [`Content::has`] all of `ranges`; fails only after the deadline, and soon after `until`.
    fn ensure(
        &self,
        ranges: &[Range<u64>],
        until: Instant,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// A read of file `inode` got EIO.
    fn failed(&self, inode: Nid, error: &(dyn std::error::Error + 'static));

    /// The kernel asked for bytes of a file.
    fn asked(&self);

    /// A read had to wait.
    fn waited(&self, time: Duration);
}

/// Answers reads of one layer.
pub struct Reader<C: Content> {
    content: C,
    deadline: Duration,
    buffers: Arc<Buffers>,
    runtime: Handle,
    share: Share,
    leaving: Leaving,
}

impl<C: Content> Reader<C> {
    /// `deadline`: how long a read may wait, for its turn and for bytes. `share`: of the places for reads that wait
    /// for bytes.
    pub fn new(
        content: C,
        deadline: Duration,
        buffers: Arc<Buffers>,
        runtime: Handle,
        share: Share,
        leaving: Leaving,
    ) -> Arc<Self> {
        Arc::new(Self { content, deadline, buffers, runtime, share, leaving })
    }

    pub fn inodes(&self) -> &Inodes<C::Bytes> {
        self.content.inodes()
    }

    pub const fn content(&self) -> &C {
        &self.content
    }

    /// The answer to a read that was asked for.
    pub fn owed(&self, to: To, entry: Option<Entry>) -> Answer {
        Answer::new(to, entry, &self.leaving)
    }

    /// Answers a read of up to `size` bytes of a regular file.
    pub fn read(self: &Arc<Self>, inode: &Inode, offset: u64, size: u32, answer: Answer) {
        let arrived = Instant::now();
        self.content.asked();
        let end = offset.saturating_add(u64::from(size)).min(inode.size);
        if offset >= end {
            return answer.data(&[]);
        }
        let extents = joined(self.inodes().extents(inode.nid, offset..end));
        let request = Read { inode: inode.nid, range: offset..end, extents, arrived };
        let ranges = request.ranges();
        ranges.iter().for_each(|range| self.content.touch(range));
        if let Some(answer) = self.answer(&request, &ranges, answer) {
            let this = Arc::clone(self);
            self.runtime.spawn(async move { this.answer_later(request, ranges, answer).await });
        }
    }

    async fn answer_later(
        self: Arc<Self>,
        request: Read,
        ranges: Vec<Range<u64>>,
        mut answer: Answer,
    ) {
        let (inode, arrived) = (request.inode, request.arrived);
        let until = arrived + self.deadline;
        let wanted = Arc::new((request, ranges));
        let _place = match self.share.take_until(until).await {
            Ok(place) => place,
            Err(error) => {
                self.content.waited(arrived.elapsed());
                // Others may have waited for the same bytes.
                if let Some(unanswered) = self.answer_aside(&wanted, answer).await {
                    self.fail(unanswered, inode, &error);
                }
                return;
            }
        };
        for _ in 0..ATTEMPTS {
            let ensured = self.content.ensure(&wanted.1, until).await;
            self.content.waited(arrived.elapsed());
            if let Err(error) = ensured {
                return self.fail(answer, inode, &error);
            }
            match self.answer_aside(&wanted, answer).await {
                Some(unanswered) => answer = unanswered,
                None => return,
            }
        }
        let error = io::Error::other("what was fetched went again");
        self.fail(answer, inode, &error);
    }

    /// [`Self::answer`] on a thread that may wait for the disk.
    async fn answer_aside(
        self: &Arc<Self>,
        wanted: &Arc<(Read, Vec<Range<u64>>)>,
        answer: Answer,
    ) -> Option<Answer> {
        let (this, wanted) = (Arc::clone(self), Arc::clone(wanted));
        let answered =
            tokio::task::spawn_blocking(move || this.answer(&wanted.0, &wanted.1, answer));
        // Where it was interrupted, the answer was dropped, and so given.
        answered.await.ok().flatten()
    }

    fn fail(&self, answer: Answer, inode: Nid, error: &(dyn std::error::Error + 'static)) {
        if !answer.is_left() {
            self.content.failed(inode, error);
        }
        answer.error(Errno::EIO);
    }

    /// Answers a read, if the bytes of its `ranges` are all there; hands back the answer if not.
    fn answer(&self, request: &Read, ranges: &[Range<u64>], answer: Answer) -> Option<Answer> {
        let Ok(len) = usize::try_from(request.range.end - request.range.start) else {
            answer.error(Errno::EIO);
            return None;
        };
        self.buffers.with(len, |buffer| {
            let gathered = {
                let _hold = self.content.hold();
                if !ranges.iter().all(|range| self.content.has(range)) {
                    return Some(answer);
                }
                request.gather(self.content.file(), buffer)
            };
            match gathered {
                Ok(()) => answer.data(buffer),
                Err(error) => self.fail(answer, request.inode, &error),
            }
            None
        })
    }
}

/// One read: a range of a file and where its bytes are.
struct Read {
    inode: Nid,
    range: Range<u64>,
    extents: Vec<FileExtent>,
    arrived: Instant,
}

impl Read {
    /// The ranges of the data file that it needs.
    fn ranges(&self) -> Vec<Range<u64>> {
        self.extents.iter().filter_map(|e| e.at.map(|at| at..at + e.len)).collect()
    }

    /// Fills `buffer`, which is as long as the range, from `file`; holes are zeros.
    fn gather(&self, file: &File, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        for extent in &self.extents {
            let start = usize_of(extent.logical - self.range.start)?;
            let end = start + usize_of(extent.len)?;
            let outside = || io::Error::other("extents of the file overlap");
            buffer.get_mut(filled..start).ok_or_else(outside)?.fill(0);
            let part = buffer.get_mut(start..end).ok_or_else(outside)?;
            match extent.at {
                Some(at) => file.read_exact_at(part, at)?,
                None => part.fill(0),
            }
            filled = end;
        }
        buffer[filled..].fill(0);
        Ok(())
    }
}

/// Neighbours in the file that are neighbours in the data file too become one.
fn joined(extents: impl Iterator<Item = FileExtent>) -> Vec<FileExtent> {
    let mut out: Vec<FileExtent> = Vec::new();
    for next in extents {
        match out.last_mut() {
            Some(last) if last.at.map(|at| at + last.len) == next.at && next.at.is_some() => {
                last.len += next.len;
            }
            _ => out.push(next),
        }
    }
    out
}

fn usize_of(n: u64) -> io::Result<usize> {
    usize::try_from(n).map_err(io::Error::other)
}
