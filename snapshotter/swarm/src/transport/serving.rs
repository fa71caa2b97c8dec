//! The serving end of a stream: reads what is asked, sends pieces slice by slice from disk.
//!
//! Owns: the requests of one stream and their credit. A stream holds at most two slices in memory,
//! whatever is asked of it.
//! Order: replies to calls, then the most urgent class, requests of a class by turns, piece by piece.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use skimmer_cache::Class;
use skimmer_identity::Membership;
use skimmer_proto::Geometry;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Notify;
use tokio::task::{JoinSet, block_in_place, spawn_blocking};
use tokio::time::timeout;

use super::asking::{self, Broken, Counters, MAX_FLIGHTS, TURN, TURN_DEADLINE};
use super::frame::{self, Asked, HEADER, Header, MAX_PART, PIECE_PREFIX, Role, What};
use super::upload::Upload;
use super::{Call, Held, PieceReader, Reason, Refusal, Request, Serve};

/// Bytes that are read from disk at a time: smaller slices change threads more often.
const SLICE: usize = 1 << 20;

/// How long a new stream may take to say what it is for.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// Calls of a stream being answered, and bytes of their answers that wait to be sent.
const MAX_CALLS: usize = 32;

/// What serving needs to know about the node and about who asks.
pub struct Desk {
    pub serve: Arc<dyn Serve>,
    pub upload: Arc<Upload>,
    pub from: Membership,
    pub counters: Arc<Counters>,
}

/// Serves one stream until it ends. `hello` is told what the connection is for.
pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    desk: Desk,
    hello: impl FnOnce(Role),
) -> Broken {
    let (mut reader, writer) = stream.split();
    let first = timeout(HELLO_DEADLINE, read_frame(&mut reader)).await;
    match first {
        Ok(Ok(Asked::Hello(role))) => hello(role),
        Ok(Ok(_)) => return frame::Error::Hello.into(),
        Ok(Err(broken)) => return broken,
        Err(_) => return Broken::Silent,
    }
    let desk = Arc::new(Table { desk, state: Mutex::default(), changed: Notify::new() });
    tokio::select! {
        broken = desk.read(reader) => broken,
        broken = desk.write(writer) => broken,
    }
}

struct Table {
    desk: Desk,
    state: Mutex<State>,
    /// Something may be sent that couldn't before.
    changed: Notify,
}

#[derive(Default)]
struct State {
    jobs: BTreeMap<u32, Job>,
    /// Which request had the last turn.
    last: u32,
    /// Calls being answered.
    calls: BTreeMap<u32, tokio::task::AbortHandle>,
    /// Answers to be sent: id, bytes, how many have been.
    replies: VecDeque<(u32, Vec<u8>, usize)>,
    /// Small frames to be sent.
    frames: VecDeque<Vec<u8>>,
}

/// A request.
struct Job {
    class: Class,
    geometry: Geometry,
    credit: u64,
    runs: VecDeque<Range<u32>>,
    /// `None`: being opened, or in use.
    reader: Option<Box<dyn PieceReader>>,
}

/// A piece to send.
struct Turn {
    id: u32,
    class: Class,
    piece: u32,
    len: usize,
    reader: Box<dyn PieceReader>,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(self: &Arc<Self>, mut stream: impl AsyncRead + Unpin) -> Broken {
        // What is being opened and answered; dropped with the stream.
        let mut opening = JoinSet::new();
        loop {
            let asked = match read_frame(&mut stream).await {
                Ok(asked) => asked,
                Err(broken) => return broken,
            };
            while opening.try_join_next().is_some() {}
            match asked {
                Asked::Hello(_) => return frame::Error::Hello.into(),
                Asked::Ask { id, request } => {
                    if let Err(broken) = self.take(id, request, &mut opening).await {
                        return broken;
                    }
                }
                Asked::Call { id, call } => {
                    if let Err(broken) = self.answer(id, call, &mut opening) {
                        return broken;
                    }
                }
                Asked::Credit { id, bytes } => {
                    if let Some(job) = self.lock().jobs.get_mut(&id) {
                        job.credit = job.credit.saturating_add(bytes.into());
                    }
                }
                Asked::Cancel { id } => {
                    let mut state = self.lock();
                    state.jobs.remove(&id);
                    state.replies.retain(|reply| reply.0 != id);
                    if let Some(call) = state.calls.remove(&id) {
                        call.abort();
                    }
                }
            }
            self.changed.notify_one();
        }
    }

