//! Performs what the planner decides: opens streams, stores pieces, wakes who waits.
//!
//! Owns: the planner, its clock and timer, the jobs of the runs in flight.
//! Does not own: blobs; it knows those that wait for something, weakly.
//!
//! Invariant: whatever becomes of a run's job, the planner hears of its end once.

mod ending;
mod scattered;
mod ticket;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tracing::info;

use crate::blob::{Blob, Checked, Pieces};
use crate::metrics::{FromSource, Metrics, Transfer};
use crate::planner::{Action, BlobId, Event, Limits, NeedId, Planner, Run, RunId, Why};
use crate::source::{
    Blame, ByteStream, Class, FetchError, PieceSource, Source, Sources, Urgent, Via,
};
use crate::space::Space;
use ending::Ending;
pub use ticket::Ticket;

pub struct Fetcher {
    /// In the order of the planner's limits.
    sources: Vec<AnySource>,
    state: Mutex<State>,
    timer: Arc<Notify>,
    started: Instant,
    runtime: Handle,
    space: Arc<Space>,
    metrics: Metrics,
    /// A stream that brings nothing for so long is given up.
    stall: Duration,
}

enum AnySource {
    Ranges(Arc<dyn Source>),
    Pieces(Arc<dyn PieceSource>),
}

#[derive(Debug)]
struct State {
    planner: Planner,
    waiters: HashMap<NeedId, oneshot::Sender<Result<(), Failure>>>,
    blobs: HashMap<BlobId, Known>,
    lines: HashMap<RunId, Line>,
    next_id: u64,
}

#[derive(Debug)]
struct Known {
    blob: Weak<Blob>,
    cause: Option<Cause>,
}

/// The way to a run of pieces in flight.
#[derive(Debug)]
struct Line {
    urgent: mpsc::UnboundedSender<Urgent>,
    stop: Arc<Notify>,
}

/// Why a need wasn't met, and the last thing that went wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    pub why: Why,
    pub cause: Option<Cause>,
}

/// What ended a run, or spoiled a piece.
#[derive(Clone, Debug)]
pub enum Cause {
    Fetch(Arc<FetchError>),
    Wrong { from: &'static str },
    Write { piece: u32, source: Arc<io::Error> },
}

impl Cause {
    fn is_retryable(&self) -> bool {
        match self {
            Self::Fetch(error) => error.retryable,
            Self::Wrong { .. } => true,
            Self::Write { .. } => false,
        }
    }
}

impl Fetcher {
    /// Must be called within a tokio runtime, which will run the transfers.
    pub fn new(
        sources: Sources,
        limits: Limits,
        stall: Duration,
        space: Arc<Space>,
        metrics: Metrics,
    ) -> Arc<Self> {
        let state = State {
            planner: Planner::new(limits),
            waiters: HashMap::new(),
            blobs: HashMap::new(),
            lines: HashMap::new(),
            next_id: 0,
        };
        let pieces = sources.pieces.map(AnySource::Pieces);
        let sources = pieces.into_iter().chain([AnySource::Ranges(sources.ranges)]).collect();
        let timer = Arc::new(Notify::new());
        let fetcher = Arc::new(Self {
            sources,
            state: Mutex::new(state),
            timer: Arc::clone(&timer),
            started: Instant::now(),
            runtime: Handle::current(),
            space,
            metrics,
            stall,
        });
        fetcher.runtime.spawn(tick(Arc::downgrade(&fetcher), timer));
        fetcher
    }

    pub fn blob_id(&self) -> BlobId {
        BlobId(self.state().id())
    }

    /// Asks for the pieces that `absent` names. It is called under the planner's lock, so that a
    /// piece that arrives meanwhile is either not named or reported.
    pub fn want(
        self: &Arc<Self>,
        blob: &Arc<Blob>,
        class: Class,
        absent: impl FnOnce() -> Vec<u32>,
    ) -> Ticket {
        let (reply, answer) = oneshot::channel();
        let mut state = self.state();
        let need = NeedId(state.id());
        state.waiters.insert(need, reply);
        let known = Known { blob: Arc::downgrade(blob), cause: None };
        state.blobs.entry(blob.id).or_insert(known);
        let (pieces, piece_len) = (absent(), blob.geometry().piece_len());
        let taken = self.takes(blob);
        let event = Event::Need { need, blob: blob.id, piece_len, pieces, class, taken };
        self.apply(state, event);
        Ticket { need, answer: Some(answer), fetcher: Arc::clone(self) }
    }

    /// A blob is closed.
    pub fn forget(&self, blob: BlobId) {
        self.state().blobs.remove(&blob);
    }

    /// The source of pieces, if there is one.
    pub fn piece_source(&self) -> Option<&Arc<dyn PieceSource>> {
        self.sources.iter().find_map(|source| match source {
            AnySource::Pieces(source) => Some(source),
            AnySource::Ranges(_) => None,
        })
    }

