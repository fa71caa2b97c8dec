//! Performs what the planner decides: opens streams, stores pieces, wakes who waits.
//!
//! Owns: the planner, its clock and timer, the jobs of the runs in flight.
//! Does not own: blobs; it knows those that wait for something, weakly.
//!
//! Invariant: whatever becomes of a run's job, the planner hears of its end once.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout};
use tracing::{debug, info};

use crate::blob::{Blob, Checked};
use crate::metrics::{FromSource, Metrics, Transfer};
use crate::planner::{Action, BlobId, Event, Limits, NeedId, Outcome, Planner, Run, Why};
use crate::source::{Blame, ByteStream, Class, FetchError, Source};
use crate::space::Space;

pub struct Fetcher {
    sources: Vec<Arc<dyn Source>>,
    state: Mutex<State>,
    timer: Arc<Notify>,
    started: Instant,
    runtime: Handle,
    space: Arc<Space>,
    metrics: Metrics,
    /// A stream that brings nothing for so long is given up.
    stall: Duration,
}

#[derive(Debug)]
struct State {
    planner: Planner,
    waiters: HashMap<NeedId, oneshot::Sender<Result<(), Failure>>>,
    blobs: HashMap<BlobId, Known>,
    next_id: u64,
}

#[derive(Debug)]
struct Known {
    blob: Weak<Blob>,
    cause: Option<Cause>,
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
        sources: Vec<Arc<dyn Source>>,
        limits: Limits,
        stall: Duration,
        space: Arc<Space>,
        metrics: Metrics,
    ) -> Arc<Self> {
        let state = State {
            planner: Planner::new(limits),
            waiters: HashMap::new(),
            blobs: HashMap::new(),
            next_id: 0,
        };
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
        let event = Event::Need { need, blob: blob.id, piece_len, pieces, class };
        self.apply(state, event);
        Ticket { need, answer: Some(answer), fetcher: Arc::clone(self) }
    }

    /// A blob is closed.
    pub fn forget(&self, blob: BlobId) {
        self.state().blobs.remove(&blob);
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
                    runs.push((run, blob.unwrap_or_default()));
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
        for (run, blob) in runs {
            let fetcher = Arc::clone(self);
            let ending = Ending { fetcher, run, failure: None, ended: false };
            self.runtime.spawn(async move {
                if let Some(blob) = blob.upgrade() {
                    ending.perform(&blob).await;
                }
            });
        }
    }

    /// Streams a run to disk, piece by piece.
    async fn transfer(self: &Arc<Self>, blob: &Arc<Blob>, run: &Run) -> Result<(), Cause> {
        let source = &self.sources[run.source.0];
        let geometry = blob.geometry();
        let last = run.pieces.end.saturating_sub(1);
        let bytes = geometry.span(run.pieces.start).start..geometry.span(last).end;
        let (pieces, reference) = (blob.pieces(), blob.reference());
        let opened = timeout(self.stall, source.fetch(&reference, bytes, run.class)).await;
        let opened = opened.unwrap_or_else(|_| Err(self.stalled(blob, source.name())));
        let stream = opened.map_err(|error| Cause::Fetch(Arc::new(error)))?;
        let mut input = Input { stream, rest: Bytes::new(), spare: BytesMut::new() };
        for piece in run.pieces.clone() {
            let span = geometry.span(piece);
            let len = usize::try_from(span.end - span.start).unwrap_or(usize::MAX);
            let buffer = self.receive(blob, run, &mut input, len).await?;
            let stored = self.store(blob, &pieces, piece, &buffer).await?;
            input.spare = buffer.try_into_mut().unwrap_or_default();
            match stored {
                Checked::Kept => {
                    self.handle(Event::Arrived { run: run.id, piece });
                    blob.arrived.notify_waiters();
                }
                Checked::Wrong | Checked::Sealed => {
                    let from = FromSource { source: source.name() };
                    self.metrics.wrong_pieces.get_or_create(&from).inc();
                    info!(blob = %blob.digest(), piece, source = source.name(), "wrong piece dropped");
                    let cause = Cause::Wrong { from: source.name() };
                    self.handle_failure(run.blob, cause, Event::Wrong { run: run.id, piece });
                }
            }
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
            blob.count(run.class, input.rest.len());
        }
    }

    /// Checks and writes a piece off the async threads; a full disk gets one eviction and one retry.
    async fn store(
        &self,
        blob: &Arc<Blob>,
        pieces: &Arc<crate::blob::Pieces>,
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

/// Tells the planner of a run's end, even if its job is dropped or panics.
struct Ending {
    fetcher: Arc<Fetcher>,
    run: Run,
    failure: Option<Cause>,
    /// The job came to its end.
    ended: bool,
}

impl Ending {
    async fn perform(mut self, blob: &Arc<Blob>) {
        let source = self.fetcher.sources[self.run.source.0].name();
        let label = Transfer { source, class: self.run.class.name() };
        self.fetcher.metrics.runs.get_or_create(&label).inc();
        let result = self.fetcher.transfer(blob, &self.run).await;
        self.ended = true;
        if let Err(cause) = result {
            self.fetcher.metrics.failed_runs.get_or_create(&label).inc();
            debug!(blob = %blob.digest(), source, ?cause, "fetch failed");
            self.failure = Some(cause);
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let run = self.run.id;
        if let Some(cause) = self.failure.take() {
            let outcome = Outcome::Failed { retryable: cause.is_retryable() };
            self.fetcher.handle_failure(self.run.blob, cause, Event::Ended { run, outcome });
        } else {
            let lost = Outcome::Failed { retryable: true };
            let outcome = if self.ended { Outcome::Done } else { lost };
            self.fetcher.handle(Event::Ended { run, outcome });
        }
    }
}

/// Somebody's wait for pieces; dropping it says that nobody waits any more.
#[derive(Debug)]
pub struct Ticket {
    need: NeedId,
    /// `None` once answered.
    answer: Option<oneshot::Receiver<Result<(), Failure>>>,
    fetcher: Arc<Fetcher>,
}

impl Ticket {
    /// Resolves when every piece has arrived, or one can't be had. To be called until it resolves
    /// once; may be cancelled.
    pub async fn wait(&mut self) -> Result<(), Failure> {
        let Some(answer) = self.answer.as_mut() else { return Ok(()) };
        let result = answer.await;
        self.answer = None;
        // The sender is only dropped with the planner.
        result.unwrap_or(Err(Failure { why: Why::Deadline, cause: None }))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.answer.is_some() {
            self.fetcher.state().waiters.remove(&self.need);
            self.fetcher.handle(Event::Withdrawn { need: self.need });
        }
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
