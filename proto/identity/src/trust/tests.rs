//! Which certificates pass, row by row.

use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};

use super::*;
use crate::{Authority, Key, Role};
use proptest::prelude::{any, prop_assert, proptest};

const NOW: i64 = 1_800_000_000;
const HOUR: i64 = 3600;

fn membership(peer: PeerId) -> Membership {
    Membership {
        peer,
        cluster: "c1".to_owned(),
        zone: "z/ä 1".to_owned(),
        role: Role::Seed,
        not_before: NOW - 60,
        not_after: NOW + HOUR,
    }
}

fn trusting(authority: &Authority) -> Trust {
    let trust = Trust::new(Duration::from_secs(24 * 3600));
    trust.set_authority("c1", authority.certificate_der()).unwrap();
    trust
}

#[test]
fn a_certificate_states_what_was_issued() {
    let authority = Authority::create("c1", NOW).unwrap();
    let key = Key::generate().unwrap();
    let issued = membership(key.peer());
    let der = authority.issue(&issued).unwrap();
    assert!(der.len() < 600, "{}", der.len());
    let trust = trusting(&authority);
    for _ in 0..2 {
        assert_eq!(trust.check(&der, NOW).unwrap(), issued);
    }
}

#[test]
fn time_grace_and_blocking_are_looked_at_every_time() {
    let authority = Authority::create("c1", NOW).unwrap();
    let peer = Key::generate().unwrap().peer();
    let der = authority.issue(&membership(peer)).unwrap();
    let trust = trusting(&authority);
    for (now, expected) in [
        (NOW, "ok"),
        (NOW - 60 - SKEW_S, "ok"),
        (NOW - 61 - SKEW_S, "not yet"),
        (i64::MIN, "not yet"),
        (NOW + HOUR, "ok"),
        (NOW + HOUR + 24 * HOUR, "ok"),
        (NOW + HOUR + 24 * HOUR + 1, "expired"),
        (i64::MAX, "expired"),
    ] {
        let actual = match trust.check(&der, now) {
            Ok(membership) => {
                assert_eq!(membership.is_current(now), (NOW - 60..=NOW + HOUR).contains(&now));
                "ok"
            }
            Err(Error::NotYet { .. }) => "not yet",
            Err(Error::Expired { .. }) => "expired",
            Err(other) => panic!("{now}: {other}"),
        };
        assert_eq!(actual, expected, "{now}");
    }
    trust.block(peer);
    assert!(matches!(trust.check(&der, NOW), Err(Error::Blocked { .. })));
    trust.set_blocked([]);
    trust.check(&der, NOW).unwrap();
}

#[test]
fn other_clusters_and_other_authorities_are_refused() {
    let (mine, other) =
        (Authority::create("c1", NOW).unwrap(), Authority::create("c1", NOW).unwrap());
    let peer = Key::generate().unwrap().peer();
    let trust = trusting(&mine);
    // An authority can't speak for a cluster that isn't its own.
    let der = other.issue(&membership(peer)).unwrap();
    assert!(matches!(trust.check(&der, NOW), Err(Error::Signature { .. })));
    let elsewhere = Membership { cluster: "c2".to_owned(), ..membership(peer) };
    let der = mine.issue(&elsewhere).unwrap();
    assert!(matches!(trust.check(&der, NOW), Err(Error::Cluster { .. })));
    trust.set_authority("c2", other.certificate_der()).unwrap();
    assert!(matches!(trust.check(&der, NOW), Err(Error::Signature { .. })));

    // What was remembered goes with its authority.
    let der = mine.issue(&membership(peer)).unwrap();
    trust.check(&der, NOW).unwrap();
    trust.set_authority("c1", other.certificate_der()).unwrap();
    assert!(matches!(trust.check(&der, NOW), Err(Error::Signature { .. })));
    trust.remove_authority("c1");
    assert!(matches!(trust.check(&der, NOW), Err(Error::Cluster { .. })));
}

