//! One HTTP client per distinct TLS configuration, so that connections are shared where they may be.
//!
//! Owns: the clients, their connection pools and the system's root certificates. HTTP/1.1 only: the
//! ranges of a blob are to travel over several connections, and HTTP/2 would put them on one.

mod verify;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use reqwest::{Client, Url};
use rustls::client::{ResolvesClientCert, VerifierBuilderError};
use rustls::crypto::{CryptoProvider, ring};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use self::verify::Verifier;
use crate::origin::is_local;

const CLIENTS: usize = 64;
const IDLE: Duration = Duration::from_secs(60);

/// What hosts.toml says about an endpoint's TLS, as the bytes of the PEM files. No `Debug`: it
/// holds private keys.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Material {
    /// Authorities beside the system's.
    pub authorities: Vec<Vec<u8>>,
    /// Certificate chain and key.
    pub clients: Vec<(Vec<u8>, Vec<u8>)>,
    pub skip_verify: bool,
}

impl Material {
    /// For a host to which a redirect leads: the same trust, but it must not see who we are.
    pub fn anonymous(&self) -> Self {
        Self { clients: Vec::new(), ..self.clone() }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("a `ca` file named in hosts.toml holds no certificate that can be read (PEM expected)")]
    Authority(#[source] Option<rustls::Error>),
    #[error("a `client` file named in hosts.toml holds no certificate with its key (PEM expected)")]
    ClientCertificate(#[source] Option<rustls::Error>),
    #[error("set up TLS")]
    Setup(#[source] rustls::Error),
    #[error("set up the verification of certificates")]
    Verifier(#[source] VerifierBuilderError),
    #[error("set up an HTTP client")]
    Client(#[source] reqwest::Error),
}

/// What every client has in common.
#[derive(Clone, Debug)]
pub struct Settings {
    pub user_agent: String,
    pub connect_timeout: Duration,
    /// Connections kept open to one host while idle.
    pub idle_per_host: usize,
}

pub struct Clients {
    settings: Settings,
    made: Mutex<HashMap<(Material, bool), Client>>,
    system: OnceLock<Vec<CertificateDer<'static>>>,
}

impl Clients {
    pub fn new(settings: Settings) -> Self {
        Self { settings, made: Mutex::default(), system: OnceLock::new() }
    }

    /// The client for a request to `url` with `material`. The environment's proxies are for the way
    /// off this machine only.
    pub fn for_url(&self, material: &Material, url: &Url) -> Result<Client, Error> {
        let direct = is_local(url.host_str().unwrap_or_default());
        let key = (material.clone(), direct);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = made.get(&key) {
            return Ok(client.clone());
        }
        let mut builder = Client::builder()
            .tls_backend_preconfigured(self.tls(material)?)
            .http1_only()
            .user_agent(&self.settings.user_agent)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(self.settings.connect_timeout)
            .pool_max_idle_per_host(self.settings.idle_per_host)
            .pool_idle_timeout(IDLE)
            .tcp_keepalive(IDLE);
        if direct {
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(Error::Client)?;
        if made.len() >= CLIENTS {
            made.clear();
        }
        made.insert(key, client.clone());
        Ok(client)
    }

    fn tls(&self, material: &Material) -> Result<ClientConfig, Error> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(Error::Setup)?;
        let verifier = if material.skip_verify {
            Verifier::of_anybody(Arc::clone(&provider))
        } else {
            let named = authorities(material)?;
            Verifier::of_named(Arc::clone(&provider), &self.system(), named)?
        };
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = if material.clients.is_empty() {
            builder.with_no_client_auth()
        } else {
            builder.with_client_cert_resolver(Arc::new(Identities::new(material, &provider)?))
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    fn system(&self) -> Vec<CertificateDer<'static>> {
        let system = self.system.get_or_init(|| {
            let loaded = rustls_native_certs::load_native_certs();
            if loaded.certs.is_empty() {
                tracing::warn!(
                    errors = ?loaded.errors,
                    "the system has no root certificates: install the package ca-certificates"
                );
            }
            loaded.certs
        });
        system.clone()
    }
}

fn authorities(material: &Material) -> Result<Vec<CertificateDer<'static>>, Error> {
    let mut all = Vec::new();
    for pem in &material.authorities {
        let before = all.len();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            all.push(certificate.map_err(|_| Error::Authority(None))?);
        }
        if all.len() == before {
            return Err(Error::Authority(None));
        }
    }
    Ok(all)
}

/// The client certificates of an endpoint; the first that the server can check is presented.
#[derive(Debug)]
struct Identities(Vec<Arc<CertifiedKey>>);

impl Identities {
    fn new(material: &Material, provider: &CryptoProvider) -> Result<Self, Error> {
        let mut keys = Vec::new();
        for (certificate, key) in &material.clients {
            let chain = CertificateDer::pem_slice_iter(certificate)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| Error::ClientCertificate(None))?;
            let key =
                PrivateKeyDer::from_pem_slice(key).map_err(|_| Error::ClientCertificate(None))?;
            let key = CertifiedKey::from_der(chain, key, provider)
                .map_err(|e| Error::ClientCertificate(Some(e)))?;
            keys.push(Arc::new(key));
        }
        Ok(Self(keys))
    }
}

impl ResolvesClientCert for Identities {
    fn resolve(
        &self,
        _authorities: &[&[u8]],
        schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        self.0.iter().find(|key| key.key.choose_scheme(schemes).is_some()).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}
