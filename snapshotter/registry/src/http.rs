//! One GET to one endpoint: credentials, redirects, deadlines, and what a status means.
//!
//! Owns: the clients, what endpoints demand (through [`Auth`]), and the bound on concurrent requests
//! per host. Does not own: which endpoint to ask, and whether to ask again (see `tries`).
//!
//! Redirects are followed by hand: to another host go neither the Authorization header nor the
//! endpoint's own headers nor its client certificate; https never becomes http.

mod error;
mod gate;
mod health;
mod moved;

use std::time::{Duration, SystemTime};

use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER,
};
use reqwest::{Response, StatusCode, Url};
use skimmer_cache::source::Class;
use tokio::time::{Instant, timeout_at};

pub use self::error::{Error, Phase};
pub use self::gate::RESERVED;
use self::gate::{Gate, Permit};
use self::health::Health;
use self::moved::Moved;
use crate::auth::Auth;
use crate::backoff;
use crate::hosts::Endpoint;
use crate::origin::{authority, same_origin};
use crate::redact::{self, ERROR_BODY_BYTES, PlainUrl, Quote};
use crate::tls::Clients;

const REDIRECTS: usize = 10;
/// How often one request is repeated with a new credential: once because the old one ran out, once
/// because the endpoint wants another kind, and for others that are known.
const CHALLENGES: u32 = 6;
/// For the body of an error, which is only for the message.
const ERROR_BODY_DEADLINE: Duration = Duration::from_secs(2);

pub struct Http {
    clients: Clients,
    auth: Auth,
    gate: Gate,
    pub health: Health,
    moved: Moved,
    response_timeout: Duration,
    stall_timeout: Duration,
}

/// A request to one endpoint.
pub struct Ask<'a> {
    pub endpoint: &'a Endpoint,
    pub repository: &'a str,
    /// Below the endpoint's base: `library/debian/blobs/sha256:…`; empty for the API's root.
    pub path: &'a str,
    pub headers: HeaderMap,
    pub class: Class,
    /// Whether the content never changes, so that the target of a redirect may be used again.
    pub immutable: bool,
    pub until: Instant,
}

/// A successful response whose body has not been read.
pub struct Answer {
    pub response: Response,
    /// Where it came from in the end.
    pub url: PlainUrl,
    stall_timeout: Duration,
    _permit: Permit,
}

impl Answer {
    /// The next bytes of the body; `None` at its end.
    pub async fn chunk(&mut self, until: Instant) -> Result<Option<bytes::Bytes>, Error> {
        let stalled = Instant::now() + self.stall_timeout;
        let slow = || Error::Slow { url: self.url.clone(), phase: Phase::Body };
        let chunk = timeout_at(stalled.min(until), self.response.chunk()).await;
        let chunk = chunk.map_err(|_| slow())?;
        chunk.map_err(|e| Error::Body { url: self.url.clone(), source: e.without_url() })
    }
}

/// A response of any status, and the header that got it.
struct Raw {
    answer: Answer,
    at: Url,
}

impl Http {
    /// `response_timeout` is from a request to the head of its answer, `stall_timeout` between two
    /// pieces of a body.
    pub fn new(
        clients: Clients,
        auth: Auth,
        connections_per_host: usize,
        response_timeout: Duration,
        stall_timeout: Duration,
    ) -> Self {
        let gate = Gate::new(connections_per_host);
        let (health, moved) = (Health::default(), Moved::default());
        Self { clients, auth, gate, health, moved, response_timeout, stall_timeout }
    }

