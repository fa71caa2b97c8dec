//! Files at HTTP(S) addresses: what an address leads to, and ranges of it.
//!
//! Owns: the addresses of files that are being had, by a name that gives nothing away: an address may
//! hold secrets (a user's password, a signed query), so it never gets into an [`Origin`], an error or
//! a log. Does not own: whether the bytes are right.
//!
//! Invariants:
//! - No credentials are sent but those in the address itself. Of what hosts.toml says about a host, the authorities of its
//!   `ca` are trusted; nothing else of it is for files.
//! - Bytes of a file that has changed are never mixed with those of the one that was asked for.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE,
    LOCATION, RANGE,
};
use reqwest::{Response, StatusCode, Url};
use sha2::{Digest as _, Sha256};
use skimmer_cache::source::{Blame, BlobRef, ByteStream, FetchError, Origin};
use skimmer_proto::Digest;
use tokio::time::{Instant, sleep, timeout};

use crate::hosts::{self, Hosts};
use crate::redact::PlainUrl;
use crate::tls::{self, Clients, Material};

/// Addresses remembered; the oldest go first.
const ADDRESSES: usize = 1024;
const REDIRECTS: usize = 10;
/// Of the names of files: no repository is called so.
const PREFIX: &str = "_file/";
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0:?} is not the http or https address of a file")]
    Address(String),
    #[error("set up TLS for {url}")]
    Tls { url: PlainUrl, source: tls::Error },
    #[error("find out which authorities {url} is trusted by")]
    Hosts { url: PlainUrl, source: hosts::Error },
    #[error("ask {url}")]
    Ask { url: PlainUrl, source: reqwest::Error },
    #[error("{url} did not answer in time")]
    Slow { url: PlainUrl },
    #[error("{url} refuses this node: status {status}")]
    Refused { url: PlainUrl, status: StatusCode },
    #[error("there is nothing at {url} (status {status}); is the address right?")]
    Absent { url: PlainUrl, status: StatusCode },
    #[error("{url} answered with status {status}")]
    Status { url: PlainUrl, status: StatusCode },
    #[error("{url} redirects to nowhere, too often, or from https to http")]
    Redirect { url: PlainUrl },
    #[error("the file at {url} has changed; try again")]
    Changed { url: PlainUrl },
    #[error("{url} ended {missing} bytes early")]
    Short { url: PlainUrl, missing: u64 },
    #[error("the address of this file isn't known here any more; ask for it again")]
    Forgotten,
}

impl Error {
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Ask { .. } | Self::Slow { .. } | Self::Short { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS
            }
            _ => false,
        }
    }

    pub const fn blame(&self) -> Blame {
        match self {
            Self::Address(_) | Self::Tls { .. } | Self::Hosts { .. } | Self::Forgotten => {
                Blame::Local
            }
            Self::Refused { .. } => Blame::Refused,
            _ => Blame::Registry,
        }
    }
}

/// The address of a file. It doesn't show what in it may be secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Address(Url);

impl Address {
    /// The canonical form: as browsers write it, without the fragment.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let wrong = || {
            let plain = text.split(['?', '#']).next().unwrap_or_default();
            let shown = plain.rsplit_once('@').map_or(plain, |(_, rest)| rest);
            Error::Address(shown.chars().take(200).collect())
        };
        let mut url = Url::parse(text).map_err(|_| wrong())?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(wrong());
        }
        url.set_fragment(None);
        Ok(Self(url))
    }

    pub fn has_credentials(&self) -> bool {
        !self.0.username().is_empty() || self.0.password().is_some()
    }

    pub fn plain(&self) -> PlainUrl {
        PlainUrl::from(&self.0)
    }

    /// What names the content at this address while it has this strong validator: SHA-256 of
    /// `skimmer-url-v1`, a zero byte, the canonical address, a zero byte, the ETag as it was sent.
    pub fn key(&self, validator: &str) -> Digest {
        let mut hash = Sha256::new();
        for part in ["skimmer-url-v1", self.0.as_str()] {
            hash.update(part);
            hash.update([0]);
        }
        hash.update(validator);
        Digest::from_bytes(hash.finalize().into())
    }
}

impl std::fmt::Debug for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Address({})", self.plain())
    }
}

/// What is at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// In bytes, if the server says.
    pub len: Option<u64>,
    /// A strong ETag, with its quotes.
    pub validator: Option<String>,
    /// Whether the server serves ranges.
    pub ranges: bool,
}

