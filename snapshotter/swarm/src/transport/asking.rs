//! The asking end of a stream: requests and calls in flight, and the frames that answer them.
//!
//! Invariants:
//! - Nothing is allocated for a frame before its header has been checked against what was asked.
//! - A piece is delivered once, has the right length, and was covered by credit.
//! - When the stream ends, everything in flight fails with the reason.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use skimmer_identity::{PeerId, SignedValue};
use skimmer_proto::{Geometry, PieceSet, TaskId};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::frame::{self, Asked, HEADER, Header, PIECE_PREFIX, Role, What};
use super::pool::Pool;
use super::{Arrival, Call, Error, Flow, Incoming, Reply, Request};

/// Requests and calls under way on a stream.
pub const MAX_FLIGHTS: usize = 256;

/// Bytes that are shaped and sent, or received, at a time, and how long they may take.
pub const TURN: usize = 256 << 10;
pub const TURN_DEADLINE: Duration = Duration::from_secs(60);

/// Bytes of pieces and objects that went over a peer's connections.
#[derive(Default)]
pub struct Counters {
    pub sent: AtomicU64,
    pub received: AtomicU64,
}

impl Counters {
    pub fn add(counter: &AtomicU64, bytes: usize) {
        counter.fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it sent {0}")]
    Frame(#[from] frame::Error),
    #[error("it sent what wasn't asked for")]
    Unasked,
    #[error("it stopped in the middle of a frame")]
    Stalled,
    #[error("it didn't say hello in time")]
    Silent,
    #[error("it asks for too much at once")]
    Greedy,
    #[error("the link was dropped")]
    Dropped,
}

/// Asks on one stream.
pub struct Asker {
    shared: Arc<Shared>,
}

struct Shared {
    peer: PeerId,
    flights: Mutex<Flights>,
    /// Frames to send. Bounded: a request has one frame, one cancellation and few credits.
    frames: mpsc::UnboundedSender<Vec<u8>>,
    counters: Arc<Counters>,
    pool: Arc<Pool>,
}

#[derive(Default)]
struct Flights {
    next: u32,
    closed: Option<Arc<str>>,
    open: HashMap<u32, Flight>,
}

enum Flight {
    Pieces(Wanted),
    Call { call: Call, bytes: Vec<u8>, reply: oneshot::Sender<Result<Reply, Error>> },
}

/// Pieces that a request still waits for.
struct Wanted {
    task: TaskId,
    geometry: Geometry,
    waiting: PieceSet,
    /// Bytes that the other end may still send.
    room: u64,
    arrivals: mpsc::UnboundedSender<Result<Arrival, Error>>,
}

impl Asker {
    /// The asker, and what must be polled for it to work; that ends with the stream.
    pub fn start<S: AsyncRead + AsyncWrite + Unpin>(
        peer: PeerId,
        stream: S,
        role: Role,
        (counters, pool): (Arc<Counters>, Arc<Pool>),
    ) -> (Arc<Self>, impl Future<Output = Arc<str>>) {
        let (frames, queue) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared { peer, flights: Mutex::default(), frames, counters, pool });
        let asker = Arc::new(Self { shared: Arc::clone(&shared) });
        let run = async move {
            let (reader, writer) = stream.split();
            let broken = tokio::select! {
                broken = listen(reader, &shared) => broken,
                broken = write(writer, Asked::Hello(role).encode(), queue) => broken,
            };
            let reason: Arc<str> = broken.to_string().into();
            shared.close(&reason);
            reason
        };
        (asker, run)
    }

    pub fn pieces(&self, request: Request) -> Result<Incoming, Error> {
        let peer = self.shared.peer;
        let (geometry, waiting) = request.check().map_err(|what| Error::Request { peer, what })?;
        let (window, task) = (Request::window(geometry), request.task());
        let (sender, arrivals) = mpsc::unbounded_channel();
        let wanted = Wanted { task, geometry, waiting, room: window, arrivals: sender };
        let id = self.shared.launch(Flight::Pieces(wanted), |id| Asked::Ask { id, request })?;
        let flow = Credit { shared: Arc::clone(&self.shared), id, owed: 0, window };
        Ok(Incoming { arrivals, flow: Box::new(flow) })
    }

    pub async fn call(&self, call: Call) -> Result<Reply, Error> {
        let (reply, replied) = oneshot::channel();
        let flight = Flight::Call { call: call.clone(), bytes: Vec::new(), reply };
        let id = self.shared.launch(flight, |id| Asked::Call { id, call })?;
        let _cancel = Cancel { shared: &self.shared, id };
        let gone = Error::Gone { peer: self.shared.peer, reason: "it was dropped".into() };
        replied.await.unwrap_or(Err(gone))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Flights> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn launch(&self, flight: Flight, asked: impl FnOnce(u32) -> Asked) -> Result<u32, Error> {
        let peer = self.peer;
        let mut flights = self.lock();
        if let Some(reason) = &flights.closed {
            return Err(Error::Gone { peer, reason: Arc::clone(reason) });
        }
        if flights.open.len() >= MAX_FLIGHTS {
            return Err(Error::Crowded { peer });
        }
        let id = flights.next;
        let asked = asked(id);
        if !frame::fits(&asked) {
            return Err(Error::Request { peer, what: "the scope or the grant is too long" });
        }
        // After 2³² requests the ids come round; those then are long over.
        flights.next = id.wrapping_add(1);
        flights.open.insert(id, flight);
        self.send(&asked);
        Ok(id)
    }

    fn send(&self, asked: &Asked) {
        // It fails when the stream has ended, and then nobody waits for an effect.
        let _ = self.frames.send(asked.encode());
    }

    /// Whoever asked has lost interest.
    fn cancel(&self, id: u32) {
        if self.lock().open.remove(&id).is_some() {
            self.send(&Asked::Cancel { id });
        }
    }

    fn close(&self, reason: &Arc<str>) {
        let open = {
            let mut flights = self.lock();
            flights.closed = Some(Arc::clone(reason));
            std::mem::take(&mut flights.open)
        };
        for flight in open.into_values() {
            flight.fail(Error::Gone { peer: self.peer, reason: Arc::clone(reason) });
        }
    }
}

impl Flight {
    fn fail(self, error: Error) {
        // Whoever asked may have gone.
        match self {
            Self::Pieces(wanted) => drop(wanted.arrivals.send(Err(error))),
            Self::Call { reply, .. } => drop(reply.send(Err(error))),
        }
    }
}

struct Cancel<'a> {
    shared: &'a Shared,
    id: u32,
}

impl Drop for Cancel<'_> {
    fn drop(&mut self) {
        self.shared.cancel(self.id);
    }
}

