//! Membership certificates: what they say and how they say it.
//!
//! X.509, Ed25519 throughout, signed by the cluster's authority. The subject's key *is* the node's
//! key. The only alternative name is a URI,
//! `skimmer://<cluster>/<peer id>?role=peer|seed|scheduler&zone=<zone>`, with every byte of the zone outside
//! `A-Z a-z 0-9 - . _ ~` written `%XX`. There is one spelling: what isn't spelled so is refused.

use std::fmt::Write as _;

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::OID_SIG_ED25519;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::{AlgorithmIdentifier, SubjectPublicKeyInfo};

use crate::PeerId;

/// The largest certificate that is looked at, in bytes.
pub const MAX_CERTIFICATE: usize = 4 << 10;

/// Bytes of a cluster's id and of a zone.
const MAX_CLUSTER: usize = 64;
const MAX_ZONE: usize = 128;

const SCHEME: &str = "skimmer://";

/// What a node is to its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Peer,
    /// Trusted to index; told to fetch first.
    Seed,
    /// A scheduler, which speaks for the nodes that attend at it; no part of the swarm.
    Scheduler,
}

impl Role {
    const ALL: [Self; 3] = [Self::Peer, Self::Seed, Self::Scheduler];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Seed => "seed",
            Self::Scheduler => "scheduler",
        }
    }
}

/// A node's place in a cluster, as its certificate states it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Membership {
    pub peer: PeerId,
    /// The cluster's id: 1 to 64 of `A-Z a-z 0-9 - . _`.
    pub cluster: String,
    /// At most 128 bytes without control characters; empty: unknown.
    pub zone: String,
    pub role: Role,
    /// Unix seconds, both inclusive.
    pub not_before: i64,
    pub not_after: i64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("the certificate isn't X.509 of at most {MAX_CERTIFICATE} bytes")]
    Form,
    #[error("the certificate or its key isn't Ed25519")]
    Algorithm,
    #[error("the certificate is one of an authority, not of a node")]
    Authority,
    #[error("the certificate's name isn't skimmer://<cluster>/<peer id>?role=…&zone=…")]
    Name,
    #[error("the certificate names another peer than the one whose key it holds")]
    Peer,
    #[error("{0:?} can't be a cluster's id: 1 to {MAX_CLUSTER} letters, digits, '-', '.', '_'")]
    Cluster(String),
    #[error("{0:?} can't be a zone: at most {MAX_ZONE} bytes, no control characters")]
    Zone(String),
}

impl Membership {
    /// Whether the certificate covers `now` (Unix seconds), without any grace.
    pub const fn is_current(&self, now: i64) -> bool {
        self.not_before <= now && now <= self.not_after
    }

    /// The alternative name that states it; refuses what couldn't be read back.
    pub fn to_uri(&self) -> Result<String, Error> {
        if !is_cluster_id(&self.cluster) {
            return Err(Error::Cluster(self.cluster.clone()));
        }
        if !is_zone(&self.zone) {
            return Err(Error::Zone(self.zone.clone()));
        }
        let mut uri =
            format!("{SCHEME}{}/{}?role={}&zone=", self.cluster, self.peer, self.role.name());
        for byte in self.zone.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                uri.push(char::from(byte));
            } else {
                // Writing to a string can't fail.
                let _ = write!(uri, "%{byte:02X}");
            }
        }
        Ok(uri)
    }

    fn from_uri(uri: &str, not_before: i64, not_after: i64) -> Option<Self> {
        let (cluster, rest) = uri.strip_prefix(SCHEME)?.split_once('/')?;
        let (peer, rest) = rest.split_once("?role=")?;
        let (role, zone) = rest.split_once("&zone=")?;
        let role = Role::ALL.into_iter().find(|known| known.name() == role)?;
        let (peer, zone) = (peer.parse().ok()?, unescape(zone)?);
        let read = Self { peer, cluster: cluster.to_owned(), zone, role, not_before, not_after };
        // One spelling for one meaning.
        (read.to_uri().ok()? == uri).then_some(read)
    }
}

