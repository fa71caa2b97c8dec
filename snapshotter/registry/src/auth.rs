//! Getting in: which Authorization header a request to an endpoint carries.
//!
//! Owns: what each endpoint demanded for each repository, and the tokens. One slot per endpoint and
//! repository, locked while a token is fetched, so that many requests cause one.
//!
//! Invariants:
//! - A credential goes to the endpoint that it is for, and to the token endpoint which that one names,
//!   never from https to http.
//! - A header handed out changes when what is known of credentials changes, when it is about to expire, and when a
//!   request that used it was refused.
//! - Of several credentials each is tried before a refusal is final.

mod token;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::StatusCode;
use reqwest::header::{
    AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
};
use skimmer_proto::error_chain;
use tokio::time::Instant;

use self::token::{Demand, Token};
use crate::backoff;
use crate::challenge;
use crate::credentials::{self, Credential, Credentials, Version};
use crate::hosts::Endpoint;
use crate::origin::{authority, same_origin};
use crate::redact::{self, ERROR_BODY_BYTES, PlainUrl, Quote};
use crate::tls::{self, Clients};

const SLOTS: usize = 4096;
/// Credentials that are remembered as refused, for one repository.
const REFUSED: usize = 16;
const TOKEN_BYTES: usize = 256 << 10;
/// For one exchange with a token endpoint.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long a failure to get a token answers those who waited for the same one. Shorter than any
/// pause between tries.
const FAILURE_FRESH: Duration = Duration::from_millis(50);

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("look up credentials for {host}")]
    Credentials { host: String, source: Arc<credentials::Error> },
    #[error(
        "{host} wants a user and a password, and config.json has none, nor has a credential provider or a pull by way of CRI; run docker login {host}"
    )]
    NoCredentials { host: String },
    #[error(
        "{host} refused the credentials of config.json, of credential providers and of pulls by way of CRI; run docker login {host}"
    )]
    Rejected { host: String },
    #[error(
        "{host} offers no way to authenticate that is known here (Basic, Bearer), but {offered:?}"
    )]
    Unsupported { host: String, offered: Vec<String> },
    #[error(
        "{host} sends clients to {realm} for a token, which is not encrypted; nothing was sent"
    )]
    Downgrade { host: String, realm: PlainUrl },
    #[error("ask {realm} for a token")]
    Ask { realm: PlainUrl, source: Arc<reqwest::Error> },
    #[error("{realm} did not give a token within {DEADLINE:?}")]
    Slow { realm: PlainUrl },
    #[error("{realm} gave no token, but status {status}{said}")]
    Refused { realm: PlainUrl, status: StatusCode, said: Quote, retry_after: Option<Duration> },
    #[error("{realm} answered with something that is no token")]
    Answer { realm: PlainUrl },
    #[error(transparent)]
    Tls(Arc<tls::Error>),
}

impl Error {
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Ask { .. } | Self::Slow { .. } => true,
            Self::Refused { status, .. } => {
                status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS
            }
            _ => false,
        }
    }

    /// Whether the registry refused us, rather than failed.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::NoCredentials { .. } | Self::Rejected { .. } => true,
            Self::Refused { status, .. } => status.is_client_error() && !self.is_retryable(),
            _ => false,
        }
    }

    pub fn is_local(&self) -> bool {
        matches!(self, Self::Credentials { .. } | Self::Tls(_))
    }

    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

pub struct Auth {
    credentials: Credentials,
    slots: Mutex<HashMap<(String, String), Arc<Slot>>>,
}

type Slot = tokio::sync::Mutex<State>;

/// What is known about one repository at one endpoint.
#[derive(Default)]
struct State {
    /// `None` until the endpoint has asked for anything.
    demand: Option<Scheme>,
    given: Option<Given>,
    /// Credentials that the registry won't take; forgotten once it takes none.
    refused: Vec<Credential>,
    /// When, by which state of what is known of credentials, and why.
    failed: Option<(Instant, Version, Error)>,
}

#[derive(Clone, PartialEq, Eq)]
enum Scheme {
    Basic,
    Bearer(Demand),
}

struct Given {
    header: HeaderValue,
    /// What it was made from.
    credential: Option<Credential>,
    renew_at: Option<Instant>,
    version: Version,
}

/// A header, what it was made from, and how long it is good for, if that is known.
type Header = (HeaderValue, Option<Credential>, Option<Duration>);

impl Auth {
    pub fn new(credentials: Credentials) -> Self {
        Self { credentials, slots: Mutex::default() }
    }

    /// The header for a request, as far as the endpoint's demands are known. What couldn't be given a while ago may be
    /// in demand no more: then the endpoint is to say.
    pub async fn header(
        &self,
        clients: &Clients,
        endpoint: &Endpoint,
        repository: &str,
    ) -> Result<Option<HeaderValue>, Error> {
        let slot = self.slot(endpoint, repository);
        let mut state = slot.lock().await;
        if state.failed.as_ref().is_some_and(|(at, ..)| at.elapsed() >= FAILURE_FRESH) {
            *state = State::default();
        }
        let Some(demand) = state.demand.clone() else { return Ok(None) };
        self.give(&mut state, &demand, clients, endpoint, repository, false).await.map(Some)
    }

