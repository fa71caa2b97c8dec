//! The crate's face: a [`Source`] of blobs, and the resolver of references.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream;
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use skimmer_cache::source::{
    Blame, BlobKind, BlobRef, ByteStream, Class, FetchError, Origin, Source,
};
use skimmer_proto::{Digest, Platform, Reference};
use tokio::time::Instant;

use crate::auth::Auth;
use crate::blobs::{self, Transfer};
use crate::credentials::{Credentials, Places};
use crate::files::{self, Files};
use crate::hosts::{Endpoint, Hosts};
use crate::http::{self, Ask, Http};
use crate::media::MANIFEST_ACCEPT;
use crate::origin::authority;
use crate::redact::PlainUrl;
pub use crate::resolve::Error;
use crate::resolve::{Documents, Resolved, Shelf};
use crate::tls::{Clients, Settings};
use crate::tries::{Candidate, Tries};

/// Everything has a default; an empty one is an anonymous client of public registries.
#[derive(Clone, Debug)]
pub struct Config {
    /// containerd's `config_path`: folders with `<host>/hosts.toml`, separated by colons.
    pub config_path: Option<PathBuf>,
    /// Where credentials are looked for.
    pub credentials: Places,
    /// For one operation with all its retries; transfers get more by their length.
    pub deadline: Duration,
    pub connect_timeout: Duration,
    /// From a request to the head of its answer.
    pub response_timeout: Duration,
    /// Between two pieces of an answer.
    pub stall_timeout: Duration,
    /// How often every endpoint is asked before an operation fails.
    pub rounds: u32,
    /// Requests under way to one host, for all images together.
    pub connections_per_host: usize,
    pub user_agent: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            config_path: None,
            credentials: Places::default(),
            deadline: Duration::from_secs(120),
            connect_timeout: Duration::from_secs(10),
            response_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(30),
            rounds: 10,
            connections_per_host: 32,
            user_agent: concat!("skimmer/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// A client of all registries. A clone is another handle of the same.
#[derive(Clone)]
pub struct Registry {
    files: Arc<Files>,
    hosts: Arc<Hosts>,
    http: Arc<Http>,
    deadline: Duration,
    rounds: u32,
}

/// How one endpoint of a registry host answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ping {
    pub url: String,
    pub ok: bool,
    /// For a person: what it answered, or why it didn't.
    pub words: String,
}

impl Registry {
    /// Reads nothing yet: files are read when a host is first asked, and again when they change.
    pub fn new(config: Config) -> Self {
        let settings = Settings {
            user_agent: config.user_agent,
            connect_timeout: config.connect_timeout,
            idle_per_host: config.connections_per_host + http::RESERVED,
        };
        let hosts = Arc::new(Hosts::new(config.config_path.as_deref()));
        let files = Files::new(
            Clients::new(settings.clone()),
            Arc::clone(&hosts),
            config.deadline,
            config.response_timeout,
            config.stall_timeout,
        );
        let clients = Clients::new(settings);
        let http = Http::new(
            clients,
            Auth::new(Credentials::new(config.credentials)),
            config.connections_per_host,
            config.response_timeout,
            config.stall_timeout,
        );
        Self {
            files: Arc::new(files),
            hosts,
            http: Arc::new(http),
            deadline: config.deadline,
            rounds: config.rounds,
        }
    }

    /// Files at other addresses than a registry's.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// What `reference` stands for on `platform`, or on this machine's.
    pub async fn resolve(
        &self,
        reference: &Reference,
        platform: Option<&Platform>,
    ) -> Result<Resolved, Error> {
        self.resolve_by(reference, platform, None).await
    }

    /// Likewise; what is on the shelf isn't asked of the registry.
    pub async fn resolve_with(
        &self,
        reference: &Reference,
        platform: Option<&Platform>,
        shelf: &dyn Shelf,
    ) -> Result<Resolved, Error> {
        self.resolve_by(reference, platform, Some(shelf)).await
    }

