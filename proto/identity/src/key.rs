//! A node's key pair, its file, and the requests for a certificate that prove it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ED25519};
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer as _;

use crate::PeerId;
use crate::certificate::{ed25519_key, is_ed25519};

/// The largest certificate request that is looked at, in bytes.
const MAX_CSR: usize = 8 << 10;

/// A PKCS#8 Ed25519 key takes 83 bytes with its public half.
const MAX_FILE: u64 = 4 << 10;

/// An Ed25519 key pair.
pub struct Key {
    pair: Ed25519KeyPair,
    pkcs8: Vec<u8>,
    peer: PeerId,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make an Ed25519 key: no randomness")]
    Generate,
    #[error("read the key: it isn't a PKCS#8 Ed25519 key")]
    Pkcs8,
    #[error("open the key file {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("use the key file {}: others may read it (mode {mode:o}); chmod 600 it, or remove it to get a new identity", path.display())]
    Readable { path: PathBuf, mode: u32 },
    #[error("use the key file {}: it isn't a PKCS#8 Ed25519 key; remove it to get a new identity", path.display())]
    File { path: PathBuf },
    #[error("create the key file {}", path.display())]
    Create { path: PathBuf, source: io::Error },
    #[error("make a certificate request")]
    Request(#[source] rcgen::Error),
    #[error("read the certificate request: it isn't a PKCS#10 request for an Ed25519 key")]
    Csr,
    #[error("read the certificate request: its signature isn't by the key it is for")]
    CsrSignature,
}

impl Key {
    pub fn generate() -> Result<Self, Error> {
        let pkcs8 =
            Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| Error::Generate)?;
        Self::from_pkcs8(pkcs8.as_ref())
    }

    pub fn from_pkcs8(der: &[u8]) -> Result<Self, Error> {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).map_err(|_| Error::Pkcs8)?;
        let public = pair.public_key().as_ref().try_into().map_err(|_| Error::Pkcs8)?;
        Ok(Self { pair, pkcs8: der.to_vec(), peer: PeerId::from_public_key(public) })
    }

    /// The key in `path` (PKCS#8, DER, mode 0600). If there is none, one is made, synced, and only then named.
    pub fn open_or_create(path: &Path) -> Result<Self, Error> {
        match Self::open(path) {
            Err(Error::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            opened => return opened,
        }
        let key = Self::generate()?;
        match create(path, &key.pkcs8) {
            Ok(()) => Ok(key),
            // Somebody else was first.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Self::open(path),
            Err(source) => Err(Error::Create { path: path.to_owned(), source }),
        }
    }

    fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(Error::Readable { path: path.to_owned(), mode });
        }
        let mut der = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut der).map_err(failed)?;
        Self::from_pkcs8(&der).map_err(|_| Error::File { path: path.to_owned() })
    }

    pub const fn peer(&self) -> PeerId {
        self.peer
    }

    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        let mut signature = [0; 64];
        signature.copy_from_slice(self.pair.sign(message).as_ref());
        signature
    }

    pub fn pkcs8_der(&self) -> &[u8] {
        &self.pkcs8
    }

    /// A PKCS#10 request, DER, that proves possession of the key and asks for nothing else.
    pub fn csr(&self) -> Result<Vec<u8>, Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params
            .serialize_request(&self.rcgen_pair().map_err(Error::Request)?)
            .map_err(Error::Request)?;
        Ok(request.der().to_vec())
    }

    pub(crate) fn rcgen_pair(&self) -> Result<KeyPair, rcgen::Error> {
        let der = PrivatePkcs8KeyDer::from(self.pkcs8.as_slice());
        KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ED25519)
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.pkcs8.clone()).into()
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key of {}", self.peer)
    }
}

fn create(path: &Path, der: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let draft = Path::new(&name);
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(draft)?;
    let written = file
        .write_all(der)
        .and_then(|()| file.sync_all())
        // Unlike a rename, a link never replaces a key that another process has made meanwhile.
        .and_then(|()| fs::hard_link(draft, path))
        .and_then(|()| File::open(folder)?.sync_all());
    fs::remove_file(draft).and(written)
}

/// Whose key a certificate request (PKCS#10, DER) proves. Names and extensions in it are ignored.
pub fn read_csr(der: &[u8]) -> Result<PeerId, Error> {
    if der.len() > MAX_CSR {
        return Err(Error::Csr);
    }
    let (rest, csr) = X509CertificationRequest::from_der(der).map_err(|_| Error::Csr)?;
    let info = &csr.certification_request_info;
    let key = ed25519_key(&info.subject_pki).ok_or(Error::Csr)?;
    if !rest.is_empty() || !is_ed25519(&csr.signature_algorithm) {
        return Err(Error::Csr);
    }
    UnparsedPublicKey::new(&ED25519, &key)
        .verify(info.raw, &csr.signature_value.data)
        .map_err(|_| Error::CsrSignature)?;
    Ok(PeerId::from_public_key(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert, proptest};

    #[test]
    fn a_key_file_is_made_once_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity/key");
        let key = Key::open_or_create(&path).unwrap();
        assert_eq!(Key::open_or_create(&path).unwrap().peer(), key.peer());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no draft is left");

        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Key::open_or_create(&path), Err(Error::Readable { mode: 0o640, .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "something else").unwrap();
        assert!(matches!(Key::open_or_create(&path), Err(Error::File { .. })));
    }

    #[test]
    fn signatures_are_checked_by_the_peer_id() {
        let (key, other) = (Key::generate().unwrap(), Key::generate().unwrap());
        let signature = key.sign(b"message");
        assert!(key.peer().has_signed(b"message", &signature));
        assert!(!key.peer().has_signed(b"massage", &signature));
        assert!(!key.peer().has_signed(b"message", &signature[..63]));
        assert!(!other.peer().has_signed(b"message", &signature));
    }

    #[test]
    fn a_request_proves_its_key() {
        let key = Key::generate().unwrap();
        let csr = key.csr().unwrap();
        assert_eq!(read_csr(&csr).unwrap(), key.peer());

        let mut longer = csr.clone();
        longer.push(0);
        assert!(matches!(read_csr(&longer), Err(Error::Csr)));
        let mut broken = csr.clone();
        *broken.last_mut().unwrap() ^= 1;
        assert!(matches!(read_csr(&broken), Err(Error::CsrSignature)));
        let p256 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let other = CertificateParams::default().serialize_request(&p256).unwrap();
        assert!(matches!(read_csr(other.der()), Err(Error::Csr)));
    }

    proptest! {
        #[test]
        fn no_changed_byte_of_a_request_makes_it_prove_another_key(at in any::<proptest::sample::Index>(), flip in 1..=255u8) {
            let key = Key::generate().unwrap();
            let mut csr = key.csr().unwrap();
            let at = at.index(csr.len());
            csr[at] ^= flip;
            // The parser is lenient about the outermost tag, which isn't signed.
            prop_assert!(read_csr(&csr).is_ok_and(|peer| peer == key.peer()) || read_csr(&csr).is_err());
        }

        #[test]
        fn arbitrary_requests_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(read_csr(&bytes).is_err());
            prop_assert!(Key::from_pkcs8(&bytes).is_err());
        }
    }
}