    /// The header that answers a 401 to a request that carried `used`.
    pub async fn answer(
        &self,
        clients: &Clients,
        endpoint: &Endpoint,
        repository: &str,
        refusal: &HeaderMap,
        used: Option<&HeaderValue>,
    ) -> Result<HeaderValue, Error> {
        let slot = self.slot(endpoint, repository);
        let mut state = slot.lock().await;
        let given = state.given.take_if(|given| Some(&given.header) == used);
        let (demand, too_little) = demanded(endpoint, repository, refusal)?;
        if state.demand.as_ref() != Some(&demand) {
            *state = State { demand: Some(demand.clone()), ..State::default() };
        } else if demand == Scheme::Basic || too_little {
            // A token that has only run out says nothing of who got it.
            state.refused.extend(given.and_then(|given| given.credential));
            let too_many = state.refused.len().saturating_sub(REFUSED);
            state.refused.drain(..too_many);
        }
        self.give(&mut state, &demand, clients, endpoint, repository, used.is_some()).await
    }

    async fn give(
        &self,
        state: &mut State,
        demand: &Scheme,
        clients: &Clients,
        endpoint: &Endpoint,
        repository: &str,
        again: bool,
    ) -> Result<HeaderValue, Error> {
        let version = self.credentials.version(&host(endpoint), repository);
        let now = Instant::now();
        if let Some(given) = &state.given
            && given.version == version
            && given.renew_at.is_none_or(|at| now < at)
        {
            return Ok(given.header.clone());
        }
        if let Some((at, by, error)) = &state.failed
            && *by == version
            && now.duration_since(*at) < FAILURE_FRESH
        {
            return Err(error.clone());
        }
        let got = match demand {
            Scheme::Basic => self.basic(state, endpoint, repository, again).await,
            Scheme::Bearer(demand) => {
                self.token(state, clients, endpoint, repository, demand, again).await
            }
        };
        match got {
            Ok((header, credential, usable)) => {
                let renew_at = usable.map(|usable| now + usable);
                state.failed = None;
                state.given = Some(Given { header: header.clone(), credential, renew_at, version });
                Ok(header)
            }
            Err(error) => {
                state.given = None;
                state.refused.clear();
                state.failed = Some((Instant::now(), version, error.clone()));
                Err(error)
            }
        }
    }

    async fn basic(
        &self,
        state: &State,
        endpoint: &Endpoint,
        repository: &str,
        again: bool,
    ) -> Result<Header, Error> {
        let mut known = false;
        for credential in self.found(endpoint, repository, again).await? {
            let header = match &credential {
                Credential::Password { username, secret } => Some(basic(username, secret)),
                Credential::Bearer(token) => token::bearer(token),
                Credential::Identity(_) => None,
            };
            let Some(header) = header else { continue };
            known = true;
            if !state.refused.contains(&credential) {
                return Ok((header, Some(credential), None));
            }
        }
        let host = host(endpoint);
        Err(if known { Error::Rejected { host } } else { Error::NoCredentials { host } })
    }