    async fn take(
        self: &Arc<Self>,
        id: u32,
        request: Request,
        opening: &mut JoinSet<()>,
    ) -> Result<(), Broken> {
        let (geometry, _) = request.check().map_err(|_| Broken::Greedy)?;
        let job = Job {
            class: request.class,
            geometry,
            credit: Request::window(geometry),
            runs: request.pieces.iter().cloned().collect(),
            reader: None,
        };
        {
            let mut state = self.lock();
            // The other end counts too; who goes over it isn't one of ours.
            if state.jobs.len() >= MAX_FLIGHTS || opening.len() >= 2 * MAX_FLIGHTS {
                return Err(Broken::Greedy);
            }
            if state.jobs.insert(id, job).is_some() {
                return Err(Broken::Unasked);
            }
        }
        let table = Arc::clone(self);
        let mut open = Box::pin(async move {
            let opened = table.desk.serve.open(&table.desk.from, &request).await;
            table.lock().opened(id, opened);
            table.changed.notify_one();
        });
        // Mostly it is known at once, and a reader waits.
        if futures::poll!(&mut open).is_pending() {
            opening.spawn(open);
        }
        Ok(())
    }

    fn answer(
        self: &Arc<Self>,
        id: u32,
        call: Call,
        opening: &mut JoinSet<()>,
    ) -> Result<(), Broken> {
        let mut state = self.lock();
        if state.calls.len() + state.replies.len() >= MAX_CALLS {
            state.frames.push_back(frame::refused(id, &Refusal::new(Reason::Busy, "")));
            // Whoever doesn't read these either is cut off.
            return if state.frames.len() > MAX_FLIGHTS { Err(Broken::Greedy) } else { Ok(()) };
        }
        let table = Arc::clone(self);
        let handle = opening.spawn(async move {
            let reply = table.desk.serve.call(&table.desk.from, call).await;
            let mut state = table.lock();
            if state.calls.remove(&id).is_some() {
                match reply {
                    Ok(reply) => state.replies.push_back((id, frame::encode_reply(&reply), 0)),
                    Err(refusal) => state.frames.push_back(frame::refused(id, &refusal)),
                }
            }
            table.changed.notify_one();
        });
        state.calls.insert(id, handle);
        Ok(())
    }

    async fn write(self: &Arc<Self>, mut stream: impl AsyncWrite + Unpin) -> Broken {
        let mut slices = Slices::default();
        loop {
            match self.write_next(&mut stream, &mut slices).await {
                Ok(true) => {}
                Ok(false) => {
                    // An idle stream keeps nothing.
                    slices = Slices::default();
                    self.changed.notified().await;
                }
                Err(broken) => return broken,
            }
        }
    }

    /// Writes what is due, up to one piece. Whether there was any.
    async fn write_next(
        &self,
        stream: &mut (impl AsyncWrite + Unpin),
        slices: &mut Slices,
    ) -> Result<bool, Broken> {
        while let Some(frame) = self.next_frame() {
            write(stream, &frame).await?;
        }
        if let Some(turn) = self.next_turn() {
            self.send_piece(stream, turn, slices).await?;
            return Ok(true);
        }
        timeout(TURN_DEADLINE, stream.flush()).await.map_err(|_| Broken::Stalled)??;
        Ok(false)
    }

