//! Whether a server's certificate will do.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::Error;

/// The usual rules, with one exception: a server may show a certificate that hosts.toml itself names as an
/// authority, as self-made ones of private registries do. Go, and so containerd, allows that too.
#[derive(Debug)]
pub struct Named {
    usual: Arc<WebPkiServerVerifier>,
    authorities: Vec<CertificateDer<'static>>,
}

impl Named {
    /// `authorities` are those of hosts.toml, trusted beside those of the `system`.
    pub fn new(
        system: &[CertificateDer<'static>],
        authorities: Vec<CertificateDer<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(system.iter().cloned());
        for authority in &authorities {
            roots.add(authority.clone()).map_err(|error| Error::Authority(Some(error)))?;
        }
        let provider = Arc::clone(provider);
        let usual = WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build();
        Ok(Self { usual: usual.map_err(Error::Verifier)?, authorities })
    }
}

impl ServerCertVerifier for Named {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let usual = self.usual.verify_server_cert(certificate, intermediates, name, ocsp, now);
        // Dates are looked at before the kind: what is refused as "an authority" is in time.
        let is_of_wrong_kind =
            matches!(&usual, Err(rustls::Error::InvalidCertificate(CertificateError::Other(_))));
        if is_of_wrong_kind && self.authorities.iter().any(|authority| authority == certificate) {
            verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
            return Ok(ServerCertVerified::assertion());
        }
        usual
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

/// `skip_verify = true`: any certificate will do. What is fetched is checked by its digest.
#[derive(Debug)]
pub struct Unverified(pub Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
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
        let named = Named::new(&[], vec![trusted.clone()], &provider).unwrap();
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
}