/// A file that is being had: where, and what must not change meanwhile.
#[derive(Clone)]
struct Known {
    address: Address,
    validator: Option<String>,
    since: Instant,
}

/// See the module's documentation.
pub struct Files {
    clients: Clients,
    hosts: Arc<Hosts>,
    deadline: Duration,
    response_timeout: Duration,
    stall_timeout: Duration,
    known: Mutex<HashMap<String, Known>>,
}

impl Files {
    pub fn new(
        clients: Clients,
        hosts: Arc<Hosts>,
        deadline: Duration,
        response_timeout: Duration,
        stall_timeout: Duration,
    ) -> Self {
        Self { clients, hosts, deadline, response_timeout, stall_timeout, known: Mutex::default() }
    }

    /// Asks for the file's first byte, to learn what there is.
    pub async fn find(&self, address: &Address) -> Result<Found, Error> {
        let end = Instant::now() + self.deadline;
        let mut pause = FIRST_PAUSE;
        loop {
            match self.find_once(address).await {
                Err(error) if error.is_retryable() && Instant::now() + pause < end => {
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                done => return done,
            }
        }
    }

    async fn find_once(&self, address: &Address) -> Result<Found, Error> {
        let response = self.get(address, Some(0..1), None).await?;
        let headers = response.headers();
        let validator = strong(headers.get(ETAG));
        Ok(match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let len = content_range(headers).and_then(|(_, len)| len);
                Found { len, validator, ranges: len.is_some() }
            }
            // Nothing at all is in no range.
            StatusCode::RANGE_NOT_SATISFIABLE => Found { len: Some(0), validator, ranges: false },
            _ => {
                let len =
                    headers.get(CONTENT_LENGTH).and_then(|len| len.to_str().ok()?.parse().ok());
                Found { len, validator, ranges: false }
            }
        })
    }

    /// Gives the file a name that can be an origin, and remembers its address by it.
    pub fn name(&self, address: &Address, validator: Option<&str>) -> Origin {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= ADDRESSES
            && let Some(oldest) = known.iter().min_by_key(|(_, file)| file.since)
        {
            let oldest = oldest.0.clone();
            known.remove(&oldest);
        }
        let name = format!("{PREFIX}{}", address.key(validator.unwrap_or_default()).hex());
        let (address, validator) = (address.clone(), validator.map(str::to_owned));
        let host = host_of(&address.0);
        known.insert(name.clone(), Known { address, validator, since: Instant::now() });
        Origin { host, repository: name }
    }

    /// Whether the origin is a file's, not a repository.
    pub fn is_file(origin: &Origin) -> bool {
        origin.repository.starts_with(PREFIX)
    }

    /// A range of a file that was [named](Self::name).
    pub async fn open(&self, blob: &BlobRef, range: Range<u64>) -> Result<ByteStream, Error> {
        let name = blob.origins.iter().map(|origin| &origin.repository);
        let known = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            name.filter_map(|name| known.get(name)).next().cloned()
        };
        let Known { address, validator, .. } = known.ok_or(Error::Forgotten)?;
        let response = self.get(&address, Some(range.clone()), validator.as_deref()).await?;
        let url = address.plain();
        let changed = || Error::Changed { url: url.clone() };
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(changed());
        }
        let served = content_range(response.headers());
        let is_right =
            served.is_some_and(|(start, len)| start == range.start && len == Some(blob.len));
        let now = strong(response.headers().get(ETAG));
        if !is_right || (validator.is_some() && now != validator) {
            return Err(changed());
        }
        let (digest, from, stall) = (blob.digest, url.to_string(), self.stall_timeout);
        let failed = move |error| fetch_error(digest, from.clone(), error);
        let left = range.end - range.start;
        let context = (response, left, url, failed);
        Ok(Box::pin(stream::try_unfold(
            context,
            move |(mut response, left, url, failed)| async move {
                if left == 0 {
                    return Ok(None);
                }
                let next = body(&mut response, &url, stall).await;
                let next = next
                    .and_then(|next| next.ok_or(Error::Short { url: url.clone(), missing: left }));
                match next {
                    Ok(mut bytes) => {
                        bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                        let left = left - bytes.len() as u64;
                        Ok(Some((bytes, (response, left, url, failed))))
                    }
                    Err(error) => Err(failed(error)),
                }
            },
        )))
    }

    /// The file from `start` on, as the server sends it; whether it did begin there, which a server
    /// without ranges doesn't.
    pub async fn stream(
        &self,
        address: &Address,
        range: Option<Range<u64>>,
        validator: Option<&str>,
    ) -> Result<(bool, Download), Error> {
        let wanted = range.as_ref().map_or(0, |range| range.start);
        let response = self.get(address, range, validator).await?;
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        let starts = content_range(response.headers()).is_some_and(|(start, _)| start == wanted);
        if partial != starts || response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            return Err(Error::Changed { url: address.plain() });
        }
        Ok((partial, Download { response, url: address.plain(), stall: self.stall_timeout }))
    }

    async fn get(
        &self,
        address: &Address,
        range: Option<Range<u64>>,
        validator: Option<&str>,
    ) -> Result<Response, Error> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(Range { start, end }) = range {
            let last = if end == u64::MAX { String::new() } else { (end - 1).to_string() };
            let value = HeaderValue::from_str(&format!("bytes={start}-{last}"));
            headers.extend(value.ok().map(|value| (RANGE, value)));
            let tag = validator.and_then(|tag| HeaderValue::from_str(tag).ok());
            headers.extend(tag.map(|tag| (IF_RANGE, tag)));
        }
        let mut at = address.0.clone();
        for _ in 0..=REDIRECTS {
            let response = self.send(&at, &headers).await?;
            let url = PlainUrl::from(&at);
            let status = response.status();
            match status.as_u16() {
                200 | 206 => return Ok(response),
                416 if headers.contains_key(RANGE) => return Ok(response),
                301 | 302 | 303 | 307 | 308 => at = target(&at, &response)?,
                401 | 403 | 407 => return Err(Error::Refused { url, status }),
                404 | 410 => return Err(Error::Absent { url, status }),
                _ => return Err(Error::Status { url, status }),
            }
        }
        Err(Error::Redirect { url: address.plain() })
    }

    /// Who vouches for the host at `url`, beside the system's authorities.
    async fn trust(&self, url: &Url) -> Result<Material, Error> {
        if url.scheme() != "https" {
            return Ok(Material::default());
        }
        let host = host_of(url);
        let endpoints = self.hosts.endpoints(&host).await;
        let endpoints =
            endpoints.map_err(|source| Error::Hosts { url: PlainUrl::from(url), source })?;
        let own = endpoints.iter().find(|endpoint| host_of(&endpoint.base) == host);
        let authorities = own.map(|endpoint| endpoint.tls.authorities.clone());
        Ok(Material { authorities: authorities.unwrap_or_default(), ..Material::default() })
    }

    async fn send(&self, at: &Url, headers: &HeaderMap) -> Result<Response, Error> {
        let url = PlainUrl::from(at);
        let client = self.clients.for_url(&self.trust(at).await?, at);
        let client = client.map_err(|source| Error::Tls { url: url.clone(), source })?;
        let sent = client.get(at.clone()).headers(headers.clone()).send();
        match timeout(self.response_timeout, sent).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Error::Ask { url, source: error.without_url() }),
            Err(_) => Err(Error::Slow { url }),
        }
    }
}