    fn next_frame(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        if let Some(frame) = state.frames.pop_front() {
            return Some(frame);
        }
        let (id, bytes, sent) = state.replies.front_mut()?;
        let part = bytes.get(*sent..).unwrap_or_default();
        let part = &part[..part.len().min(MAX_PART)];
        let (what, len) = if part.is_empty() { (What::End, 0) } else { (What::Part, part.len()) };
        let frame = frame::frame(what, *id, part);
        *sent += len;
        if what == What::End {
            state.replies.pop_front();
        }
        drop(state);
        Counters::add(&self.desk.counters.sent, len);
        Some(frame)
    }

    fn next_turn(&self) -> Option<Turn> {
        let mut state = self.lock();
        let last = state.last;
        let ready = state.jobs.iter().filter(|(_, job)| job.reader.is_some());
        let ready = ready.filter_map(|(id, job)| Some((*id, job.class, job.next()?)));
        let (id, class, (piece, len)) =
            ready.min_by_key(|(id, class, _)| (*class, *id <= last, *id))?;
        state.last = id;
        let job = state.jobs.get_mut(&id)?;
        let len_u64 = u64::try_from(len).unwrap_or(u64::MAX);
        let reader = job.reader.take()?;
        job.credit -= len_u64;
        if let Some(run) = job.runs.front_mut() {
            run.start += 1;
            if run.start >= run.end {
                job.runs.pop_front();
            }
        }
        Some(Turn { id, class, piece, len, reader })
    }

    async fn send_piece(
        &self,
        stream: &mut (impl AsyncWrite + Unpin),
        turn: Turn,
        slices: &mut Slices,
    ) -> Result<(), Broken> {
        let Turn { id, class, piece, len, reader } = turn;
        let front = std::mem::take(&mut slices.front);
        let (reader, found) = find(reader, (class, piece), front, len).await?;
        let (held, first) = match found {
            Ok(found) => found,
            Err(error) => {
                self.lock().refuse(id, &Refusal::new(Reason::Broken, error.to_string()));
                return Ok(());
            }
        };
        let reader = match held {
            Held::Absent => {
                slices.front = first;
                // Nothing was sent, so the credit is the request's again.
                if let Some(job) = self.lock().jobs.get_mut(&id) {
                    job.credit += u64::try_from(len).unwrap_or(0);
                }
                write(stream, &frame::frame(What::Absent, id, &piece.to_le_bytes())).await?;
                reader
            }
            Held::Here(signed) => {
                let signed = signed.map(|signed| signed.encode()).unwrap_or_default();
                let head = piece_head(id, piece, &signed, len);
                write(stream, &head).await?;
                self.send_slices(stream, class, (reader, piece, len), first, slices).await?
            }
        };
        self.lock().put_back(id, reader);
        Ok(())
    }

    /// Sends a piece of which the first slice has been read.
    async fn send_slices(
        &self,
        stream: &mut (impl AsyncWrite + Unpin),
        class: Class,
        (mut reader, piece, len): (Box<dyn PieceReader>, u32, usize),
        mut slice: Vec<u8>,
        slices: &mut Slices,
    ) -> Result<Box<dyn PieceReader>, Broken> {
        let mut at = slice.len();
        loop {
            if at == len {
                self.send_slice(stream, class, &slice).await?;
                slices.front = slice;
                return Ok(reader);
            }
            let next = read_slice(reader, piece, at, std::mem::take(&mut slices.back), len);
            // The next slice is read while this one is on its way.
            let (read, written) = tokio::join!(next, self.send_slice(stream, class, &slice));
            written?;
            slices.back = std::mem::take(&mut slice);
            // In the middle of a piece there is no way to say that the disk failed.
            (reader, slice) = read?;
            at += slice.len();
        }
    }

    async fn send_slice(
        &self,
        stream: &mut (impl AsyncWrite + Unpin),
        class: Class,
        slice: &[u8],
    ) -> Result<(), Broken> {
        for part in slice.chunks(TURN) {
            self.desk.upload.turn(self.desk.from.peer, class, part.len()).await;
            write(stream, part).await?;
            Counters::add(&self.desk.counters.sent, part.len());
        }
        Ok(())
    }
}

