//! Certificate authorities: each cluster's own, and the control plane's, which signs its servers.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SanType, SignatureAlgorithm,
    date_time_ymd,
};
use ring::digest::{SHA256, digest};
use rustls_pki_types::CertificateDer;

use crate::PeerId;
use crate::certificate::{self, Membership};
use crate::key::{self, Key};

/// How long an authority's certificate runs. Nothing checks it: an authority is trusted by its key.
const LIFETIME: Duration = Duration::from_secs(20 * 365 * 24 * 3600);

/// The last second that X.509 can name, 9999-12-31T23:59:59Z.
const LAST_SECOND: i64 = 253_402_300_799;

/// An Ed25519 key and its self-signed certificate.
pub struct Authority {
    key: Key,
    certificate: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make the authority's key")]
    Key(#[source] key::Error),
    #[error("make a certificate for {subject}")]
    Make { subject: String, source: rcgen::Error },
    #[error("make a certificate for {subject}")]
    Name { subject: String, source: certificate::Error },
    #[error("load the authority's certificate")]
    Certificate(#[source] certificate::Error),
    #[error("load the authority: its certificate is for another key")]
    Mismatch,
}

impl Authority {
    /// A new authority. `name` is for people; `now` in Unix seconds.
    pub fn create(name: &str, now: i64) -> Result<Self, Error> {
        let key = Key::generate().map_err(Error::Key)?;
        let failed = |source| Error::Make { subject: format!("the authority {name}"), source };
        let mut params = params(name, now, now.saturating_add(seconds(LIFETIME)));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pair = key.rcgen_pair().map_err(failed)?;
        let certificate = params.self_signed(&pair).map_err(failed)?.der().to_vec();
        Ok(Self { key, certificate })
    }

    /// An authority that [`Self::key_pkcs8`] and [`Self::certificate_der`] were taken of.
    pub fn load(pkcs8: &[u8], certificate: &[u8]) -> Result<Self, Error> {
        let key = Key::from_pkcs8(pkcs8).map_err(Error::Key)?;
        let (_, public) = certificate::parse(certificate).map_err(Error::Certificate)?;
        if *key.peer().public_key() != public {
            return Err(Error::Mismatch);
        }
        Ok(Self { key, certificate: certificate.to_vec() })
    }

    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate
    }

    pub fn key_pkcs8(&self) -> &[u8] {
        self.key.pkcs8_der()
    }

    pub fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.certificate)
    }

    /// A membership certificate, DER. That `membership.peer` proved its key is the caller's to know.
    pub fn issue(&self, membership: &Membership) -> Result<Vec<u8>, Error> {
        let subject = membership.peer.to_string();
        let uri = membership
            .to_uri()
            .map_err(|source| Error::Name { subject: subject.clone(), source })?;
        let failed = |source| Error::Make { subject: subject.clone(), source };
        let mut params = params(&subject, membership.not_before, membership.not_after);
        params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(failed)?)];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        self.sign_certificate(params, membership.peer).map_err(failed)
    }

    /// A certificate (DER) for a gRPC server, with its key (PKCS#8). `names` are DNS names and IP
    /// addresses, for people: clients trust whatever this authority signs for servers.
    pub fn issue_server(
        &self,
        names: &[String],
        now: i64,
        lifetime: Duration,
    ) -> Result<(Vec<u8>, Vec<u8>), Error> {
        let key = Key::generate().map_err(Error::Key)?;
        let failed = |source| Error::Make { subject: "the control plane's server".into(), source };
        let mut params = params("skimmer-control", now, now.saturating_add(seconds(lifetime)));
        params.subject_alt_names = CertificateParams::new(names).map_err(failed)?.subject_alt_names;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = self.sign_certificate(params, key.peer()).map_err(failed)?;
        Ok((certificate, key.pkcs8_der().to_vec()))
    }

    /// Signs bytes that can't be taken for a certificate: see [`crate::Grant`].
    pub(crate) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.key.sign(message)
    }

    fn sign_certificate(
        &self,
        mut params: CertificateParams,
        subject: PeerId,
    ) -> Result<Vec<u8>, rcgen::Error> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let issuer = CertificateDer::from(self.certificate.as_slice());
        let issuer: Issuer<'_, KeyPair> =
            Issuer::from_ca_cert_der(&issuer, self.key.rcgen_pair()?)?;
        Ok(params.signed_by(&Subject(subject), &issuer)?.der().to_vec())
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

/// SHA-256 of a certificate's DER: what a join token names the control plane's authority by.
pub fn fingerprint(certificate: &[u8]) -> [u8; 32] {
    let mut sum = [0; 32];
    sum.copy_from_slice(digest(&SHA256, certificate).as_ref());
    sum
}

struct Subject(PeerId);

impl PublicKeyData for Subject {
    fn der_bytes(&self) -> &[u8] {
        self.0.public_key()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

fn params(name: &str, not_before: i64, not_after: i64) -> CertificateParams {
    let at = |second: i64| {
        let since = second.clamp(0, LAST_SECOND).unsigned_abs();
        date_time_ymd(1970, 1, 1) + Duration::from_secs(since)
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = at(not_before);
    params.not_after = at(not_after);
    params
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_is_loaded_from_its_own_parts_only() {
        let (one, two) =
            (Authority::create("one", 0).unwrap(), Authority::create("two", 0).unwrap());
        let again = Authority::load(one.key_pkcs8(), one.certificate_der()).unwrap();
        assert_eq!(again.fingerprint(), one.fingerprint());
        assert_ne!(two.fingerprint(), one.fingerprint());
        let mixed = Authority::load(one.key_pkcs8(), two.certificate_der());
        assert!(matches!(mixed, Err(Error::Mismatch)));
        assert!(matches!(Authority::load(b"", one.certificate_der()), Err(Error::Key(_))));
        assert!(matches!(Authority::load(one.key_pkcs8(), b""), Err(Error::Certificate(_))));
    }

    #[test]
    fn times_outside_of_x509_are_cut() {
        let authority = Authority::create("cluster", i64::MAX).unwrap();
        let membership = Membership {
            peer: Key::generate().unwrap().peer(),
            cluster: "c".into(),
            zone: String::new(),
            role: crate::Role::Peer,
            not_before: i64::MIN,
            not_after: i64::MAX,
        };
        let der = authority.issue(&membership).unwrap();
        let read = certificate::read(&der).unwrap().membership;
        assert_eq!((read.not_before, read.not_after), (0, LAST_SECOND));
    }
}
