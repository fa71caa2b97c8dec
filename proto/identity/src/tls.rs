//! TLS 1.3 for the swarm and for gRPC: AES-128-GCM first, our own certificate checks, no resumption
//! (a resumed session would skip them).
//!
//! | who | shows | checks |
//! |---|---|---|
//! | swarm, both ends | its membership | the other's membership, of the same cluster |
//! | gRPC server | a certificate of the control plane's authority, and the authority's | the client's membership of any cluster it knows, if it shows one |
//! | gRPC client | its membership, if it has one | that the authority shown has the known fingerprint and signed the server |
//!
//! Certificates that ended within the grace period pass the handshake: whoever needs a current one
//! asks [`Membership::is_current`].

mod verify;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};

use crate::certificate::{self, Membership};
use crate::{Authority, Key, Trust, authority};
use verify::{ControlPlane, Members};

/// What swarm connections are for; keeps them apart from any other use of the same certificates.
const SWARM_ALPN: &[u8] = b"skimmer-swarm/1";
const GRPC_ALPN: &[u8] = b"h2";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("use the membership certificate")]
    Certificate(#[source] certificate::Error),
    #[error("use the membership certificate: it is for another node's key")]
    Mismatch,
    #[error("make a TLS configuration")]
    Tls(#[source] rustls::Error),
    #[error("make the control plane's server certificate")]
    Server(#[source] authority::Error),
}

/// A node's key with its current membership certificate. Renewal replaces the certificate in place;
/// connections made afterwards show the new one.
pub struct Credentials {
    key: Key,
    current: RwLock<Current>,
}

struct Current {
    der: Arc<[u8]>,
    membership: Membership,
    certified: Arc<CertifiedKey>,
}

impl Credentials {
    /// `certificate` (DER) must be for `key`; who signed it isn't looked at.
    pub fn new(key: Key, certificate: &[u8]) -> Result<Arc<Self>, Error> {
        let current = RwLock::new(Current::new(&key, certificate)?);
        Ok(Arc::new(Self { key, current }))
    }

    pub fn set_certificate(&self, certificate: &[u8]) -> Result<(), Error> {
        let next = Current::new(&self.key, certificate)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }

    pub const fn key(&self) -> &Key {
        &self.key
    }

    /// DER.
    pub fn certificate(&self) -> Arc<[u8]> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).der)
    }

    pub fn membership(&self) -> Membership {
        self.current.read().unwrap_or_else(PoisonError::into_inner).membership.clone()
    }

    fn certified(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).certified)
    }
}

impl Current {
    fn new(key: &Key, der: &[u8]) -> Result<Self, Error> {
        let membership = certificate::read(der).map_err(Error::Certificate)?.membership;
        if membership.peer != key.peer() {
            return Err(Error::Mismatch);
        }
        let chain = vec![CertificateDer::from(der.to_vec())];
        let certified = CertifiedKey::from_der(chain, key.private_key(), &provider());
        let certified = Arc::new(certified.map_err(Error::Tls)?);
        Ok(Self { der: der.into(), membership, certified })
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials of {}", self.key.peer())
    }
}

impl ResolvesServerCert for Credentials {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified())
    }
}

impl ResolvesClientCert for Credentials {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.certified())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// For a swarm's listener.
pub fn swarm_server(
    credentials: Arc<Credentials>,
    trust: Arc<Trust>,
) -> Result<Arc<ServerConfig>, Error> {
    let members = Members::of(trust, credentials.membership().cluster);
    server(members, credentials, SWARM_ALPN)
}

/// For a swarm's dialler. The name that it dials is [`any_name`]: the certificate tells who answers.
pub fn swarm_client(
    credentials: Arc<Credentials>,
    trust: Arc<Trust>,
) -> Result<Arc<ClientConfig>, Error> {
    let members = Members::of(trust, credentials.membership().cluster);
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(Error::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(members);
    Ok(finish_client(builder.with_client_cert_resolver(credentials), SWARM_ALPN))
}

/// For the control plane's gRPC listeners. `certificate` and `key` come of [`Authority::issue_server`],
/// `authority` is the certificate (DER) of the one that issued them.
pub fn control_server(
    certificate: Vec<u8>,
    key: Vec<u8>,
    authority: &[u8],
    trust: Arc<Trust>,
) -> Result<Arc<ServerConfig>, Error> {
    let chain = [certificate, authority.to_vec()].map(CertificateDer::from).to_vec();
    let key = PrivatePkcs8KeyDer::from(key).into();
    let certified = CertifiedKey::from_der(chain, key, &provider()).map_err(Error::Tls)?;
    server(Members::of_any(trust), Arc::new(SingleCertAndKey::from(certified)), GRPC_ALPN)
}

/// The same for a server that makes its certificate when it starts.
pub fn control_server_of(
    authority: &Authority,
    names: &[String],
    now: i64,
    lifetime: std::time::Duration,
    trust: Arc<Trust>,
) -> Result<Arc<ServerConfig>, Error> {
    let (certificate, key) = authority.issue_server(names, now, lifetime).map_err(Error::Server)?;
    control_server(certificate, key, authority.certificate_der(), trust)
}

/// For a node's gRPC connections. `fingerprint`: of the control plane's authority, from the join token.
pub fn control_client(
    fingerprint: [u8; 32],
    credentials: Option<Arc<Credentials>>,
) -> Result<Arc<ClientConfig>, Error> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(Error::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(ControlPlane::of(fingerprint));
    let config = match credentials {
        Some(credentials) => builder.with_client_cert_resolver(credentials),
        None => builder.with_no_client_auth(),
    };
    Ok(finish_client(config, GRPC_ALPN))
}

/// The server name to hand to a connector; nothing is concluded from names.
pub fn any_name() -> ServerName<'static> {
    ServerName::from(IpAddr::from(Ipv4Addr::UNSPECIFIED))
}

fn server(
    members: Arc<Members>,
    credentials: Arc<dyn ResolvesServerCert>,
    alpn: &[u8],
) -> Result<Arc<ServerConfig>, Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(Error::Tls)?
        .with_client_cert_verifier(members)
        .with_cert_resolver(credentials);
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(Arc::new(config))
}

fn finish_client(mut config: ClientConfig, alpn: &[u8]) -> Arc<ClientConfig> {
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![alpn.to_vec()];
    config.enable_sni = false;
    Arc::new(config)
}

/// Two suites: AES-128-GCM takes half of the CPU time of the other where the processor has AES.
fn provider() -> Arc<CryptoProvider> {
    let cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() })
}

#[cfg(test)]
mod tests;