/// The host with its port.
fn host_of(url: &Url) -> String {
    let (host, port) = (url.host_str(), url.port_or_known_default());
    format!("{}:{}", host.unwrap_or_default(), port.unwrap_or_default())
}

/// A file as it comes.
pub struct Download {
    response: Response,
    url: PlainUrl,
    stall: Duration,
}

impl Download {
    /// Of the body, if the server says.
    pub fn body_len(&self) -> Option<u64> {
        self.response.content_length()
    }

    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        body(&mut self.response, &self.url, self.stall).await
    }
}

async fn body(
    response: &mut Response,
    url: &PlainUrl,
    stall: Duration,
) -> Result<Option<Bytes>, Error> {
    match timeout(stall, response.chunk()).await {
        Ok(Ok(chunk)) => Ok(chunk),
        Ok(Err(error)) => Err(Error::Ask { url: url.clone(), source: error.without_url() }),
        Err(_) => Err(Error::Slow { url: url.clone() }),
    }
}

/// Where a redirect leads. Credentials of the address stay behind.
fn target(at: &Url, response: &Response) -> Result<Url, Error> {
    let wrong = || Error::Redirect { url: PlainUrl::from(at) };
    let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let next = location.and_then(|text| at.join(text).ok()).ok_or_else(wrong)?;
    let legal = matches!(next.scheme(), "http" | "https") && next.has_host();
    let weaker = at.scheme() == "https" && next.scheme() == "http";
    if legal && !weaker { Ok(next) } else { Err(wrong()) }
}

