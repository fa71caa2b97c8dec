//! What moving pieces between two nodes costs, over loopback, as one JSON array of rounds.
//!
//! `transfer cpu|rate|fault [ROUNDS [NAMESPACE ADDRESS]]`. Both nodes are in this process, each with its
//! own runtime of two threads, the sender's in the named network namespace if there is one; the sender
//! reads its blob from a file (in the page cache), the receiver checks every piece's BLAKE3 value and
//! drops it.
//! - `cpu`: processor seconds of the process per GiB, over 2 GiB in pieces of 1 MiB;
//! - `rate`: bytes a second of 2 GiB over one link, beside a bare rustls stream (TLS 1.3,
//!   AES-128-GCM, same certificates) of 2 GiB, both in this round;
//! - `fault`: seconds of a fault request of one piece of 256 KiB on an otherwise idle link, median of 200,
//!   beside one byte over and 256 KiB back on a bare TCP connection, likewise.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use async_trait::async_trait;
use futures::StreamExt as _;
use serde_json::{Value, json};
use skimmer_cache::Class;
use skimmer_identity::{Authority, Credentials, Key, Membership, PeerId, Role, Trust, tls};
use skimmer_proto::piece_table::piece_value;
use skimmer_proto::{Digest, Geometry, Scope};
use skimmer_swarm::transport::wire::{Config, Limits, Wire};
use skimmer_swarm::transport::{
    Arrival, Call, Held, PieceReader, PieceTransport as _, Reason, Refusal, Reply, Request, Serve,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::{TlsAcceptor, TlsConnector};

const BULK: u64 = 2 << 30;
const SMALL: u64 = 64 << 20;
const FAULT: usize = 256 << 10;
const FAULTS: usize = 200;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let what = args.next().context("usage: transfer cpu|rate|fault [ROUNDS]")?;
    let rounds: usize = args.next().map_or(Ok(5), |rounds| rounds.parse())?;
    let place = Place {
        namespace: args.next().map(|name| Path::new("/run/netns").join(name)),
        address: args.next().unwrap_or_else(|| "127.0.0.1".to_owned()),
    };
    let folder = tempfile::tempdir()?;
    let len = if what == "fault" { SMALL } else { BULK };
    let pair = Pair::new(&folder.path().join("blob"), len, place)?;
    // Windows open, caches fill.
    pair.receive(Class::PullThrough)?;
    let rounds: Vec<Value> = (0..rounds)
        .map(|_| match what.as_str() {
            "cpu" => pair.cpu(),
            "rate" => pair.rate(),
            "fault" => pair.fault(),
            other => bail!("{other} isn't measured"),
        })
        .collect::<Result<_>>()?;
    println!("{}", Value::from(rounds));
    Ok(())
}

/// Where the sender is.
struct Place {
    namespace: Option<PathBuf>,
    address: String,
}

/// Two linked nodes, of which one has a blob.
struct Pair {
    // Dropped before their runtimes.
    receiver: Wire,
    _sender: Wire,
    receiving: Runtime,
    sending: Runtime,
    address: String,
    peer: PeerId,
    credentials: [(Arc<Credentials>, Arc<Trust>); 2],
    len: u64,
    values: Arc<Vec<[u8; 32]>>,
}

impl Pair {
    fn new(path: &Path, len: u64, place: Place) -> Result<Self> {
        let (sending, receiving) = (runtime(place.namespace)?, runtime(None)?);
        let authority = Authority::create("bench", now())?;
        let [sender, receiver] = [member(&authority)?, member(&authority)?];
        let peer = sender.0.key().peer();
        let (file, values) = make_blob(path, len)?;
        let shelf = Arc::new(Shelf { file: Arc::new(file), len });
        let (address, here) = (place.address, "127.0.0.1".to_owned());
        // On a thread of the runtime, which is in the namespace.
        let started = sending.spawn(start(sender.clone(), address.clone(), shelf.clone()));
        let from = sending.block_on(started)??;
        let to = receiving.block_on(start(receiver.clone(), here, shelf))?;
        receiving.block_on(to.connect(&peer, &from.addresses()))?;
        let credentials = [sender, receiver];
        let values = Arc::new(values);
        Ok(Self {
            receiver: to,
            _sender: from,
            receiving,
            sending,
            address,
            peer,
            credentials,
            len,
            values,
        })
    }

    fn request(&self, pieces: std::ops::Range<u32>, class: Class) -> Request {
        let (scope, blob) = (Scope::Public, Digest::of(b"blob"));
        Request { scope, blob, len: self.len, pieces: std::iter::once(pieces).collect(), class }
    }

