//! A server whose every answer is scripted down to the bytes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// With the query.
    pub path: String,
    /// Lower-case names.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The asked range, half open.
    pub fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse::<usize>().ok()? + 1))
    }
}

/// What the server does after a request.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub then: Then,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    KeepAlive,
    Close,
    /// Leave the connection open and say nothing more.
    Stall,
    /// The body over and over again.
    Endless,
}

impl Answer {
    /// With a Content-Length.
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        let len = body.len().to_string();
        Self::raw(status, body, Then::KeepAlive).with("content-length", &len)
    }

    /// Without any header.
    pub fn raw(status: u16, body: impl Into<Vec<u8>>, then: Then) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), then }
    }

    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Cuts the body, and then does something else than announced.
    pub fn cut(mut self, len: usize, then: Then) -> Self {
        self.body.truncate(len);
        self.then = then;
        self
    }

    pub fn redirect(to: &str) -> Self {
        Self::new(307, "").with("location", to)
    }

    /// What a good registry answers to a request for `blob`.
    pub fn blob(request: &Request, blob: &[u8]) -> Self {
        match request.range() {
            None => Self::new(200, blob),
            Some((start, end)) => {
                let range = format!("bytes {start}-{}/{}", end - 1, blob.len());
                Self::new(206, &blob[start..end]).with("content-range", &range)
            }
        }
    }
}

type Handler = dyn Fn(&Request, usize) -> Answer + Send + Sync;

pub struct Server {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Request>>>,
    connections: Arc<Mutex<usize>>,
    job: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.job.abort();
    }
}

impl Server {
    /// Serves plain HTTP. The handler is given the request and its number, from 0.
    pub async fn new(handler: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) -> Self {
        Self::start(None, Arc::new(handler)).await
    }

    /// Serves HTTPS.
    pub async fn tls(
        config: rustls::ServerConfig,
        handler: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        Self::start(Some(acceptor), Arc::new(handler)).await
    }

    async fn start(acceptor: Option<tokio_rustls::TlsAcceptor>, handler: Arc<Handler>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<Request>>> = Arc::default();
        let connections: Arc<Mutex<usize>> = Arc::default();
        let (log, count) = (Arc::clone(&seen), Arc::clone(&connections));
        let job = tokio::spawn(async move {
            let mut jobs = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                *count.lock().unwrap() += 1;
                let (handler, log) = (Arc::clone(&handler), Arc::clone(&log));
                let acceptor = acceptor.clone();
                jobs.spawn(async move {
                    match acceptor {
                        None => serve(socket, &*handler, &log).await,
                        Some(acceptor) => match acceptor.accept(socket).await {
                            Ok(socket) => serve(socket, &*handler, &log).await,
                            Err(_) => None,
                        },
                    }
                });
            }
        });
        Self { address, seen, connections, job }
    }

    /// As in an image reference.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    pub fn requests(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    pub fn connections(&self) -> usize {
        *self.connections.lock().unwrap()
    }
}

/// Serves one connection until either side has enough.
async fn serve(
    socket: impl AsyncRead + AsyncWrite + Unpin,
    handler: &Handler,
    log: &Mutex<Vec<Request>>,
) -> Option<()> {
    let mut socket = BufReader::new(socket);
    loop {
        if socket.fill_buf().await.ok()?.first() == Some(&0x16) {
            // TLS, where plain HTTP is spoken: what Go's server says to that.
            socket.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n").await.ok()?;
            return None;
        }
        let request = read(&mut socket).await?;
        let number = {
            let mut log = log.lock().unwrap();
            log.push(request.clone());
            log.len() - 1
        };
        let answer = handler(&request, number);
        let mut head = format!("HTTP/1.1 {} Scripted\r\n", answer.status);
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        socket.write_all(head.as_bytes()).await.ok()?;
        socket.write_all(&answer.body).await.ok()?;
        socket.flush().await.ok()?;
        match answer.then {
            Then::KeepAlive => {}
            Then::Close => return None,
            Then::Stall => tokio::time::sleep(Duration::from_secs(600)).await,
            Then::Endless => loop {
                socket.write_all(&answer.body).await.ok()?;
            },
        }
    }
}

async fn read(socket: &mut (impl AsyncBufReadExt + Unpin)) -> Option<Request> {
    let mut line = String::new();
    socket.read_line(&mut line).await.ok().filter(|read| *read > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        socket.read_line(&mut line).await.ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let len = headers.get("content-length").and_then(|v| v.parse().ok()).unwrap_or(0);
    let mut body = vec![0; len];
    socket.read_exact(&mut body).await.ok()?;
    Some(Request { method, path, headers, body: String::from_utf8_lossy(&body).into_owned() })
}
