//! TLS connections for the gRPC servers, each with the membership of whoever made it.
//!
//! Owns: the server's certificate, made again before it ends; the bounds on handshakes and
//! connections. Does not own: what a caller may do.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use skimmer_identity::{Trust, tls};
use skimmer_manager::Manager;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::caller::Caller;
use crate::clock::unix_now;

/// From a TCP connection to the end of its handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
const HANDSHAKES: usize = 256;
const CONNECTIONS: usize = 32_768;
/// Who shows no certificate has come to enrol, and needs no longer.
const STRANGER: Duration = Duration::from_secs(60);
/// Of the server's own certificate; made anew at half of it.
const CERTIFICATE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long accepting pauses when the process has no more descriptors.
const PAUSE: Duration = Duration::from_millis(200);

/// The servers' side of TLS.
pub struct ServerTls {
    manager: Arc<Manager>,
    trust: Arc<Trust>,
    /// With the time at which another is made, Unix seconds.
    current: Mutex<Option<(Arc<ServerConfig>, i64)>>,
}

impl ServerTls {
    pub fn new(manager: Arc<Manager>, trust: Arc<Trust>) -> Arc<Self> {
        Arc::new(Self { manager, trust, current: Mutex::default() })
    }

    fn config(&self, now: i64) -> Result<Arc<ServerConfig>, tls::Error> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((config, until)) = &*current
            && now < *until
        {
            return Ok(Arc::clone(config));
        }
        let names = ["skimmer-control".to_owned()];
        let (root, trust) = (self.manager.root(), Arc::clone(&self.trust));
        let config = tls::control_server_of(root, &names, now, CERTIFICATE, trust)?;
        let half = i64::try_from(CERTIFICATE.as_secs() / 2).unwrap_or(0);
        *current = Some((Arc::clone(&config), now.saturating_add(half)));
        Ok(config)
    }
}

/// Connections to `listener` whose handshakes succeeded; ends with the receiver.
pub fn incoming(
    listener: TcpListener,
    tls: Arc<ServerTls>,
) -> ReceiverStream<Result<Connection, io::Error>> {
    let (ready, connections) = mpsc::channel(64);
    tokio::spawn(accept(listener, tls, ready));
    ReceiverStream::new(connections)
}

async fn accept(
    listener: TcpListener,
    tls: Arc<ServerTls>,
    ready: mpsc::Sender<Result<Connection, io::Error>>,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let (Ok(handshake), Ok(place)) = (
            Arc::clone(&handshakes).acquire_owned().await,
            Arc::clone(&connections).acquire_owned().await,
        ) else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ready.closed() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept a connection");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let (tls, ready) = (Arc::clone(&tls), ready.clone());
        tokio::spawn(async move {
            let _handshake = handshake;
            let from = stream.peer_addr().ok();
            match tokio::time::timeout(HANDSHAKE, shake(stream, &tls, place)).await {
                Ok(Ok(connection)) => {
                    // The server is gone if nobody takes it.
                    let _ = ready.send(Ok(connection)).await;
                }
                Ok(Err(error)) => tracing::info!(?from, error = format!("{error:#}"), "handshake"),
                Err(_) => tracing::info!(?from, "handshake took too long"),
            }
        });
    }
}

async fn shake(
    stream: TcpStream,
    tls: &ServerTls,
    place: OwnedSemaphorePermit,
) -> anyhow::Result<Connection> {
    stream.set_nodelay(true)?;
    let local = stream.local_addr()?;
    let config = tls.config(unix_now())?;
    let stream = TlsAcceptor::from(config).accept(stream).await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let member = match certificate {
        Some(certificate) => Some(tls.trust.check(certificate, unix_now())?),
        None => None,
    };
    let ends = member.is_none().then(|| Box::pin(tokio::time::sleep(STRANGER)));
    Ok(Connection { stream, caller: Caller { member, local }, ends, _place: place })
}

/// A connection, and who is on its other end.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    ends: Option<Pin<Box<Sleep>>>,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(ends) = &mut self.ends
            && ends.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