impl State {
    fn opened(&mut self, id: u32, opened: Result<Box<dyn PieceReader>, Refusal>) {
        match opened {
            Ok(reader) => {
                if let Some(job) = self.jobs.get_mut(&id) {
                    job.reader = Some(reader);
                }
            }
            Err(refusal) => self.refuse(id, &refusal),
        }
    }

    fn refuse(&mut self, id: u32, refusal: &Refusal) {
        if self.jobs.remove(&id).is_some() {
            self.frames.push_back(frame::refused(id, refusal));
        }
    }

    fn put_back(&mut self, id: u32, reader: Box<dyn PieceReader>) {
        if let Some(job) = self.jobs.get_mut(&id) {
            if job.runs.is_empty() {
                self.jobs.remove(&id);
            } else {
                job.reader = Some(reader);
            }
        }
    }
}

impl Job {
    /// The next piece and its length, if there is credit for it.
    fn next(&self) -> Option<(u32, usize)> {
        let piece = self.runs.front()?.start;
        let span = self.geometry.span(piece);
        let len = span.end - span.start;
        (len <= self.credit).then_some((piece, usize::try_from(len).ok()?))
    }
}

/// The two buffers of a stream.
#[derive(Default)]
struct Slices {
    front: Vec<u8>,
    back: Vec<u8>,
}

type Found = (Box<dyn PieceReader>, std::io::Result<(Held, Vec<u8>)>);

/// Looks for a piece and reads its first slice.
async fn find(
    mut reader: Box<dyn PieceReader>,
    (class, piece): (Class, u32),
    mut slice: Vec<u8>,
    len: usize,
) -> Result<Found, Broken> {
    let read = move || {
        slice.resize(len.min(SLICE), 0);
        let read = reader.find(piece).and_then(|held| {
            if matches!(held, Held::Here(_)) {
                reader.read(piece, 0, &mut slice)?;
            }
            Ok((held, slice))
        });
        (reader, read)
    };
    // Two changes of threads are a good part of what a fault takes.
    if class == Class::Fault && Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread {
        return Ok(block_in_place(read));
    }
    spawn_blocking(read).await.map_err(|_| Broken::Dropped)
}

async fn read_slice(
    mut reader: Box<dyn PieceReader>,
    piece: u32,
    at: usize,
    mut slice: Vec<u8>,
    len: usize,
) -> Result<(Box<dyn PieceReader>, Vec<u8>), Broken> {
    let read = spawn_blocking(move || {
        slice.resize((len - at).min(SLICE), 0);
        let offset = u64::try_from(at).map_err(std::io::Error::other)?;
        reader.read(piece, offset, &mut slice)?;
        Ok::<_, std::io::Error>((reader, slice))
    });
    Ok(read.await.map_err(|_| Broken::Dropped)??)
}

async fn write(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), Broken> {
    timeout(TURN_DEADLINE, stream.write_all(bytes)).await.map_err(|_| Broken::Stalled)??;
    Ok(())
}

/// A piece frame up to the bytes of the piece.
fn piece_head(id: u32, piece: u32, signed: &[u8], len: usize) -> Vec<u8> {
    let header = Header { what: What::Piece, id, len: PIECE_PREFIX + signed.len() + len };
    // A statement is a few hundred bytes.
    let signed_len = u32::try_from(signed.len()).unwrap_or(u32::MAX);
    [&header.encode()[..], &piece.to_le_bytes(), &signed_len.to_le_bytes(), signed].concat()
}

async fn read_frame(stream: &mut (impl AsyncRead + Unpin)) -> Result<Asked, Broken> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).await?;
    let header = Header::decode(&header)?;
    if matches!(header.what, What::Piece | What::Part) {
        return Err(frame::Error::Direction.into());
    }
    let mut payload = vec![0; header.len];
    asking::read(stream, &mut payload).await?;
    Ok(Asked::decode(header, &payload)?)
}

#[cfg(test)]
mod tests;