    async fn token(
        &self,
        state: &mut State,
        clients: &Clients,
        endpoint: &Endpoint,
        repository: &str,
        demand: &Demand,
        again: bool,
    ) -> Result<Header, Error> {
        let realm = PlainUrl::from(&demand.realm);
        if endpoint.base.scheme() == "https" && demand.realm.scheme() != "https" {
            return Err(Error::Downgrade { host: host(endpoint), realm });
        }
        let mut found = match self.found(endpoint, repository, again).await {
            Ok(found) => found,
            // Public images need none: docker goes on without, too.
            Err(error) => {
                tracing::warn!(
                    host = host(endpoint),
                    error = error_chain(&error),
                    "asking as nobody"
                );
                Vec::new()
            }
        };
        if found.iter().all(|credential| state.refused.contains(credential)) {
            state.refused.clear();
        }
        found.retain(|credential| !state.refused.contains(credential));
        let mut refusal = None;
        for credential in &found {
            if let Credential::Bearer(token) = credential
                && let Some(header) = token::bearer(token)
            {
                return Ok((header, Some(credential.clone()), Some(DEADLINE)));
            }
            match self.ask(clients, endpoint, demand, Some(credential)).await {
                Ok(token) => {
                    return Ok((token.header, Some(credential.clone()), Some(token.usable)));
                }
                Err(error) if error.is_refusal() => refusal = refusal.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        match refusal {
            // What helpers said before may be of yesterday.
            Some(error) if !again => {
                let fresh = self.found(endpoint, repository, true).await.unwrap_or_default();
                if fresh.iter().all(|credential| found.contains(credential)) {
                    return Err(error);
                }
                state.refused.extend(found);
                let token = self.token(state, clients, endpoint, repository, demand, true);
                Box::pin(token).await
            }
            Some(error) => Err(error),
            None => {
                let token = self.ask(clients, endpoint, demand, None).await?;
                Ok((token.header, None, Some(token.usable)))
            }
        }
    }

    /// Asks the token endpoint, as nobody without a credential.
    async fn ask(
        &self,
        clients: &Clients,
        endpoint: &Endpoint,
        demand: &Demand,
        credential: Option<&Credential>,
    ) -> Result<Token, Error> {
        let realm = PlainUrl::from(&demand.realm);
        let own = same_origin(&demand.realm, &endpoint.base);
        let tls = if own { (*endpoint.tls).clone() } else { endpoint.tls.anonymous() };
        let client = clients.for_url(&tls, &demand.realm).map_err(|e| Error::Tls(Arc::new(e)))?;
        let (request, sent) = match credential {
            Some(Credential::Identity(identity)) => {
                let form = demand.form(identity);
                let kind = "application/x-www-form-urlencoded";
                let sent = HeaderValue::from_str(&format!("Bearer {identity}")).ok();
                (client.post(demand.realm.clone()).header(CONTENT_TYPE, kind).body(form), sent)
            }
            Some(Credential::Password { username, secret }) => {
                let header = basic(username, secret);
                (client.get(demand.url()).header(AUTHORIZATION, header.clone()), Some(header))
            }
            Some(Credential::Bearer(_)) | None => (client.get(demand.url()), None),
        };
        let exchange = exchange(request, &realm, sent.as_ref());
        match tokio::time::timeout(DEADLINE, exchange).await {
            Ok(token) => token,
            Err(_) => Err(Error::Slow { realm }),
        }
    }

    async fn found(
        &self,
        endpoint: &Endpoint,
        repository: &str,
        again: bool,
    ) -> Result<Vec<Credential>, Error> {
        let host = host(endpoint);
        let found = self.credentials.find(&host, repository, again).await;
        found.map_err(|e| Error::Credentials { host, source: Arc::new(e) })
    }

    fn slot(&self, endpoint: &Endpoint, repository: &str) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= SLOTS {
            slots.clear();
        }
        let key = (endpoint.base.to_string(), repository.to_owned());
        Arc::clone(slots.entry(key).or_default())
    }
}

/// The best of the ways that a 401 offers: a token before a password; and whether it was because the token that was
/// sent doesn't allow enough (RFC 6750 §3.1).
fn demanded(
    endpoint: &Endpoint,
    repository: &str,
    refusal: &HeaderMap,
) -> Result<(Scheme, bool), Error> {
    let headers = refusal.get_all(WWW_AUTHENTICATE).iter();
    let offered: Vec<_> = headers.flat_map(|value| challenge::parse(value.as_bytes())).collect();
    let mut bearer = offered.iter().filter(|c| c.scheme == "bearer");
    let demand = bearer.find_map(|c| {
        Demand::new(c, repository).map(|d| (d, c.parameter("error") == Some("insufficient_scope")))
    });
    if let Some((demand, too_little)) = demand {
        return Ok((Scheme::Bearer(demand), too_little));
    }
    if offered.iter().any(|c| c.scheme == "basic") {
        return Ok((Scheme::Basic, false));
    }
    let offered = offered.iter().take(5).map(|c| c.scheme.chars().take(40).collect()).collect();
    Err(Error::Unsupported { host: host(endpoint), offered })
}

async fn exchange(
    request: reqwest::RequestBuilder,
    realm: &PlainUrl,
    sent: Option<&HeaderValue>,
) -> Result<Token, Error> {
    let failed =
        |e: reqwest::Error| Error::Ask { realm: realm.clone(), source: Arc::new(e.without_url()) };
    let mut response = request.send().await.map_err(failed)?;
    let status = response.status();
    let limit = if status.is_success() { TOKEN_BYTES } else { ERROR_BODY_BYTES };
    let mut body = Vec::new();
    while body.len() < limit
        && let Some(chunk) = response.chunk().await.map_err(failed)?
    {
        body.extend_from_slice(&chunk[..chunk.len().min(limit - body.len())]);
    }
    let headers = response.headers();
    if !status.is_success() {
        let retry_after = headers.get(RETRY_AFTER);
        return Err(Error::Refused {
            realm: realm.clone(),
            status,
            said: redact::quote(headers.get(CONTENT_TYPE), &body, sent),
            retry_after: retry_after.and_then(|v| backoff::retry_after(v, SystemTime::now())),
        });
    }
    let date = headers.get(DATE).and_then(|value| value.to_str().ok());
    let date = date.and_then(|value| httpdate::parse_http_date(value).ok());
    token::parse(&body, date).ok_or_else(|| Error::Answer { realm: realm.clone() })
}

fn basic(username: &str, secret: &str) -> HeaderValue {
    let text = format!("Basic {}", STANDARD.encode(format!("{username}:{secret}")));
    // Base64 is always a legal header.
    let mut header = HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("Basic"));
    header.set_sensitive(true);
    header
}

fn host(endpoint: &Endpoint) -> String {
    authority(&endpoint.base)
}
