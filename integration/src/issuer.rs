//! Issues bearer tokens for a registry (distribution's `docs/spec/auth/{token,jwt}.md`).
//!
//! A thread for each connection answers `GET /token`: Basic credentials in, a JSON Web Token out that grants what was asked for. openssl
//! makes the key and the signatures.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::json;

use crate::command;

/// A running issuer; ends when dropped.
pub struct Issuer {
    url: String,
    address: std::net::SocketAddr,
    certificate: PathBuf,
    issued: Arc<AtomicUsize>,
    ending: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Signer {
    key: PathBuf,
    /// The certificate as JWT's `x5c` wants it: standard base64 of DER.
    chain: String,
    /// Authorization headers, and whether who sends one may pull.
    accounts: Vec<(String, bool)>,
    life: Life,
}

/// How long tokens are good for.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// What those who get them are told.
    pub said: Duration,
    /// What is written in them.
    pub written: Duration,
}

impl Life {
    pub const fn honest(lifetime: Duration) -> Self {
        Self { said: lifetime, written: lifetime }
    }
}

/// How long after their end the registry takes tokens (distribution's `registry/auth/token`, `Leeway`).
const LEEWAY: u64 = 60;

/// Somebody who gets tokens.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    pub user: &'static str,
    pub password: &'static str,
    /// Else the tokens are good for nothing.
    pub may_pull: bool,
}

impl Issuer {
    /// Gives tokens to `accounts`.
    pub fn start(folder: &Path, accounts: &[Account], life: Life) -> anyhow::Result<Self> {
        let (key, certificate) = (folder.join("issuer.key"), folder.join("issuer.crt"));
        let new = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=tests -keyout";
        let arguments: Vec<&str> = new.split(' ').collect();
        let mut request = Command::new("openssl");
        request.args(arguments).arg(&key).arg("-out").arg(&certificate);
        command::output_of(&mut request, command::PATIENCE).context("make the issuer's key")?;
        let pem = std::fs::read_to_string(&certificate)?;
        let signer = Signer {
            key,
            chain: pem.lines().filter(|line| !line.starts_with("-----")).collect(),
            accounts: accounts.iter().map(|a| (a.authorization(), a.may_pull)).collect(),
            life,
        };
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let issued = Arc::new(AtomicUsize::new(0));
        let ending = Arc::new(AtomicBool::new(false));
        let (count, end) = (Arc::clone(&issued), Arc::clone(&ending));
        let signer = Arc::new(signer);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let (signer, count) = (Arc::clone(&signer), Arc::clone(&count));
                // Of its own: clients keep connections in hand without saying a word.
                std::thread::spawn(move || {
                    match answer(&stream, &signer) {
                        Ok(true) => _ = count.fetch_add(1, Ordering::Relaxed),
                        Ok(false) => {}
                        Err(error) => {
                            eprintln!("a request for a token was not answered: {error:#}");
                        }
                    }
                    hear_out(&stream);
                });
            }
        });
        let url = format!("http://{address}/token");
        Ok(Self { url, address, certificate, issued, ending, thread: Some(thread) })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn certificate(&self) -> &Path {
        &self.certificate
    }

    /// How many tokens it has given out.
    pub fn issued(&self) -> usize {
        self.issued.load(Ordering::Relaxed)
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        // Wakes the thread, which then sees that it is over.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Answers one request; whether it was granted.
fn answer(mut stream: &TcpStream, signer: &Signer) -> anyhow::Result<bool> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let target = lines.next().context("no request")??;
    let mut account = None;
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("authorization")
        {
            account = signer.accounts.iter().find(|(header, _)| value.trim() == header);
        }
    }
    let target = target.split(' ').nth(1).unwrap_or_default();
    let (status, body) = match account {
        Some((_, may_pull)) => ("200 OK", signer.token(if *may_pull { target } else { "" })?),
        None => {
            ("401 Unauthorized", json!({ "details": "incorrect username or password" }).to_string())
        }
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    Ok(account.is_some())
}

/// Waits for the client to end. Closing with something unread, such as the body of a form, would take the answer back.
fn hear_out(mut stream: &TcpStream) {
    let _ = stream.shutdown(Shutdown::Write);
    let _ = std::io::copy(&mut stream, &mut std::io::sink());
}

impl Account {
    /// The Authorization header that says who it is.
    pub fn authorization(&self) -> String {
        format!("Basic {}", STANDARD.encode(format!("{}:{}", self.user, self.password)))
    }
}

impl Signer {
    fn token(&self, target: &str) -> anyhow::Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let query = target.split_once('?').map_or("", |(_, query)| query);
        let access: Vec<_> = query
            .split('&')
            .filter_map(|pair| pair.strip_prefix("scope="))
            .map(|scope| scope.replace("%3A", ":").replace("%2F", "/").replace("%2C", ","))
            .filter_map(|scope| {
                let mut parts = scope.split(':');
                let (kind, name, actions) = (parts.next()?, parts.next()?, parts.next()?);
                Some(json!({ "type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>() }))
            })
            .collect();
        let header = json!({ "typ": "JWT", "alg": "RS256", "x5c": [self.chain] });
        let claims = json!({
            "iss": "tests", "sub": "tests", "aud": "tests", "jti": now.to_string(), "access": access,
            "iat": now, "nbf": now.saturating_sub(5), "exp": now + self.life.written.as_secs() - LEEWAY,
        });
        let encode = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", encode(&header), encode(&claims));
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(self.sign(signed.as_bytes())?));
        Ok(json!({ "token": token, "expires_in": self.life.said.as_secs() }).to_string())
    }

    fn sign(&self, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
        let mut child = Command::new("openssl")
            .args(["dgst", "-sha256", "-sign"])
            .arg(&self.key)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("openssl has no input")?.write_all(bytes)?;
        let output = child.wait_with_output()?;
        anyhow::ensure!(output.status.success(), "openssl can't sign: {}", output.status);
        Ok(output.stdout)
    }
}