    async fn resolve_by(
        &self,
        reference: &Reference,
        platform: Option<&Platform>,
        shelf: Option<&dyn Shelf>,
    ) -> Result<Resolved, Error> {
        let Reference { host, repository, .. } = reference.clone();
        let origin = Origin { host, repository };
        let by_tag = reference.digest.is_none();
        let candidates = self.candidates(std::slice::from_ref(&origin), by_tag).await?;
        let tries = || self.tries(&candidates, &origin, Duration::ZERO);
        let documents = Documents { http: &self.http, origin: &origin, shelf, tries: &tries };
        let host = Platform::host();
        crate::resolve::resolve(&documents, reference, platform.unwrap_or(&host)).await
    }

    /// An Authorization header by which the registry itself, not a mirror of it, lets this node read
    /// the repository; for somebody who is to ask it whether the node may. It is a secret. `None`: the
    /// registry wants none, or there is none to give.
    pub async fn authorization(
        &self,
        origin: &Origin,
        manifest: Option<&Digest>,
    ) -> Option<String> {
        let Origin { host, repository } = origin;
        if !is_repository(repository) {
            return None;
        }
        let endpoints = self.endpoints(host).await.ok()?;
        let endpoint = endpoints.iter().find(|endpoint| is_itself(host, endpoint))?;
        let given = || self.http.authorization(endpoint, repository);
        if let Some(header) = given().await {
            return Some(header);
        }
        // What the registry demands is known once it was asked for something.
        let path = match manifest {
            Some(digest) => format!("{repository}/manifests/{digest}"),
            None => format!("{repository}/tags/list"),
        };
        let ask = Ask {
            endpoint,
            repository,
            path: &path,
            headers: HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(MANIFEST_ACCEPT))]),
            class: Class::Fault,
            immutable: false,
            until: Instant::now() + self.deadline,
        };
        let answer = self.http.get(&ask).await;
        if let Err(error) = answer.map(drop) {
            tracing::debug!(%origin, error = in_words(&error), "asked for what it demands");
        }
        given().await
    }

    /// Asks every endpoint of `host` for the root of its API.
    pub async fn ping(&self, host: &str) -> Result<Vec<Ping>, Error> {
        let endpoints = self.endpoints(host).await?;
        let mut answers = Vec::new();
        for endpoint in endpoints.iter() {
            let ask = Ask {
                endpoint,
                repository: "",
                path: "",
                headers: HeaderMap::new(),
                class: Class::Fault,
                immutable: false,
                until: Instant::now() + self.deadline,
            };
            let answer = self.http.get(&ask).await;
            let (ok, words) = match &answer {
                Ok(_) => (true, "answers".to_owned()),
                Err(error) => (false, in_words(error)),
            };
            let url = PlainUrl::from(&endpoint.base).to_string();
            answers.push(Ping { url, ok, words });
        }
        Ok(answers)
    }

    async fn endpoints(&self, host: &str) -> Result<Arc<[Endpoint]>, Error> {
        let endpoints = self.hosts.endpoints(host).await;
        endpoints.map_err(|source| Error::Hosts { host: host.to_owned(), source })
    }

    /// Every endpoint that may serve one of `origins`, in order.
    async fn candidates(&self, origins: &[Origin], resolve: bool) -> Result<Vec<Candidate>, Error> {
        let mut candidates = Vec::new();
        for origin in origins {
            if !is_repository(&origin.repository) {
                return Err(Error::Repository(origin.repository.chars().take(100).collect()));
            }
            for endpoint in self.endpoints(&origin.host).await?.iter() {
                if if resolve { endpoint.can_resolve } else { endpoint.can_pull } {
                    candidates
                        .push(Candidate { origin: origin.clone(), endpoint: endpoint.clone() });
                }
            }
        }
        candidates.sort_by_key(|candidate| self.http.health.is_ill(&candidate.endpoint.base));
        if candidates.is_empty() {
            let host = origins.first().map(|origin| origin.host.clone()).unwrap_or_default();
            let capability = if resolve { "resolve" } else { "pull" };
            return Err(Error::NoEndpoint { host, capability });
        }
        Ok(candidates)
    }

    fn tries(&self, from: &[Candidate], origin: &Origin, more: Duration) -> Result<Tries, Error> {
        let until = Instant::now() + self.deadline + more;
        Tries::new(from.to_vec(), self.rounds, until)
            .ok_or_else(|| Error::NoEndpoint { host: origin.host.clone(), capability: "pull" })
    }

    async fn open(
        &self,
        blob: &BlobRef,
        range: Range<u64>,
        class: Class,
    ) -> Result<ByteStream, Error> {
        let (start, end, len) = (range.start, range.end, blob.len);
        if start >= end || end > len {
            return Err(Error::Outside { start, end, len });
        }
        let candidates = self.candidates(&blob.origins, false).await?;
        let origin = candidates.first().map(|c| c.origin.clone());
        let origin = origin.ok_or(Error::Outside { start, end, len })?;
        if blob.kind == BlobKind::Manifest {
            let tries = || self.tries(&candidates, &origin, Duration::ZERO);
            let http = &self.http;
            let documents = Documents { http, origin: &origin, shelf: None, tries: &tries };
            let bytes = documents.manifest_by_digest(&blob.digest).await?;
            let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
            let range = range.filter(|(_, end)| *end <= bytes.len());
            let (start, end) =
                range.ok_or(Error::Outside { start, end, len: bytes.len() as u64 })?;
            let bytes = bytes.slice(start..end);
            return Ok(Box::pin(stream::once(async move { Ok(bytes) })));
        }
        let tries = self.tries(&candidates, &origin, blobs::more_time(end - start))?;
        let mut transfer = Transfer::new(Arc::clone(&self.http), blob, range, class, tries);
        let what = format!("bytes {start}-{} of blob", end - 1);
        transfer.open().await.map_err(|source| Error::Fetch { what: what.clone(), source })?;
        let context = (transfer, blob.clone(), what);
        Ok(Box::pin(stream::try_unfold(context, |(mut transfer, blob, what)| async move {
            match transfer.next().await {
                Ok(next) => Ok(next.map(|bytes| (bytes, (transfer, blob, what)))),
                Err(source) => Err(failed(&blob, Error::Fetch { what, source })),
            }
        })))
    }
}

