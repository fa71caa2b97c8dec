//! Whether a server's certificate will do.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::Error;

/// Checks servers' certificates by one of two rules.
#[derive(Debug)]
pub struct Verifier {
    provider: Arc<CryptoProvider>,
    trust: Trust,
}

#[derive(Debug)]
enum Trust {
    /// `skip_verify = true`: any certificate will do. What is fetched is checked by its digest.
    Anybody,
    /// The usual rules, with one exception: a server may show a certificate that hosts.toml itself names as an
    /// authority, as self-made ones of private registries do. Go, and so containerd, allows that too.
    Named {
        /// `None`: there is no authority at all.
        usual: Option<Arc<WebPkiServerVerifier>>,
        authorities: Vec<CertificateDer<'static>>,
    },
}

impl Verifier {
    pub const fn of_anybody(provider: Arc<CryptoProvider>) -> Self {
        Self { provider, trust: Trust::Anybody }
    }

    /// `authorities` are those of hosts.toml, trusted beside those of the `system`.
    pub fn of_named(
        provider: Arc<CryptoProvider>,
        system: &[CertificateDer<'static>],
        authorities: Vec<CertificateDer<'static>>,
    ) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(system.iter().cloned());
        for authority in &authorities {
            roots.add(authority.clone()).map_err(|error| Error::Authority(Some(error)))?;
        }
        let build = |roots: RootCertStore| {
            let provider = Arc::clone(&provider);
            WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build()
        };
        // A node that only speaks HTTP needs no authority.
        let usual = (!roots.is_empty()).then(|| build(roots)).transpose();
        let usual = usual.map_err(Error::Verifier)?;
        Ok(Self { provider, trust: Trust::Named { usual, authorities } })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let (usual, authorities) = match &self.trust {
            Trust::Anybody => return Ok(ServerCertVerified::assertion()),
            Trust::Named { usual: Some(usual), authorities } => (usual, authorities),
            Trust::Named { usual: None, .. } => return Err(CertificateError::UnknownIssuer.into()),
        };
        let checked = usual.verify_server_cert(certificate, intermediates, name, ocsp, now);
        // Dates are looked at before the kind: what is refused as "an authority" is in time.
        let is_of_wrong_kind =
            matches!(&checked, Err(rustls::Error::InvalidCertificate(CertificateError::Other(_))));
        if is_of_wrong_kind && authorities.iter().any(|authority| authority == certificate) {
            verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
            return Ok(ServerCertVerified::assertion());
        }
        checked
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, date_time_ymd};
    use rustls::crypto::ring;

    use super::*;

    /// Self-signed for `registry.test`, good until the end of 2040 or of 2020.
    fn certificate(is_authority: bool, is_over: bool) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(["registry.test".to_owned()]).unwrap();
        params.not_before = date_time_ymd(2019, 1, 1);
        params.not_after = date_time_ymd(if is_over { 2020 } else { 2040 }, 12, 31);
        if is_authority {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().into()
    }

    fn check(shown: &CertificateDer<'_>, trusted: &CertificateDer<'static>, name: &str) -> bool {
        let provider = Arc::new(ring::default_provider());
        let named = Verifier::of_named(provider, &[], vec![trusted.clone()]).unwrap();
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(1_795_000_000));
        let name = name.to_owned().try_into().unwrap();
        named.verify_server_cert(shown, &[], &name, &[], now).is_ok()
    }

    #[test]
    fn a_server_may_show_the_authority_that_is_named() {
        for is_authority in [false, true] {
            let own = certificate(is_authority, false);
            assert!(check(&own, &own, "registry.test"), "an authority: {is_authority}");
            assert!(!check(&own, &own, "other.test"));
            assert!(!check(&own, &certificate(is_authority, false), "registry.test"));
            let over = certificate(is_authority, true);
            assert!(!check(&over, &over, "registry.test"), "an authority: {is_authority}");
        }
    }

    #[test]
    fn without_authorities_there_is_nobody_to_trust_but_http_works() {
        let provider = Arc::new(ring::default_provider());
        let nobody = Verifier::of_named(provider, &[], Vec::new()).unwrap();
        let (own, name) = (certificate(false, false), "registry.test".try_into().unwrap());
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(1_795_000_000));
        let checked = nobody.verify_server_cert(&own, &[], &name, &[], now);
        assert_eq!(checked.unwrap_err(), CertificateError::UnknownIssuer.into());
    }
}
