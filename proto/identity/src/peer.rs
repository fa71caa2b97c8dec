//! Peer ids: libp2p's, of an Ed25519 key. Other nodes, the control plane and people name a node by it.

use std::fmt;
use std::str::FromStr;

use ring::signature::{ED25519, UnparsedPublicKey};

/// An identity multihash (00, length 24) of a protobuf-encoded public key: type 1 = Ed25519
/// (08 01), 32 bytes of data (12 20). Source: libp2p's peer-ids specification.
const PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];

const LEN: usize = 38;

/// The longest text that can be a peer id: base58 takes at most 1.37 characters a byte.
const MAX_TEXT: usize = 64;

/// A node, by its Ed25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId([u8; 32]);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("a peer id is {LEN} bytes of an Ed25519 key, not {0} bytes of something else")]
    Bytes(usize),
    #[error("a peer id is text like 12D3KooW…, not {0:?}")]
    Text(String),
}

impl PeerId {
    pub const fn from_public_key(key: [u8; 32]) -> Self {
        Self(key)
    }

    pub const fn public_key(&self) -> &[u8; 32] {
        &self.0
    }

    /// libp2p's 38 bytes.
    pub fn to_bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let (prefix, key) = bytes.split_at_mut(PREFIX.len());
        prefix.copy_from_slice(&PREFIX);
        key.copy_from_slice(&self.0);
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let key = bytes.strip_prefix(&PREFIX).and_then(|key| key.try_into().ok());
        key.map(Self).ok_or(Error::Bytes(bytes.len()))
    }

    /// Whether this peer's key made `signature` over `message`.
    pub fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.0).verify(message, signature).is_ok()
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bs58::encode(self.to_bytes()).into_string())
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerId({self})")
    }
}

impl FromStr for PeerId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let error = || Error::Text(text.chars().take(MAX_TEXT).collect());
        if text.len() > MAX_TEXT {
            return Err(error());
        }
        let bytes = bs58::decode(text).into_vec().map_err(|_| error())?;
        Self::from_bytes(&bytes).map_err(|_| error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_assert_eq, proptest};

    #[test]
    fn ids_are_libp2ps() {
        // The key of all zeros, as libp2p prints it.
        let peer = PeerId::from_public_key([0; 32]);
        assert_eq!(peer.to_string(), "12D3KooW9pNAk8aiBuGVQtWRdbkLmo5qVL3e2h5UxbN2Nz9ttwiw");
        assert_eq!(peer.to_string().parse(), Ok(peer));
        for text in ["", "12D3KooW", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "ü", "0OIl"]
        {
            assert!(text.parse::<PeerId>().is_err(), "{text}");
        }
        assert!("1".repeat(1000).parse::<PeerId>().is_err());
    }

    proptest! {
        #[test]
        fn bytes_and_text_return(key in any::<[u8; 32]>()) {
            let peer = PeerId::from_public_key(key);
            prop_assert_eq!(PeerId::from_bytes(&peer.to_bytes()), Ok(peer));
            prop_assert_eq!(peer.to_string().parse(), Ok(peer));
        }

        #[test]
        fn arbitrary_input_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..60), text in ".{0,70}") {
            if let Ok(peer) = PeerId::from_bytes(&bytes) {
                prop_assert_eq!(peer.to_bytes().to_vec(), bytes);
            }
            if let Ok(peer) = text.parse::<PeerId>() {
                prop_assert_eq!(peer.to_string(), text);
            }
        }
    }
}