    /// Moves the whole blob in requests of 64 pieces, two under way, and checks every piece.
    fn receive(&self, class: Class) -> Result<Duration> {
        let geometry = Geometry::of(self.len).context("geometry")?;
        let start = Instant::now();
        self.receiving.block_on(async {
            let runs = (0..geometry.pieces()).step_by(64);
            let runs = runs.map(|first| first..(first + 64).min(geometry.pieces()));
            let open = |run| self.receiver.pieces(&self.peer, self.request(run, class));
            let mut requests = futures::stream::iter(runs).map(open).buffered(2);
            let mut received = 0;
            while let Some(incoming) = requests.next().await {
                let mut incoming = incoming?;
                while let Some(arrival) = incoming.next().await {
                    let Arrival::Piece { piece, bytes, .. } = arrival? else { bail!("absent") };
                    let value = piece_value(geometry, piece, &bytes);
                    ensure!(self.values[piece as usize] == value, "piece {piece} is wrong");
                    received += bytes.len() as u64;
                }
            }
            ensure!(received == self.len, "{received} bytes came");
            Ok(())
        })?;
        Ok(start.elapsed())
    }

    fn cpu(&self) -> Result<Value> {
        let before = cpu_seconds()?;
        let elapsed = self.receive(Class::PullThrough)?;
        let gib = self.len as f64 / f64::from(1 << 30);
        let seconds = (cpu_seconds()? - before) / gib;
        Ok(json!({ "cpu_s_per_gib": seconds, "elapsed_s": elapsed.as_secs_f64() }))
    }

    fn rate(&self) -> Result<Value> {
        let before = cpu_seconds()?;
        let bare = self.bare_tls()?;
        let between = cpu_seconds()?;
        let ours = self.receive(Class::PullThrough)?;
        let (ours, bare) = (ours.as_secs_f64(), bare.as_secs_f64());
        let len = self.len as f64;
        Ok(json!({
            "ratio": bare / ours, "bytes_per_s": len / ours, "bare_bytes_per_s": len / bare,
            "bare_cpu_s": between - before, "cpu_s": cpu_seconds()? - between,
        }))
    }

    fn bare_tls(&self) -> Result<Duration> {
        let [(sender, trust), (receiver, trust2)] = &self.credentials;
        let server = tls::swarm_server(Arc::clone(sender), Arc::clone(trust))?;
        let client = tls::swarm_client(Arc::clone(receiver), Arc::clone(trust2))?;
        let bound = self.sending.spawn(TcpListener::bind((self.address.clone(), 0)));
        let listener = self.sending.block_on(bound)??;
        let (address, len) = (listener.local_addr()?, self.len);
        let sent = self.sending.spawn(async move {
            let (socket, _) = listener.accept().await?;
            let mut stream = TlsAcceptor::from(server).accept(socket).await?;
            let block = vec![7; FAULT];
            for _ in 0..len / block.len() as u64 {
                stream.write_all(&block).await?;
            }
            stream.shutdown().await
        });
        let elapsed = self.receiving.block_on(async {
            let socket = TcpStream::connect(address).await?;
            let mut stream = TlsConnector::from(client).connect(tls::any_name(), socket).await?;
            let (mut block, mut received) = (vec![0; FAULT], 0);
            let start = Instant::now();
            while received < len {
                let read = stream.read(&mut block).await?;
                ensure!(read > 0, "the bare stream ended early");
                received += read as u64;
            }
            Ok(start.elapsed())
        })?;
        self.sending.block_on(sent)??;
        Ok(elapsed)
    }

    fn fault(&self) -> Result<Value> {
        let geometry = Geometry::of(self.len).context("geometry")?;
        let ours = self.receiving.block_on(async {
            let mut times = Vec::new();
            for piece in (0..geometry.pieces()).cycle().take(FAULTS) {
                let start = Instant::now();
                let request = self.request(piece..piece + 1, Class::Fault);
                let mut incoming = self.receiver.pieces(&self.peer, request).await?;
                let Some(Arrival::Piece { bytes, .. }) = incoming.next().await.transpose()? else {
                    bail!("nothing came")
                };
                let value = piece_value(geometry, piece, &bytes);
                ensure!(self.values[piece as usize] == value, "piece {piece} is wrong");
                times.push(start.elapsed());
            }
            Ok(median(times))
        })?;
        let bare = self.bare_tcp()?;
        let (ours, bare) = (ours.as_secs_f64(), bare.as_secs_f64());
        Ok(json!({ "ratio": ours / bare, "p50_s": ours, "bare_p50_s": bare }))
    }

