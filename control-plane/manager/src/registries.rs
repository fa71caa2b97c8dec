//! Asking a registry whether somebody may pull from a repository.
//!
//! The one request carries the node's own `Authorization` header, which isn't kept, logged or sent
//! anywhere else: redirects aren't followed. Only a clear yes counts.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue};
use reqwest::{Client, StatusCode, redirect};
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::sync::Semaphore;

/// From the call to the head of the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Questions under way at once.
const AT_ONCE: usize = 64;
const MAX_AUTHORIZATION: usize = 16 << 10;

const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// May the bearer of `authorization` pull from `host`/`repository`?
pub struct Question<'a> {
    pub host: &'a str,
    pub repository: &'a str,
    /// A tag or digest that is there; without one the list of tags is asked for.
    pub manifest: Option<&'a str>,
    pub authorization: &'a str,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read the certificates in {path} (grants.ca_files)")]
    Authorities { path: PathBuf, source: rustls_pki_types::pem::Error },
    #[error("set up TLS for asking registries")]
    Tls(#[source] rustls::Error),
    #[error("set up HTTP for asking registries")]
    Http(#[source] reqwest::Error),
    #[error(
        "the Authorization header isn't a Basic or Bearer one of at most {MAX_AUTHORIZATION} bytes"
    )]
    Authorization,
    #[error("ask registry {host}")]
    Ask { host: String, source: reqwest::Error },
    #[error("too many questions to registries at once; ask again")]
    Busy,
}

/// The outside world of grants.
#[async_trait]
pub trait AskRegistry: Send + Sync + 'static {
    /// `Ok(false)`: the registry said no, or nothing clear.
    async fn may_pull(&self, question: Question<'_>) -> Result<bool, Error>;
}

/// Registries over HTTPS, and over plain HTTP where that is configured.
pub struct Registries {
    client: Client,
    plain_http: BTreeSet<String>,
    permits: Semaphore,
}

impl Registries {
    /// `plain_http`: hosts, with their ports, that are asked without TLS. `ca_files`: PEM, besides the system's.
    pub fn new(
        plain_http: impl IntoIterator<Item = String>,
        ca_files: &[PathBuf],
    ) -> Result<Self, Error> {
        let client = Client::builder()
            .tls_backend_preconfigured(tls(ca_files)?)
            .redirect(redirect::Policy::none())
            .referer(false)
            .timeout(PATIENCE)
            .user_agent(concat!("skimmer-control/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(Error::Http)?;
        let plain_http = plain_http.into_iter().collect();
        Ok(Self { client, plain_http, permits: Semaphore::new(AT_ONCE) })
    }

    fn url(&self, question: &Question<'_>) -> String {
        // Docker Hub's API isn't where its name says.
        let host =
            if question.host == "docker.io" { "registry-1.docker.io" } else { question.host };
        let scheme = if self.plain_http.contains(question.host) { "http" } else { "https" };
        let path = match question.manifest {
            Some(reference) => format!("manifests/{reference}"),
            None => "tags/list?n=1".to_owned(),
        };
        format!("{scheme}://{host}/v2/{}/{path}", question.repository)
    }
}

#[async_trait]
impl AskRegistry for Registries {
    async fn may_pull(&self, question: Question<'_>) -> Result<bool, Error> {
        let header = authorization(question.authorization).ok_or(Error::Authorization)?;
        let _permit = self.permits.try_acquire().map_err(|_| Error::Busy)?;
        let url = self.url(&question);
        let request = match question.manifest {
            Some(_) => self.client.head(url).header(ACCEPT, MANIFESTS),
            None => self.client.get(url),
        };
        let answer = request.header(AUTHORIZATION, header).send().await;
        let failed = |source: reqwest::Error| Error::Ask { host: question.host.into(), source };
        Ok(answer.map_err(failed)?.status() == StatusCode::OK)
    }
}

/// The header, marked so that nothing prints it.
fn authorization(text: &str) -> Option<HeaderValue> {
    let (scheme, value) = text.split_once(' ')?;
    let known = scheme.eq_ignore_ascii_case("basic") || scheme.eq_ignore_ascii_case("bearer");
    let plain = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic());
    if !known || !plain || text.len() > MAX_AUTHORIZATION {
        return None;
    }
    let mut header = HeaderValue::from_str(text).ok()?;
    header.set_sensitive(true);
    Some(header)
}

fn tls(ca_files: &[PathBuf]) -> Result<ClientConfig, Error> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    for path in ca_files {
        roots.add_parsable_certificates(certificates(path)?);
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(Error::Tls)?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|source| Error::Authorities { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asks_where_the_registry_is() {
        let registries = Registries::new(["r.example:5000".to_owned()], &[]).unwrap();
        for (host, repository, manifest, expected) in [
            (
                "docker.io",
                "library/a",
                None,
                "https://registry-1.docker.io/v2/library/a/tags/list?n=1",
            ),
            ("ghcr.io", "a/b", Some("latest"), "https://ghcr.io/v2/a/b/manifests/latest"),
            ("r.example:5000", "a", None, "http://r.example:5000/v2/a/tags/list?n=1"),
            ("r.example:5001", "a", None, "https://r.example:5001/v2/a/tags/list?n=1"),
        ] {
            let question = Question { host, repository, manifest, authorization: "" };
            assert_eq!(registries.url(&question), expected);
        }
    }

    #[test]
    fn credentials_are_basic_or_bearer_and_stay_secret() {
        for good in ["Basic dTpw", "Bearer ey.J-_", "bearer x"] {
            let header = authorization(good).unwrap();
            assert_eq!(format!("{header:?}"), "Sensitive");
        }
        let long = format!("Bearer {}", "x".repeat(MAX_AUTHORIZATION));
        for bad in ["", "Basic", "Basic ", "Digest x", "Basic a\r\nHost: b", "Basic a b", &long] {
            assert!(authorization(bad).is_none(), "{bad:?}");
        }
    }
}
