//! What stands before a registry and has moods: it passes requests on, or refuses, cuts, delays or falsifies answers.
//!
//! It knows just enough HTTP: a request without a body on each connection, which ends with the answer.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::network::Host;

/// Where it hands out tokens.
const TOKENS: &str = "/token";

/// How it answers skimmerd; to others it answers as the registry does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mood {
    /// As the registry does.
    Passing,
    /// With this status and nothing else.
    Refusing(u16),
    /// With 401, unless asked with this `Authorization`.
    Demanding(String),
    /// With 401, unless asked with a token that was handed out at most so long ago, or twice that. It hands them out.
    Expiring(Duration),
    /// As the registry does, but the connection ends after so many bytes.
    Cutting(usize),
    /// As the registry does, at so many bytes a second for as long as the mood lasts.
    Crawling(usize),
    /// As the registry does, with another byte in the middle of each body.
    Falsifying,
}

/// A running front; ends when dropped.
pub struct Front {
    /// `name:port`
    address: String,
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
    // Its network goes last.
    _host: Host,
}

struct Shared {
    registry: String,
    /// Of this front, `name:port`.
    address: String,
    mood: Mutex<Mood>,
    started: Instant,
    stopping: AtomicBool,
}

impl Front {
    /// On `host`, which containerd and skimmerd know as `name`, before the registry at `registry`: `hosts` send them there.
    pub fn start(host: Host, name: &str, registry: &str, hosts: &Path) -> anyhow::Result<Self> {
        let at = host.address();
        let listener = host.inside(|| TcpListener::bind((at, 0)))??;
        listener.set_nonblocking(true)?;
        let address = format!("{name}:{}", listener.local_addr()?.port());
        let url = format!("http://{address}");
        let text = format!(
            "server = \"{url}\"\n\n[host.\"{url}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
        );
        // By its own name it is asked as it is.
        for name in [registry, &address] {
            std::fs::create_dir_all(hosts.join(name))?;
            std::fs::write(hosts.join(name).join("hosts.toml"), &text)
                .context("send clients to the front")?;
        }
        let shared = Arc::new(Shared {
            registry: registry.to_owned(),
            address: address.clone(),
            mood: Mutex::new(Mood::Passing),
            started: Instant::now(),
            stopping: AtomicBool::new(false),
        });
        let own = Arc::clone(&shared);
        // What a thread starts is in the same network.
        let listening = host.inside(move || thread::spawn(move || accept(&listener, &own)))?;
        Ok(Self { address, shared, listening: Some(listening), _host: host })
    }

    /// `name:port`
    pub fn address(&self) -> &str {
        &self.address
    }

    /// From the next request on.
    pub fn set(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap_or_else(PoisonError::into_inner) = mood;
    }
}