#[async_trait]
impl Source for Registry {
    fn name(&self) -> &'static str {
        "registry"
    }

    async fn fetch(
        &self,
        blob: &BlobRef,
        range: Range<u64>,
        class: Class,
    ) -> Result<ByteStream, FetchError> {
        let files: Vec<Origin> =
            blob.origins.iter().filter(|origin| Files::is_file(origin)).cloned().collect();
        if !files.is_empty() {
            let from = files[0].host.clone();
            let file = BlobRef { origins: files, ..blob.clone() };
            let opened = self.files.open(&file, range).await;
            return opened.map_err(|error| files::fetch_error(blob.digest, from, error));
        }
        self.open(blob, range, class).await.map_err(|error| failed(blob, error))
    }
}

fn failed(blob: &BlobRef, error: Error) -> FetchError {
    let (blame, retryable): (Blame, bool) = (error.blame(), error.is_retryable());
    let origins: Vec<String> = blob.origins.iter().map(Origin::to_string).collect();
    FetchError {
        digest: blob.digest,
        from: origins.join(", "),
        blame,
        retryable,
        source: Box::new(error),
    }
}

/// Whether the endpoint is the registry that `host` names.
fn is_itself(host: &str, endpoint: &Endpoint) -> bool {
    let name = authority(&endpoint.base);
    !endpoint.is_mirror && (name == host || host == "docker.io" && name == "registry-1.docker.io")
}

fn in_words(error: &http::Error) -> String {
    let first: &dyn std::error::Error = error;
    let causes = std::iter::successors(first.source(), |e| e.source());
    causes.fold(first.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// distribution-spec's names, and so nothing that means something in a URL. They may come from labels.
fn is_repository(repository: &str) -> bool {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    let component = |c: &str| !c.is_empty() && c.bytes().all(legal) && !c.starts_with('.');
    repository.len() <= 255 && repository.split('/').all(component)
}