/// Whether `id` can name a cluster.
pub fn is_cluster_id(id: &str) -> bool {
    (1..=MAX_CLUSTER).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

/// Whether `zone` can name a zone.
pub fn is_zone(zone: &str) -> bool {
    zone.len() <= MAX_ZONE && !zone.chars().any(char::is_control)
}

fn unescape(text: &str) -> Option<String> {
    if text.len() > 3 * MAX_ZONE {
        return None;
    }
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// A certificate whose form has been checked, and whose signature has not.
pub(crate) struct Unproved<'a> {
    pub membership: Membership,
    pub x509: X509Certificate<'a>,
}

/// Whether the holder of this Ed25519 key signed the certificate.
pub(crate) fn is_signed_by(certificate: &X509Certificate<'_>, authority: &[u8; 32]) -> bool {
    is_ed25519(&certificate.signature_algorithm)
        && PeerId::from_public_key(*authority)
            .has_signed(certificate.tbs_certificate.as_ref(), &certificate.signature_value.data)
}

/// Any certificate of an Ed25519 key, and the key.
pub(crate) fn parse(der: &[u8]) -> Result<(X509Certificate<'_>, [u8; 32]), Error> {
    if der.len() > MAX_CERTIFICATE {
        return Err(Error::Form);
    }
    let (rest, x509) = X509Certificate::from_der(der).map_err(|_| Error::Form)?;
    if !rest.is_empty() {
        return Err(Error::Form);
    }
    if !is_ed25519(&x509.signature_algorithm) || !is_ed25519(&x509.tbs_certificate.signature) {
        return Err(Error::Algorithm);
    }
    let key = ed25519_key(x509.public_key()).ok_or(Error::Algorithm)?;
    Ok((x509, key))
}

/// Reads a membership certificate from outside.
pub(crate) fn read(der: &[u8]) -> Result<Unproved<'_>, Error> {
    let (x509, key) = parse(der)?;
    // Also if the constraint is there twice, hence ambiguous.
    if !x509.basic_constraints().is_ok_and(|found| found.is_none_or(|found| !found.value.ca)) {
        return Err(Error::Authority);
    }
    let validity = x509.validity();
    let (not_before, not_after) = (validity.not_before.timestamp(), validity.not_after.timestamp());
    let names = x509.subject_alternative_name().ok().flatten().ok_or(Error::Name)?;
    let [GeneralName::URI(uri)] = names.value.general_names.as_slice() else {
        return Err(Error::Name);
    };
    let membership = Membership::from_uri(uri, not_before, not_after).ok_or(Error::Name)?;
    if *membership.peer.public_key() != key {
        return Err(Error::Peer);
    }
    Ok(Unproved { membership, x509 })
}

/// RFC 8410: the algorithm has no parameters.
pub(crate) fn is_ed25519(algorithm: &AlgorithmIdentifier<'_>) -> bool {
    algorithm.algorithm == OID_SIG_ED25519 && algorithm.parameters.is_none()
}

pub(crate) fn ed25519_key(info: &SubjectPublicKeyInfo<'_>) -> Option<[u8; 32]> {
    let key = &info.subject_public_key;
    if !is_ed25519(&info.algorithm) || key.unused_bits != 0 {
        return None;
    }
    key.data.as_ref().try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    fn membership(cluster: &str, zone: &str, role: Role) -> Membership {
        let peer = PeerId::from_public_key([7; 32]);
        let (cluster, zone) = (cluster.to_owned(), zone.to_owned());
        Membership { peer, cluster, zone, role, not_before: 1, not_after: 2 }
    }

    #[test]
    fn names_have_one_spelling() {
        let uri = membership("c1", "eu west/1", Role::Seed).to_uri().unwrap();
        let peer = PeerId::from_public_key([7; 32]);
        assert_eq!(uri, format!("skimmer://c1/{peer}?role=seed&zone=eu%20west%2F1"));
        assert!(Membership::from_uri(&uri, 1, 2).is_some());
        for (from, to) in [
            ("seed", "admin"),
            ("seed", "Seed"),
            ("seed", ""),
            ("skimmer:", "https:"),
            ("c1/", "/"),
            ("c1/", "c1//"),
            ("c1/", "c/1/"),
            ("%2F", "%2f"),
            ("%2F", "/"),
            ("%20", "%2"),
            ("%20", "%+1"),
            ("%20", "%00"),
            ("eu", "%65u"),
            ("&zone", "&role=peer&zone"),
            ("?role=seed&zone=", "?zone=&role=seed"),
        ] {
            let changed = uri.replacen(from, to, 1);
            assert_ne!(changed, uri);
            assert_eq!(Membership::from_uri(&changed, 1, 2), None, "{changed}");
        }
    }

    #[test]
    fn what_cannot_be_read_back_is_not_written() {
        let long = "x".repeat(200);
        for (cluster, zone) in
            [("", ""), ("a/b", ""), ("a?", ""), (&*long, ""), ("a", &*long), ("a", "\n")]
        {
            assert!(
                membership(cluster, zone, Role::Peer).to_uri().is_err(),
                "{cluster:?} {zone:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn names_return(cluster in "[A-Za-z0-9._-]{1,64}", zone in "[^\\p{Cc}]{0,32}", role in proptest::sample::select(&Role::ALL)) {
            let membership = membership(&cluster, &zone, role);
            let uri = membership.to_uri().unwrap();
            prop_assert_eq!(Membership::from_uri(&uri, 1, 2), Some(membership));
        }

        #[test]
        fn arbitrary_input_never_panics(uri in "(skimmer://)?.{0,100}", bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            prop_assert!(Membership::from_uri(&uri, 0, 0).is_none_or(|m| m.to_uri() == Ok(uri)));
            prop_assert!(read(&bytes).is_err());
        }
    }
}