impl Shared {
    fn mood(&self) -> Mood {
        self.mood.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The headers with which a status comes.
    fn headers(&self, mood: &Mood, status: u16) -> String {
        match (mood, status) {
            (Mood::Expiring(_), 401) => {
                format!("WWW-Authenticate: Bearer realm=\"http://{}{TOKENS}\"\r\n", self.address)
            }
            (_, 401) => "WWW-Authenticate: Basic realm=\"front\"\r\n".to_owned(),
            (_, 429) => "Retry-After: 1\r\n".to_owned(),
            _ => String::new(),
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while !shared.stopping.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((client, _)) => {
                let shared = Arc::clone(shared);
                // Clients give up on answers that fail, which is what they are tested for.
                thread::spawn(move || answer(client, &shared));
            }
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn answer(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    client.set_nonblocking(false)?;
    client.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        if request.len() > 1 << 16 || client.read(&mut byte)? == 0 {
            return Ok(());
        }
        request.push(byte[0]);
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let is_daemon = header(&request, "user-agent").is_some_and(|agent| agent.contains("skimmer"));
    let mood = if is_daemon { shared.mood() } else { Mood::Passing };
    let age = shared.started.elapsed();
    if let Mood::Expiring(life) = mood
        && request.starts_with(&format!("GET {TOKENS}"))
    {
        let text = format!("{{\"token\":\"{}\"}}", period(age, life));
        let len = text.len();
        return write!(
            client,
            "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n{text}"
        );
    }
    if let Some(status) = refusal(&mood, age, &request) {
        let more = shared.headers(&mood, status);
        return write!(
            client,
            "HTTP/1.1 {status} No\r\n{more}Content-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    let mut registry = TcpStream::connect(&shared.registry)?;
    // The answer's end is the connection's.
    let (first, rest) = request.split_once("\r\n").unwrap_or((&request, ""));
    write!(registry, "{first}\r\nConnection: close\r\n{rest}")?;
    relay(&mood, shared, &mut registry, &mut client)
}

fn header<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    request.lines().find_map(|line| {
        let (found, value) = line.split_once(": ")?;
        found.eq_ignore_ascii_case(name).then_some(value)
    })
}

/// How many `life`s there were in `age`: the token of today, for a front of that age.
const fn period(age: Duration, life: Duration) -> u128 {
    age.as_millis() / life.as_millis()
}

fn refusal(mood: &Mood, age: Duration, request: &str) -> Option<u16> {
    match mood {
        Mood::Expiring(life) => {
            let token =
                header(request, "authorization").and_then(|text| text.strip_prefix("Bearer "));
            let token: Option<u128> = token.and_then(|text| text.parse().ok());
            let is_valid = token.is_some_and(|token| token + 1 >= period(age, *life));
            (!is_valid).then_some(401)
        }
        Mood::Refusing(status) => Some(*status),
        Mood::Demanding(authorization) => {
            (header(request, "authorization") != Some(authorization)).then_some(401)
        }
        _ => None,
    }
}

fn relay(
    mood: &Mood,
    shared: &Shared,
    registry: &mut TcpStream,
    client: &mut TcpStream,
) -> io::Result<()> {
    match mood {
        Mood::Cutting(bytes) => {
            io::copy(&mut registry.take(*bytes as u64), client)?;
        }
        Mood::Crawling(rate) => {
            // A tenth of a second's worth at a time.
            let mut part = vec![0; (*rate / 10).max(1)];
            loop {
                let count = registry.read(&mut part)?;
                if count == 0 {
                    break;
                }
                client.write_all(&part[..count])?;
                if shared.mood() == *mood {
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
        Mood::Falsifying => {
            let mut answer = Vec::new();
            registry.read_to_end(&mut answer)?;
            let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
            let body = end.map_or(answer.len(), |end| end + 4);
            let middle = body + (answer.len() - body) / 2;
            if let Some(byte) = answer.get_mut(middle) {
                *byte ^= 1;
            }
            client.write_all(&answer)?;
        }
        Mood::Passing | Mood::Refusing(_) | Mood::Demanding(_) | Mood::Expiring(_) => {
            io::copy(registry, client)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Mood, refusal};

    const AGE: Duration = Duration::from_secs(11);

    #[test]
    fn credentials_are_looked_at() {
        let demanding = Mood::Demanding("Basic abc".into());
        for (request, expected) in [
            ("GET / HTTP/1.1\r\nHost: r\r\n\r\n", Some(401)),
            ("GET / HTTP/1.1\r\nauthorization: Basic abc\r\n\r\n", None),
            ("GET / HTTP/1.1\r\nAuthorization: Basic x\r\n\r\n", Some(401)),
        ] {
            assert_eq!(refusal(&demanding, AGE, request), expected, "{request}");
        }
        assert_eq!(refusal(&Mood::Refusing(503), AGE, "GET / HTTP/1.1\r\n\r\n"), Some(503));
        assert_eq!(refusal(&Mood::Passing, AGE, "GET / HTTP/1.1\r\n\r\n"), None);
    }

    #[test]
    fn tokens_end() {
        let expiring = Mood::Expiring(Duration::from_secs(2));
        for (token, expected) in [(5, None), (4, None), (3, Some(401))] {
            let request = format!("GET / HTTP/1.1\r\nAuthorization: Bearer {token}\r\n\r\n");
            assert_eq!(refusal(&expiring, AGE, &request), expected, "{token}");
        }
        assert_eq!(refusal(&expiring, AGE, "GET / HTTP/1.1\r\n\r\n"), Some(401));
    }
}