    fn bare_tcp(&self) -> Result<Duration> {
        let bound = self.sending.spawn(TcpListener::bind((self.address.clone(), 0)));
        let listener = self.sending.block_on(bound)??;
        let address = listener.local_addr()?;
        self.sending.spawn(async move {
            let (mut socket, _) = listener.accept().await?;
            socket.set_nodelay(true)?;
            let block = vec![7; FAULT];
            while socket.read_u8().await.is_ok() {
                socket.write_all(&block).await?;
            }
            io::Result::Ok(())
        });
        self.receiving.block_on(async {
            let mut socket = TcpStream::connect(address).await?;
            socket.set_nodelay(true)?;
            let (mut block, mut times) = (vec![0; FAULT], Vec::new());
            for _ in 0..FAULTS {
                let start = Instant::now();
                socket.write_u8(1).await?;
                socket.read_exact(&mut block).await?;
                times.push(start.elapsed());
            }
            Ok(median(times))
        })
    }
}

/// Serves one file, whatever is asked for.
struct Shelf {
    file: Arc<File>,
    len: u64,
}

struct Pieces {
    file: Arc<File>,
    geometry: Geometry,
}

impl PieceReader for Pieces {
    fn find(&mut self, _: u32) -> io::Result<Held> {
        Ok(Held::Here(None))
    }

    fn read(&mut self, piece: u32, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, self.geometry.span(piece).start + offset)
    }
}

#[async_trait]
impl Serve for Shelf {
    async fn open(&self, _: &Membership, _: &Request) -> Result<Box<dyn PieceReader>, Refusal> {
        let geometry = Geometry::of(self.len).ok_or_else(|| Refusal::new(Reason::Broken, ""))?;
        Ok(Box::new(Pieces { file: Arc::clone(&self.file), geometry }))
    }

    async fn call(&self, _: &Membership, _: Call) -> Result<Reply, Refusal> {
        Err(Refusal::new(Reason::Invalid, ""))
    }
}

fn runtime(namespace: Option<PathBuf>) -> Result<Runtime> {
    let namespace = namespace.map(File::open).transpose().context("open the namespace")?;
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.on_thread_start(move || {
        // A thread outside measures something else: `start` then fails to listen there.
        if let Some(namespace) = &namespace {
            let _ = nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET);
        }
    });
    Ok(builder.worker_threads(2).enable_all().build()?)
}

async fn start(
    member: (Arc<Credentials>, Arc<Trust>),
    address: String,
    shelf: Arc<Shelf>,
) -> Result<Wire> {
    let listen = vec![format!("/ip4/{address}/tcp/0")];
    let config = Config { listen, upload_bytes_per_second: None, limits: Limits::default() };
    Ok(Wire::start(&config, &member.0, Arc::clone(&member.1), shelf).await?)
}

fn member(authority: &Authority) -> Result<(Arc<Credentials>, Arc<Trust>)> {
    let key = Key::generate()?;
    let membership = Membership {
        peer: key.peer(),
        cluster: "bench".to_owned(),
        zone: String::new(),
        role: Role::Peer,
        not_before: now() - 60,
        not_after: now() + 3600,
    };
    let certificate = authority.issue(&membership)?;
    let trust = Trust::new(Duration::ZERO);
    trust.set_authority("bench", authority.certificate_der())?;
    Ok((Credentials::new(key, &certificate)?, Arc::new(trust)))
}

/// A file of bytes that differ from piece to piece, and the values of its pieces.
fn make_blob(path: &Path, len: u64) -> Result<(File, Vec<[u8; 32]>)> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    let geometry = Geometry::of(len).context("geometry")?;
    let mut values = Vec::new();
    for piece in 0..geometry.pieces() {
        let mut bytes = vec![0; usize::try_from(geometry.piece_len())?];
        let mut seed = blake3::Hasher::new().update(&piece.to_le_bytes()).finalize_xof();
        seed.fill(&mut bytes);
        file.write_all_at(&bytes, geometry.span(piece).start)?;
        values.push(piece_value(geometry, piece, &bytes));
    }
    Ok((file, values))
}

/// User and system time of the process: fields 14 and 15 of proc(5)'s `stat`, in ticks of 10 ms.
fn cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(") ").context("read /proc/self/stat")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let ticks = fields.get(11..13).context("read /proc/self/stat")?;
    let ticks: u64 = ticks.iter().map(|ticks| ticks.parse::<u64>()).sum::<Result<_, _>>()?;
    Ok(ticks as f64 / 100.0)
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}