/// A certificate made by hand: the alternative names, the subject's key and the signer's are free.
fn by_hand(uris: &[&str], subject: &KeyPair, signer: KeyPair, ca: bool) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params.clone(), signer).unwrap();
    if !ca {
        params.is_ca = IsCa::NoCa;
    }
    params.subject_alt_names =
        uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.signed_by(subject, &issuer).unwrap().der().to_vec()
}

#[test]
fn only_the_exact_form_is_accepted() {
    let authority = Authority::create("c1", NOW).unwrap();
    let (key, other) = (Key::generate().unwrap(), Key::generate().unwrap());
    let trust = trusting(&authority);
    let uri = membership(key.peer()).to_uri().unwrap();
    let signer = || Key::from_pkcs8(authority.key_pkcs8()).unwrap().rcgen_pair().unwrap();
    let (subject, another) = (key.rcgen_pair().unwrap(), other.rcgen_pair().unwrap());
    let p256 = || KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let admin = uri.replace("role=seed", "role=admin");
    for (what, der, expected) in [
        ("right", by_hand(&[&uri], &subject, signer(), false), None),
        ("role", by_hand(&[&admin], &subject, signer(), false), Some(certificate::Error::Name)),
        (
            "names",
            by_hand(&[&uri, &uri], &subject, signer(), false),
            Some(certificate::Error::Name),
        ),
        ("no name", by_hand(&[], &subject, signer(), false), Some(certificate::Error::Name)),
        ("key", by_hand(&[&uri], &another, signer(), false), Some(certificate::Error::Peer)),
        ("CA", by_hand(&[&uri], &subject, signer(), true), Some(certificate::Error::Authority)),
        (
            "P-256 key",
            by_hand(&[&uri], &p256(), signer(), false),
            Some(certificate::Error::Algorithm),
        ),
        (
            "P-256 signer",
            by_hand(&[&uri], &subject, p256(), false),
            Some(certificate::Error::Algorithm),
        ),
    ] {
        match (trust.check(&der, NOW), expected) {
            (Ok(_), None) => {}
            (Err(Error::Certificate(actual)), Some(expected)) => {
                assert_eq!(actual, expected, "{what}")
            }
            (other, _) => panic!("{what}: {other:?}"),
        }
    }
    assert!(matches!(
        trust.set_authority("c3", &by_hand(&[&uri], &subject, signer(), false)),
        Err(Error::NotAuthority { .. })
    ));
}

#[test]
fn what_is_remembered_is_bounded() {
    let authority = Authority::create("c1", NOW).unwrap();
    let trust = trusting(&authority);
    {
        let mut state = trust.state.write().unwrap();
        let filler = membership(Key::generate().unwrap().peer());
        for n in 0..REMEMBERED as u64 {
            let mut sum = [0; 32];
            sum[..8].copy_from_slice(&n.to_le_bytes());
            state.signed.insert(sum, filler.clone());
        }
    }
    let der = authority.issue(&membership(Key::generate().unwrap().peer())).unwrap();
    trust.check(&der, NOW).unwrap();
    assert_eq!(trust.state.read().unwrap().signed.len(), 1);
}

proptest! {
    #[test]
    fn no_changed_byte_changes_what_is_believed(at in any::<proptest::sample::Index>(), flip in 1..=255u8) {
        let authority = Authority::create("c1", NOW).unwrap();
        let issued = membership(Key::generate().unwrap().peer());
        let mut der = authority.issue(&issued).unwrap();
        let at = at.index(der.len());
        der[at] ^= flip;
        // The parser is lenient about the outermost tag, which isn't signed.
        let read = trusting(&authority).check(&der, NOW);
        prop_assert!(read.is_err() || read.is_ok_and(|read| read == issued));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
        let trust = Trust::new(Duration::ZERO);
        prop_assert!(trust.check(&bytes, NOW).is_err());
        prop_assert!(trust.set_authority("c", &bytes).is_err());
        prop_assert!(trust.check_grant("c", &bytes, NOW).is_err());
    }
}