    /// Whether the source of pieces would take the whole of `blob` at once.
    pub fn takes(&self, blob: &Blob) -> bool {
        self.piece_source().is_some_and(|source| source.takes(&blob.reference()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn handle(self: &Arc<Self>, event: Event) {
        self.apply(self.state(), event);
    }

    /// In one step, so that a need that fails by the event fails with this cause.
    fn handle_failure(self: &Arc<Self>, blob: BlobId, cause: Cause, event: Event) {
        let mut state = self.state();
        if let Some(known) = state.blobs.get_mut(&blob) {
            known.cause = Some(cause);
        }
        self.apply(state, event);
    }

    /// Decides under the lock, acts outside.
    fn apply(self: &Arc<Self>, mut state: MutexGuard<'_, State>, event: Event) {
        let (mut runs, mut answers) = (Vec::new(), Vec::new());
        for action in state.planner.apply(self.now(), event) {
            match action {
                Action::Fetch(run) => {
                    let blob = state.blobs.get(&run.blob).map(|known| known.blob.clone());
                    let scattered = matches!(self.sources[run.source.0], AnySource::Pieces(_));
                    let line = scattered.then(|| state.open_line(run.id));
                    runs.push((run, blob.unwrap_or_default(), line));
                }
                Action::Urge { run, pieces, class } => {
                    // A run that is ending anyway needn't hear of it.
                    let line = state.lines.get(&run);
                    _ = line.map(|line| line.urgent.send(Urgent { pieces, class }));
                }
                Action::Stop { run } => {
                    _ = state.lines.get(&run).map(|line| line.stop.notify_one());
                }
                Action::Satisfied { need } => answers.push((state.waiters.remove(&need), Ok(()))),
                Action::Failed { need, blob, why } => {
                    let cause = state.blobs.get(&blob).and_then(|known| known.cause.clone());
                    answers.push((state.waiters.remove(&need), Err(Failure { why, cause })));
                }
            }
        }
        drop(state);
        self.timer.notify_one();
        for (waiter, answer) in answers {
            // A waiter that is gone needs no answer.
            _ = waiter.map(|waiter| waiter.send(answer));
        }
        for (run, blob, line) in runs {
            let fetcher = Arc::clone(self);
            let ending = Ending { fetcher, run, failure: None, ended: false, line };
            self.runtime.spawn(async move {
                if let Some(blob) = blob.upgrade() {
                    ending.perform(&blob).await;
                }
            });
        }
    }

    /// Streams a run to disk, piece by piece.
    async fn transfer(
        self: &Arc<Self>,
        blob: &Arc<Blob>,
        run: &Run,
        source: &Arc<dyn Source>,
    ) -> Result<(), Cause> {
        let geometry = blob.geometry();
        let range = run.range();
        let last = range.end.saturating_sub(1);
        let bytes = geometry.span(range.start).start..geometry.span(last).end;
        let (pieces, reference) = (blob.pieces(), blob.reference());
        let opened = timeout(self.stall, source.fetch(&reference, bytes, run.class)).await;
        let opened = opened.unwrap_or_else(|_| Err(self.stalled(blob, source.name())));
        let stream = opened.map_err(|error| Cause::Fetch(Arc::new(error)))?;
        let mut input = Input { stream, rest: Bytes::new(), spare: BytesMut::new() };
        for piece in range {
            let span = geometry.span(piece);
            let len = usize::try_from(span.end - span.start).unwrap_or(usize::MAX);
            let buffer = self.receive(blob, run, &mut input, len).await?;
            self.keep(blob, &pieces, run, piece, &buffer).await?;
            input.spare = buffer.try_into_mut().unwrap_or_default();
        }
        Ok(())
    }

    /// Stores a piece, or drops it if it is wrong, and tells who has to know.
    async fn keep(
        self: &Arc<Self>,
        blob: &Arc<Blob>,
        pieces: &Arc<Pieces>,
        run: &Run,
        piece: u32,
        buffer: &Bytes,
    ) -> Result<(), Cause> {
        if self.store(blob, pieces, piece, buffer).await? == Checked::Kept {
            self.handle(Event::Arrived { run: run.id, piece });
            blob.arrived.notify_waiters();
            if let Some(source) = self.piece_source() {
                source.arrived(blob, piece);
            }
        } else {
            let from = &self.sources[run.source.0];
            let source = from.name();
            self.metrics.wrong_pieces.get_or_create(&FromSource { source }).inc();
            info!(blob = %blob.digest(), piece, source, "wrong piece dropped");
            if let AnySource::Pieces(from) = from {
                // Before it may be asked for the piece once more.
                from.wrong(&blob.reference(), piece);
            }
            let cause = Cause::Wrong { from: source };
            self.handle_failure(run.blob, cause, Event::Wrong { run: run.id, piece });
        }
        Ok(())
    }

    /// Exactly `len` bytes of the stream.
    async fn receive(
        &self,
        blob: &Blob,
        run: &Run,
        input: &mut Input,
        len: usize,
    ) -> Result<Bytes, Cause> {
        let name = self.sources[run.source.0].name();
        let label = Transfer { source: name, class: run.class.name() };
        let fetched = self.metrics.fetched.get_or_create_owned(&label);
        let mut buffer = std::mem::take(&mut input.spare);
        buffer.clear();
        buffer.reserve(len);
        loop {
            let take = input.rest.len().min(len - buffer.len());
            buffer.extend_from_slice(&input.rest.split_to(take));
            if buffer.len() == len {
                return Ok(buffer.freeze());
            }
            let next = timeout(self.stall, input.stream.next()).await;
            input.rest = match next.unwrap_or_else(|_| Some(Err(self.stalled(blob, name)))) {
                Some(Ok(bytes)) => bytes,
                Some(Err(error)) => return Err(Cause::Fetch(Arc::new(error))),
                None => {
                    let problem = format!("the answer ended {} bytes early", len - buffer.len());
                    return Err(Cause::Fetch(Arc::new(unanswered(blob, name, problem))));
                }
            };
            fetched.inc_by(input.rest.len() as u64);
            blob.count(run.class, Via::Origin, input.rest.len());
        }
    }

    /// Checks and writes a piece off the async threads; a full disk gets one eviction and one retry.
    async fn store(
        &self,
        blob: &Arc<Blob>,
        pieces: &Arc<Pieces>,
        piece: u32,
        buffer: &Bytes,
    ) -> Result<Checked, Cause> {
        let mut retried = false;
        let len = blob.geometry().piece_len();
        loop {
            let (pieces, table, bytes) = (Arc::clone(pieces), blob.table(), buffer.clone());
            let job = move || pieces.store(piece, &bytes, table.as_deref());
            let stored = tokio::task::spawn_blocking(job).await.map_err(io::Error::other);
            match stored.and_then(|stored| stored) {
                Ok(checked) => {
                    self.space.charge(len);
                    return Ok(checked);
                }
                Err(error) if error.kind() == io::ErrorKind::StorageFull && !retried => {
                    retried = true;
                    self.space.make_room().await;
                }
                Err(error) => return Err(Cause::Write { piece, source: Arc::new(error) }),
            }
        }
    }

    /// A run is about to end: its pieces may be fetched elsewhere from now on.
    fn ending(self: &Arc<Self>, run: &Run) {
        let known = {
            let mut state = self.state();
            state.lines.remove(&run.id);
            state.blobs.get(&run.blob).and_then(|known| known.blob.upgrade())
        };
        if let Some(blob) = known.filter(|_| self.piece_source().is_some()) {
            self.handle(Event::Taken { blob: run.blob, taken: self.takes(&blob) });
        }
    }

    fn stalled(&self, blob: &Blob, from: &str) -> FetchError {
        unanswered(blob, from, format!("no bytes came for {} s", self.stall.as_secs()))
    }
}

impl fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetcher").field("stall", &self.stall).finish_non_exhaustive()
    }
}

impl State {
    const fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn open_line(&mut self, run: RunId) -> scattered::End {
        let (urgent, receiver) = mpsc::unbounded_channel();
        let stop = Arc::new(Notify::new());
        self.lines.insert(run, Line { urgent, stop: Arc::clone(&stop) });
        scattered::End { urgent: receiver, stop }
    }
}

impl AnySource {
    fn name(&self) -> &'static str {
        match self {
            Self::Ranges(source) => source.name(),
            Self::Pieces(source) => source.name(),
        }
    }
}

/// A stream, what it brought beyond the last piece, and the memory that piece was in.
struct Input {
    stream: ByteStream,
    rest: Bytes,
    spare: BytesMut,
}

fn unanswered(blob: &Blob, from: &str, problem: String) -> FetchError {
    FetchError {
        digest: blob.digest(),
        from: from.to_owned(),
        blame: Blame::Registry,
        retryable: true,
        source: problem.into(),
    }
}

/// The planner's alarm clock.
async fn tick(fetcher: Weak<Fetcher>, timer: Arc<Notify>) {
    loop {
        let Some(strong) = fetcher.upgrade() else { return };
        let now = strong.now();
        let due = strong.state().planner.next_wake(now);
        drop(strong);
        let wait = due.map_or(Duration::from_secs(3600), |due| due.saturating_sub(now));
        if timeout(wait, timer.notified()).await.is_err()
            && let Some(fetcher) = fetcher.upgrade()
        {
            fetcher.handle(Event::Tick);
        }
    }
}