    /// Sends the request; only 200 and 206 are answers.
    pub async fn get(&self, ask: &Ask<'_>) -> Result<Answer, Error> {
        let answer = self.get_any(ask).await;
        match answer.as_ref().err() {
            Some(Error::Connect { .. } | Error::Slow { phase: Phase::Head, .. }) => {
                self.health.failed(&ask.endpoint.base);
            }
            _ => self.health.answered(&ask.endpoint.base),
        }
        let (raw, sent) = answer?;
        match raw.answer.response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(raw.answer),
            _ => Err(explain(raw, sent.as_ref()).await),
        }
    }

    /// What a request to the endpoint would carry, as far as its demands are known. A secret.
    pub async fn authorization(&self, endpoint: &Endpoint, repository: &str) -> Option<String> {
        let header = self.auth.header(&self.clients, endpoint, repository).await;
        header.ok().flatten()?.to_str().ok().map(str::to_owned)
    }

    /// Answers the endpoint's challenges, as far as we can.
    async fn get_any(&self, ask: &Ask<'_>) -> Result<(Raw, Option<HeaderValue>), Error> {
        let host = authority(&ask.endpoint.base);
        let slow = |_| Error::Slow { url: (&ask.endpoint.base).into(), phase: Phase::Token };
        let failed = |source| Error::Auth { host: host.clone(), source: Box::new(source) };
        let first = self.auth.header(&self.clients, ask.endpoint, ask.repository);
        let mut sent = timeout_at(ask.until, first).await.map_err(slow)?.map_err(failed)?;
        let mut challenges = 0;
        loop {
            let raw = self.follow(ask, sent.as_ref()).await?;
            let refused = raw.answer.response.status() == StatusCode::UNAUTHORIZED
                && same_origin(&raw.at, &ask.endpoint.base);
            if !refused || challenges == CHALLENGES {
                return Ok((raw, sent));
            }
            challenges += 1;
            let answered = self.auth.answer(
                &self.clients,
                ask.endpoint,
                ask.repository,
                raw.answer.response.headers(),
                sent.as_ref(),
            );
            sent = Some(timeout_at(ask.until, answered).await.map_err(slow)?.map_err(failed)?);
        }
    }

    /// Follows redirects to their end.
    async fn follow(
        &self,
        ask: &Ask<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Raw, Error> {
        let mut at = address(ask);
        if let Some(target) = self.moved.target(&at) {
            if let Ok(answer) = self.send(ask, &target, None).await
                && answer.response.status().is_success()
            {
                return Ok(Raw { answer, at: target });
            }
            self.moved.forget(&at);
        }
        let mut seen: Vec<Url> = Vec::new();
        loop {
            let response = self.send(ask, &at, authorization).await?;
            let status = response.response.status();
            let redirects = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308);
            let location = response.response.headers().get(LOCATION).filter(|_| redirects);
            let Some(location) = location else {
                if let Some(first) = seen.into_iter().next()
                    && ask.immutable
                    && status.is_success()
                    && !same_origin(&at, &first)
                {
                    self.moved.remember(first, at.clone());
                }
                return Ok(Raw { answer: response, at });
            };
            let url = PlainUrl::from(&at);
            let next = location.to_str().ok().and_then(|text| at.join(text).ok());
            let next = match next {
                Some(next) if matches!(next.scheme(), "http" | "https") && next.has_host() => next,
                _ => return Err(Error::RedirectNowhere { url }),
            };
            if at.scheme() == "https" && next.scheme() == "http" {
                return Err(Error::RedirectDowngrade { url, to: PlainUrl::from(&next) });
            }
            seen.push(std::mem::replace(&mut at, next));
            if seen.contains(&at) || seen.len() > REDIRECTS {
                return Err(Error::RedirectLoop {
                    url: PlainUrl::from(&seen[0]),
                    hops: seen.len(),
                });
            }
        }
    }

    async fn send(
        &self,
        ask: &Ask<'_>,
        at: &Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<Answer, Error> {
        let url = PlainUrl::from(at);
        let own = same_origin(at, &ask.endpoint.base);
        let tls = if own { (*ask.endpoint.tls).clone() } else { ask.endpoint.tls.anonymous() };
        let client = self
            .clients
            .for_url(&tls, at)
            .map_err(|source| Error::Tls { url: url.clone(), source })?;
        let mut headers = ask.headers.clone();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if own {
            for (name, value) in &ask.endpoint.headers {
                headers.append(name.clone(), value.clone());
            }
            if let Some(authorization) = authorization {
                headers.insert(AUTHORIZATION, authorization.clone());
            }
        }
        let host = authority(at);
        let permit = self.gate.enter(&host, ask.class);
        let busy = |_| Error::Slow { url: url.clone(), phase: Phase::Turn };
        let permit = timeout_at(ask.until, permit).await.map_err(busy)?;
        let late = ask.until.min(Instant::now() + self.response_timeout);
        let sent = timeout_at(late, client.get(at.clone()).headers(headers).send()).await;
        let response = sent
            .map_err(|_| Error::Slow { url: url.clone(), phase: Phase::Head })?
            .map_err(|e| Error::sending(url.clone(), e))?;
        Ok(Answer { response, url, stall_timeout: self.stall_timeout, _permit: permit })
    }
}

/// The URL of a request, with the registry's name if the endpoint is a mirror of it.
fn address(ask: &Ask<'_>) -> Url {
    let mut url = ask.endpoint.base.clone();
    url.set_path(&format!("{}/{}", url.path().trim_end_matches('/'), ask.path));
    if let Some(namespace) = &ask.endpoint.namespace {
        url.query_pairs_mut().append_pair("ns", namespace);
    }
    url
}

/// The error that a status stands for, with what the server says about it.
async fn explain(raw: Raw, sent: Option<&HeaderValue>) -> Error {
    let Raw { mut answer, .. } = raw;
    let until = Instant::now() + ERROR_BODY_DEADLINE;
    let mut body = Vec::new();
    while body.len() < ERROR_BODY_BYTES
        && let Ok(Some(chunk)) = answer.chunk(until).await
    {
        body.extend_from_slice(&chunk[..chunk.len().min(ERROR_BODY_BYTES - body.len())]);
    }
    let (url, status) = (answer.url.clone(), answer.response.status());
    let headers = answer.response.headers();
    let said: Quote = redact::quote(headers.get(CONTENT_TYPE), &body, sent);
    let retry_after = headers.get(RETRY_AFTER);
    let retry_after = retry_after.and_then(|v| backoff::retry_after(v, SystemTime::now()));
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Error::Refused { url, status, said, as_nobody: sent.is_none() }
        }
        StatusCode::NOT_FOUND => Error::NotFound { url, said },
        _ => Error::Status { url, status, said, retry_after },
    }
}