/// Gives the bytes that a reader has taken back to the other end.
struct Credit {
    shared: Arc<Shared>,
    id: u32,
    owed: u64,
    window: u64,
}

impl Flow for Credit {
    fn taken(&mut self, bytes: usize) {
        self.owed += u64::try_from(bytes).unwrap_or(u64::MAX);
        if self.owed < self.window / 4 {
            return;
        }
        if let Some(Flight::Pieces(wanted)) = self.shared.lock().open.get_mut(&self.id) {
            wanted.room += self.owed;
            let bytes = u32::try_from(self.owed).unwrap_or(u32::MAX);
            self.shared.send(&Asked::Credit { id: self.id, bytes });
        }
        self.owed = 0;
    }
}

impl Drop for Credit {
    fn drop(&mut self) {
        self.shared.cancel(self.id);
    }
}

async fn write(
    mut stream: impl AsyncWrite + Unpin,
    hello: Vec<u8>,
    mut frames: mpsc::UnboundedReceiver<Vec<u8>>,
) -> Broken {
    let result = async {
        stream.write_all(&hello).await?;
        stream.flush().await?;
        while let Some(frame) = frames.recv().await {
            stream.write_all(&frame).await?;
            if frames.is_empty() {
                stream.flush().await?;
            }
        }
        Ok(())
    };
    match result.await {
        Ok(()) => Broken::Dropped,
        Err(error) => Broken::Io(error),
    }
}

async fn listen(mut stream: impl AsyncRead + Unpin, shared: &Shared) -> Broken {
    loop {
        let mut header = [0; HEADER];
        if let Err(error) = stream.read_exact(&mut header).await {
            return error.into();
        }
        let header = match Header::decode(&header) {
            Ok(header) => header,
            Err(error) => return error.into(),
        };
        if let Err(broken) = read_payload(&mut stream, shared, header).await {
            return broken;
        }
    }
}

