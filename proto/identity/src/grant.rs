//! Grants: the right of one node to read one repository's bytes from other nodes.
//!
//! The bytes, integers little-endian:
//! ```text
//!  0  "skimmer-grant-v1\0"           17
//! 17  public key of the peer         32
//! 49  last second it runs, Unix, i64  8
//! 57  length of the scope's name, u16 2
//! 59  name of the scope: host/repository, or nothing for public content
//!  …  Ed25519 signature of the cluster's authority over everything before it, 64
//! ```

use skimmer_proto::Scope;

use crate::{Authority, PeerId};

const MAGIC: &[u8; 17] = b"skimmer-grant-v1\0";

/// Bytes before the scope's name, and after it.
const HEADER: usize = 59;
const SIGNATURE: usize = 64;

/// The longest name of a scope, in bytes: a host and a repository are at most 255 each.
const MAX_SCOPE: usize = 512;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub peer: PeerId,
    pub scope: Scope,
    /// The last second it runs, Unix.
    pub expires_unix: i64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("it isn't a grant")]
    Form,
    #[error("it isn't signed by the cluster")]
    Signature,
    #[error("it ended at {expires_unix} and it is {now} (Unix seconds)")]
    Expired { expires_unix: i64, now: i64 },
    #[error("the name of the repository is longer than {MAX_SCOPE} bytes")]
    Scope,
}

impl Grant {
    /// The grant's bytes, signed by the authority of the peer's cluster.
    pub fn sign(&self, authority: &Authority) -> Result<Vec<u8>, Error> {
        let name = self.scope.name();
        let len = u16::try_from(name.len()).ok().filter(|len| usize::from(*len) <= MAX_SCOPE);
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(self.peer.public_key());
        bytes.extend_from_slice(&self.expires_unix.to_le_bytes());
        bytes.extend_from_slice(&len.ok_or(Error::Scope)?.to_le_bytes());
        bytes.extend_from_slice(name.as_bytes());
        let signature = authority.sign(&bytes);
        bytes.extend_from_slice(&signature);
        Ok(bytes)
    }

    /// Whether `peer` may read `scope` by it at `now`.
    pub fn covers(&self, peer: &PeerId, scope: &Scope, now: i64) -> bool {
        self.peer == *peer && self.scope == *scope && now <= self.expires_unix
    }

    /// Reads a grant from outside: it must be signed by `authority` and run at `now` (Unix seconds).
    pub(crate) fn check(bytes: &[u8], authority: &PeerId, now: i64) -> Result<Self, Error> {
        let (signed, signature) =
            bytes.split_at_checked(bytes.len().saturating_sub(SIGNATURE)).ok_or(Error::Form)?;
        let (header, name) = signed.split_at_checked(HEADER).ok_or(Error::Form)?;
        let rest = header.strip_prefix(MAGIC).ok_or(Error::Form)?;
        let (key, rest) = rest.split_first_chunk::<32>().ok_or(Error::Form)?;
        let (expires, rest) = rest.split_first_chunk::<8>().ok_or(Error::Form)?;
        let len = rest.try_into().map(u16::from_le_bytes).map_err(|_| Error::Form)?;
        if name.len() != usize::from(len) || name.len() > MAX_SCOPE {
            return Err(Error::Form);
        }
        let scope = Scope::from_name(std::str::from_utf8(name).map_err(|_| Error::Form)?);
        if !authority.has_signed(signed, signature) {
            return Err(Error::Signature);
        }
        let expires_unix = i64::from_le_bytes(*expires);
        if now > expires_unix {
            return Err(Error::Expired { expires_unix, now });
        }
        Ok(Self { peer: PeerId::from_public_key(*key), scope, expires_unix })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Key, Trust};
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    fn repository(name: &str) -> Scope {
        Scope::Repository(name.to_owned())
    }

    #[test]
    fn a_grant_is_for_one_peer_one_scope_and_a_time() {
        let authority = Authority::create("c", 0).unwrap();
        let other = Authority::create("c", 0).unwrap();
        let trust = Trust::new(Duration::ZERO);
        trust.set_authority("c", authority.certificate_der()).unwrap();
        let [peer, stranger] = [(); 2].map(|()| Key::generate().unwrap().peer());
        let scope = repository("registry:5000/team/app");
        for scope in [scope.clone(), Scope::Public] {
            let grant = Grant { peer, scope, expires_unix: 100 };
            let bytes = grant.sign(&authority).unwrap();
            assert_eq!(trust.check_grant("c", &bytes, 100).unwrap(), grant);
            assert!(trust.check_grant("c", &bytes, 101).is_err());
            assert!(trust.check_grant("d", &bytes, 100).is_err());
            let forged = grant.sign(&other).unwrap();
            assert!(trust.check_grant("c", &forged, 100).is_err());
        }
        let grant = Grant { peer, scope: scope.clone(), expires_unix: 100 };
        for (peer, scope, now, covered) in [
            (peer, scope.clone(), 100, true),
            (peer, scope.clone(), 101, false),
            (stranger, scope, 100, false),
            (peer, repository("registry:5000/team/app2"), 100, false),
            (peer, Scope::Public, 100, false),
        ] {
            assert_eq!(grant.covers(&peer, &scope, now), covered, "{scope:?} {now}");
        }
        let long = Grant { scope: repository(&"x".repeat(600)), ..grant };
        assert_eq!(long.sign(&authority), Err(Error::Scope));
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_noticed(at in any::<proptest::sample::Index>(), flip in 1..=255u8, name in "[a-z/]{0,40}") {
            let authority = Authority::create("c", 0).unwrap();
            let key = Key::from_pkcs8(authority.key_pkcs8()).unwrap().peer();
            let grant = Grant { peer: key, scope: Scope::from_name(&name), expires_unix: 5 };
            let mut bytes = grant.sign(&authority).unwrap();
            prop_assert_eq!(Grant::check(&bytes, &key, 5), Ok(grant));
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(Grant::check(&bytes, &key, i64::MIN).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let key = PeerId::from_public_key([1; 32]);
            let mut magic = MAGIC.to_vec();
            magic.extend_from_slice(&bytes);
            prop_assert!(Grant::check(&bytes, &key, 0).is_err());
            prop_assert!(Grant::check(&magic, &key, 0).is_err());
        }
    }
}
