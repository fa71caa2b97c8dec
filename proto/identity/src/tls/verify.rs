//! Our certificate checks in the form that rustls asks for.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerMisbehaved,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::authority::fingerprint;
use crate::{Role, Trust, certificate};

/// What every verifier here says of handshakes: they are TLS 1.3, signed with Ed25519.
macro_rules! only_ed25519 {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(tls12())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            ed25519(message, certificate, signed)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }
    };
}

/// Accepts members of one cluster, or of any that is trusted.
#[derive(Debug)]
pub struct Members {
    trust: Arc<Trust>,
    cluster: Option<String>,
}

impl Members {
    /// Everyone must show a certificate of `cluster`.
    pub fn of(trust: Arc<Trust>, cluster: String) -> Arc<Self> {
        Arc::new(Self { trust, cluster: Some(cluster) })
    }

    /// A certificate may be shown; it may be of any known cluster.
    pub fn of_any(trust: Arc<Trust>) -> Arc<Self> {
        Arc::new(Self { trust, cluster: None })
    }

    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        if !rest.is_empty() {
            return Err(refused(Refused::Chain));
        }
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let membership = self.trust.check(leaf, now).map_err(refused)?;
        match &self.cluster {
            Some(cluster) if *cluster != membership.cluster => Err(refused(Refused::Cluster)),
            Some(_) if membership.role == Role::Scheduler => Err(refused(Refused::Role)),
            _ => Ok(()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("a membership certificate comes alone, not in a chain")]
    Chain,
    #[error("the peer is of another cluster")]
    Cluster,
    #[error("the peer is a scheduler, which has no place in a swarm")]
    Role,
    #[error("the server's certificate isn't followed by its authority's")]
    NoAuthority,
    #[error(
        "the server's authority isn't the one that the join token names; is control_plane.address right?"
    )]
    Fingerprint,
    #[error("the server's certificate isn't signed by the authority that it shows")]
    Signature,
    #[error("the server's certificate isn't for a server")]
    Purpose,
    #[error("the server's certificate has ended or hasn't begun; compare the clocks")]
    Validity,
}

fn refused(reason: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(reason))))
}

impl ServerCertVerifier for Members {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(leaf, rest, now).map(|()| ServerCertVerified::assertion())
    }

    only_ed25519!();
}

impl ClientCertVerifier for Members {
    fn client_auth_mandatory(&self) -> bool {
        self.cluster.is_some()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(leaf, rest, now).map(|()| ClientCertVerified::assertion())
    }

    only_ed25519!();
}

/// Accepts servers of the authority with a known fingerprint.
#[derive(Debug)]
pub struct ControlPlane {
    fingerprint: [u8; 32],
}

impl ControlPlane {
    pub fn of(fingerprint: [u8; 32]) -> Arc<Self> {
        Arc::new(Self { fingerprint })
    }
}

impl ServerCertVerifier for ControlPlane {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let [authority] = rest else { return Err(refused(Refused::NoAuthority)) };
        if fingerprint(authority) != self.fingerprint {
            return Err(refused(Refused::Fingerprint));
        }
        let (_, key) = certificate::parse(authority).map_err(refused)?;
        let (leaf, _) = certificate::parse(leaf).map_err(refused)?;
        if !certificate::is_signed_by(&leaf, &key) {
            return Err(refused(Refused::Signature));
        }
        let purposes = leaf.extended_key_usage().ok().flatten();
        if leaf.is_ca() || !purposes.is_some_and(|purposes| purposes.value.server_auth) {
            return Err(refused(Refused::Purpose));
        }
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let validity = leaf.validity();
        if !(validity.not_before.timestamp()..=validity.not_after.timestamp()).contains(&now) {
            return Err(refused(Refused::Validity));
        }
        Ok(ServerCertVerified::assertion())
    }

    only_ed25519!();
}

/// TLS 1.2 is never negotiated, so its signatures are never right.
fn tls12() -> Error {
    PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into()
}

fn ed25519(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    if signed.scheme != SignatureScheme::ED25519 {
        return Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into());
    }
    let algorithms: WebPkiSupportedAlgorithms =
        ring::default_provider().signature_verification_algorithms;
    verify_tls13_signature(message, certificate, signed, &algorithms)
}