/// Fills `buffer`, part by part, each in time.
pub async fn read(stream: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> Result<(), Broken> {
    for part in buffer.chunks_mut(TURN) {
        let read = timeout(TURN_DEADLINE, stream.read_exact(part)).await;
        read.map_err(|_| Broken::Stalled)??;
    }
    Ok(())
}

async fn read_payload(
    stream: &mut (impl AsyncRead + Unpin),
    shared: &Shared,
    header: Header,
) -> Result<(), Broken> {
    match header.what {
        What::Piece => read_piece(stream, shared, header).await,
        What::Absent | What::End | What::Refused | What::Part => {
            let mut payload = vec![0; header.len];
            read(stream, &mut payload).await?;
            shared.answer(header, &payload)
        }
        _ => Err(frame::Error::Direction.into()),
    }
}

async fn read_piece(
    stream: &mut (impl AsyncRead + Unpin),
    shared: &Shared,
    header: Header,
) -> Result<(), Broken> {
    let mut prefix = [0; PIECE_PREFIX];
    read(stream, &mut prefix).await?;
    let [p0, p1, p2, p3, s @ ..] = prefix;
    let (piece, signed_len) = (u32::from_le_bytes([p0, p1, p2, p3]), u32::from_le_bytes(s));
    let rest = header.len - PIECE_PREFIX;
    let signed_len = usize::try_from(signed_len).map_err(|_| Broken::Unasked)?;
    let len = rest.checked_sub(signed_len).ok_or(Broken::Unasked)?;
    let Some(task) = shared.expect(header.id, piece, len)? else {
        return skip(stream, rest).await;
    };
    let mut signed = vec![0; signed_len];
    read(stream, &mut signed).await?;
    let signed = match signed.as_slice() {
        [] => None,
        bytes => Some(SignedValue::decode(task, piece, bytes).map_err(|_| Broken::Unasked)?),
    };
    let mut bytes = shared.pool.take(len);
    read(stream, &mut bytes).await?;
    let bytes = shared.pool.lend(bytes);
    Counters::add(&shared.counters.received, len);
    shared.deliver(header.id, piece, Arrival::Piece { piece, bytes, signed })
}

/// Reads what nobody waits for any more.
async fn skip(stream: &mut (impl AsyncRead + Unpin), mut len: usize) -> Result<(), Broken> {
    let mut scratch = vec![0; len.min(64 << 10)];
    while len > 0 {
        let part = len.min(scratch.len());
        read(stream, &mut scratch[..part]).await?;
        len -= part;
    }
    Ok(())
}

impl Shared {
    /// Whether a piece of `len` bytes may come for request `id`: its task, or `None` if that was cancelled.
    fn expect(&self, id: u32, piece: u32, len: usize) -> Result<Option<TaskId>, Broken> {
        let mut flights = self.lock();
        let wanted = match flights.open.get_mut(&id) {
            None => return Ok(None),
            Some(Flight::Pieces(wanted)) => wanted,
            Some(Flight::Call { .. }) => return Err(Broken::Unasked),
        };
        let (span, len) = (wanted.geometry.span(piece), u64::try_from(len).unwrap_or(u64::MAX));
        if !wanted.waiting.contains(piece) || span.end - span.start != len || wanted.room < len {
            return Err(Broken::Unasked);
        }
        wanted.room -= len;
        Ok(Some(wanted.task))
    }

    /// Hands over one piece, or the news that there is none; the last one ends the request.
    fn deliver(&self, id: u32, piece: u32, arrival: Arrival) -> Result<(), Broken> {
        let mut flights = self.lock();
        let wanted = match flights.open.get_mut(&id) {
            None => return Ok(()),
            Some(Flight::Pieces(wanted)) => wanted,
            Some(Flight::Call { .. }) => return Err(Broken::Unasked),
        };
        if !wanted.waiting.remove(piece) {
            return Err(Broken::Unasked);
        }
        // Whoever asked may be about to cancel.
        let _ = wanted.arrivals.send(Ok(arrival));
        if wanted.waiting.is_empty() {
            flights.open.remove(&id);
        }
        Ok(())
    }

    fn answer(&self, header: Header, payload: &[u8]) -> Result<(), Broken> {
        let Header { what, id, .. } = header;
        if what == What::Absent {
            let (piece, _) = frame::split_u32(payload).ok_or(Broken::Unasked)?;
            return self.deliver(id, piece, Arrival::Absent(piece));
        }
        let mut flights = self.lock();
        if what == What::Refused {
            let source = frame::decode_refused(payload)?;
            if let Some(flight) = flights.open.remove(&id) {
                flight.fail(Error::Refused { peer: self.peer, source });
            }
            return Ok(());
        }
        let (call, bytes) = match flights.open.get_mut(&id) {
            None => return Ok(()),
            Some(Flight::Call { call, bytes, .. }) => (call, bytes),
            Some(Flight::Pieces(_)) => return Err(Broken::Unasked),
        };
        if what == What::Part {
            if payload.is_empty() || bytes.len() + payload.len() > frame::reply_bound(call) {
                return Err(Broken::Unasked);
            }
            bytes.extend_from_slice(payload);
            Counters::add(&self.counters.received, payload.len());
            return Ok(());
        }
        if let Some(Flight::Call { call, bytes, reply }) = flights.open.remove(&id) {
            drop(flights);
            let answer = frame::decode_reply(&call, bytes);
            let answer = answer.filter(|answer| super::answers(&call, answer));
            // Whoever asked may be about to cancel.
            let _ = reply.send(answer.ok_or(Error::Answer { peer: self.peer }));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