/// RFC 9110, 8.8.3: only strong ETags say that the bytes are the same.
fn strong(tag: Option<&HeaderValue>) -> Option<String> {
    let tag = tag?.to_str().ok()?.trim();
    let inner = tag.strip_prefix('"')?.strip_suffix('"')?;
    (!inner.is_empty() && !inner.contains('"')).then(|| tag.to_owned())
}

/// RFC 9110, 14.4: where the range starts, and the length of the whole.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (range, len) = text.split_once('/')?;
    let start = range.split_once('-')?.0.parse().ok()?;
    Some((start, len.parse().ok()))
}

pub fn fetch_error(digest: Digest, from: String, error: Error) -> FetchError {
    let (blame, retryable) = (error.blame(), error.is_retryable());
    FetchError { digest, from, blame, retryable, source: Box::new(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_canonical_and_keep_their_secrets() {
        let address = Address::parse("HTTPS://Files.Example:443/a/../b%20c?x=1#top").unwrap();
        assert_eq!(address.0.as_str(), "https://files.example/b%20c?x=1");
        assert!(!address.has_credentials());
        let secret = Address::parse("http://u:pass@h/a?sig=s3cret").unwrap();
        assert!(secret.has_credentials());
        for shown in [format!("{secret:?}"), secret.plain().to_string()] {
            assert!(!shown.contains("pass") && !shown.contains("s3cret"), "{shown}");
        }
        for wrong in ["", "files.example/a", "ftp://u:pass@h/a?s3cret", "file:///etc/passwd"] {
            let error = Address::parse(wrong).unwrap_err().to_string();
            assert!(!error.contains("pass@") && !error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn no_repository_has_a_files_name() {
        let settings = tls::Settings {
            user_agent: String::new(),
            connect_timeout: Duration::ZERO,
            idle_per_host: 1,
        };
        let (hosts, never) = (Arc::new(Hosts::new(None)), Duration::ZERO);
        let files = Files::new(Clients::new(settings), hosts, never, never, never);
        let origin = files.name(&Address::parse("http://u:pass@intranet/a?s3cret").unwrap(), None);
        assert!(Files::is_file(&origin));
        assert_eq!(origin.host, "intranet:80");
        assert!(origin.to_string().parse::<skimmer_proto::Reference>().is_err(), "{origin}");
    }

    #[test]
    fn the_key_is_of_address_and_validator() {
        let a = Address::parse("http://h/a").unwrap();
        // Part of the protocol: a change of it splits the swarm.
        let mut hash = Sha256::new();
        hash.update(b"skimmer-url-v1\0http://h/a\0\"tag\"");
        assert_eq!(a.key("\"tag\""), Digest::from_bytes(hash.finalize().into()));
        assert_ne!(a.key("\"tag\""), a.key("\"other\""));
        assert_eq!(a.key("\"tag\""), Address::parse("HTTP://H:80/a#x").unwrap().key("\"tag\""));
    }

    #[test]
    fn only_strong_etags_count() {
        for (tag, expected) in [
            ("\"abc\"", true),
            ("W/\"abc\"", false),
            ("abc", false),
            ("\"\"", false),
            ("\"a\"b\"", false),
        ] {
            let tag = HeaderValue::from_str(tag).unwrap();
            assert_eq!(strong(Some(&tag)).is_some(), expected, "{tag:?}");
        }
    }

    #[test]
    fn content_ranges_are_read() {
        for (text, expected) in [
            ("bytes 0-0/1234", Some((0, Some(1234)))),
            ("bytes 5-9/*", Some((5, None))),
            ("bytes */1234", None),
            ("items 0-1/2", None),
            ("bytes x-1/2", None),
        ] {
            let value = HeaderValue::from_str(text).unwrap();
            let headers = HeaderMap::from_iter([(CONTENT_RANGE, value)]);
            assert_eq!(content_range(&headers), expected, "{text}");
        }
    }
}
