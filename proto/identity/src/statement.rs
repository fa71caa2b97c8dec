//! What a node vouches for with its key: a piece's value, and what a blob decodes to.
//!
//! Messages that are signed (the beginning keeps one kind from being taken for another):
//! ```text
//! piece value   "skimmer-value-v1\0" task id (32) piece (u32, little-endian) value (32)
//! index record  "skimmer-index-v1\0" blob SHA-256 (32) encoded piece table's SHA-256 (32)
//! ```
//! A statement carries its signer's membership certificate, so that whoever gets it on its way can
//! check that the signer is of the cluster, and blame the right node.

use std::sync::Arc;

use skimmer_proto::control::IndexRecord;
use skimmer_proto::{Digest, TaskId};

use crate::certificate::MAX_CERTIFICATE;
use crate::{Key, Membership, Trust, trust};

const VALUE: &[u8; 17] = b"skimmer-value-v1\0";
const INDEX: &[u8; 17] = b"skimmer-index-v1\0";

/// The most bytes that an encoded signed value takes.
pub const MAX_SIGNED_VALUE: usize = 32 + 64 + MAX_CERTIFICATE;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("it isn't a signed value")]
    Value,
    #[error("it isn't an index record")]
    Record,
    #[error("it isn't signed by the node whose certificate it carries")]
    Signature,
}

/// "Piece `piece` of `task` has this value", by whoever took it from the origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedValue {
    pub task: TaskId,
    pub piece: u32,
    /// See [`skimmer_proto::piece_table::piece_value`].
    pub value: [u8; 32],
    pub signature: [u8; 64],
    /// The signer's membership, DER.
    pub certificate: Arc<[u8]>,
}

impl SignedValue {
    /// `certificate` is the membership (DER) of `key`.
    pub fn sign(
        key: &Key,
        certificate: Arc<[u8]>,
        task: TaskId,
        piece: u32,
        value: [u8; 32],
    ) -> Self {
        let signature = key.sign(&value_message(&task, piece, &value));
        Self { task, piece, value, signature, certificate }
    }

    /// Who signed it. An error: nobody who counts in the cluster at `now` (Unix seconds) did.
    pub fn check(&self, trust: &Trust, now: i64) -> Result<Membership, trust::Error> {
        let message = value_message(&self.task, self.piece, &self.value);
        signer(&message, &self.signature, &self.certificate, trust, now)
    }

    /// The value (32), the signature (64), the certificate; task and piece are known where it goes.
    pub fn encode(&self) -> Vec<u8> {
        [&self.value[..], &self.signature, &self.certificate].concat()
    }

    /// Reads [`Self::encode`]; nothing is checked but the form.
    pub fn decode(task: TaskId, piece: u32, bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() > MAX_SIGNED_VALUE {
            return Err(Error::Value);
        }
        let (value, rest) = bytes.split_first_chunk().ok_or(Error::Value)?;
        let (signature, certificate) = rest.split_first_chunk().ok_or(Error::Value)?;
        let (value, signature) = (*value, *signature);
        Ok(Self { task, piece, value, signature, certificate: certificate.into() })
    }
}

fn value_message(task: &TaskId, piece: u32, value: &[u8; 32]) -> [u8; 85] {
    let mut message = [0; 85];
    message[..17].copy_from_slice(VALUE);
    message[17..49].copy_from_slice(task.as_bytes());
    message[49..53].copy_from_slice(&piece.to_le_bytes());
    message[53..].copy_from_slice(value);
    message
}

/// An index record whose signature has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    pub blob: Digest,
    /// SHA-256 of the encoded piece table.
    pub table: Digest,
    pub signer: Membership,
}

/// States that `blob` decodes as the piece table of digest `table` says.
pub fn sign_index(key: &Key, certificate: &[u8], blob: &Digest, table: &Digest) -> IndexRecord {
    IndexRecord {
        blob: blob.as_bytes().to_vec(),
        table: table.as_bytes().to_vec(),
        certificate: certificate.to_vec(),
        signature: key.sign(&index_message(blob, table)).to_vec(),
    }
}

/// Checks a record from outside at `now` (Unix seconds). Whether its signer's word is enough is the caller's to decide.
pub fn check_index(record: &IndexRecord, trust: &Trust, now: i64) -> Result<Checked, trust::Error> {
    let digest = |bytes: &[u8]| bytes.try_into().map(Digest::from_bytes).map_err(|_| Error::Record);
    let (blob, table) = (digest(&record.blob)?, digest(&record.table)?);
    let message = index_message(&blob, &table);
    let signer = signer(&message, &record.signature, &record.certificate, trust, now)?;
    Ok(Checked { blob, table, signer })
}

/// Who signed `message`. A certificate that has run out, or is blocked, doesn't excuse a wrong signature.
fn signer(
    message: &[u8],
    signature: &[u8],
    certificate: &[u8],
    trust: &Trust,
    now: i64,
) -> Result<Membership, trust::Error> {
    let signer = trust.identify(certificate)?;
    if !signer.peer.has_signed(message, signature) {
        return Err(Error::Signature.into());
    }
    trust.admit(&signer, now)?;
    Ok(signer)
}

fn index_message(blob: &Digest, table: &Digest) -> Vec<u8> {
    [&INDEX[..], blob.as_bytes(), table.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Authority, Role};
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};
    use skimmer_proto::Scope;

    fn member(authority: &Authority) -> (Key, Arc<[u8]>) {
        let key = Key::generate().unwrap();
        let membership = Membership {
            peer: key.peer(),
            cluster: "c".to_owned(),
            zone: String::new(),
            role: Role::Peer,
            not_before: 0,
            not_after: 10,
        };
        let certificate = authority.issue(&membership).unwrap();
        (key, certificate.into())
    }

    fn cluster() -> (Authority, Trust) {
        let authority = Authority::create("c", 0).unwrap();
        let trust = Trust::new(Duration::ZERO);
        trust.set_authority("c", authority.certificate_der()).unwrap();
        (authority, trust)
    }

    #[test]
    fn a_signed_value_is_for_one_piece_of_one_task() {
        let (authority, trust) = cluster();
        let (key, certificate) = member(&authority);
        let (_, another) = member(&authority);
        let [task, other] = [b"a", b"b"].map(|b| TaskId::of(&Scope::Public, &Digest::of(b)));
        let signed = SignedValue::sign(&key, certificate, task, 7, [9; 32]);
        assert_eq!(signed.check(&trust, 5).unwrap().peer, key.peer());
        assert_eq!(SignedValue::decode(task, 7, &signed.encode()), Ok(signed.clone()));
        for wrong in [
            SignedValue { task: other, ..signed.clone() },
            SignedValue { piece: 8, ..signed.clone() },
            SignedValue { value: [8; 32], ..signed.clone() },
            SignedValue { certificate: another, ..signed.clone() },
            SignedValue { certificate: Arc::from([]), ..signed.clone() },
        ] {
            assert!(wrong.check(&trust, 5).is_err(), "{wrong:?}");
        }
        trust.block(key.peer());
        assert!(matches!(signed.check(&trust, 5), Err(trust::Error::Blocked { .. })));
    }

    #[test]
    fn an_index_record_is_for_one_blob_and_table() {
        let (authority, trust) = cluster();
        let (key, certificate) = member(&authority);
        let (blob, table) = (Digest::of(b"blob"), Digest::of(b"table"));
        let record = sign_index(&key, &certificate, &blob, &table);
        let checked = check_index(&record, &trust, 5).unwrap();
        assert_eq!((checked.blob, checked.table, checked.signer.peer), (blob, table, key.peer()));
        for wrong in [
            IndexRecord { blob: record.table.clone(), ..record.clone() },
            IndexRecord { table: vec![1; 31], ..record.clone() },
            IndexRecord { signature: vec![0; 64], ..record.clone() },
            IndexRecord { signature: Vec::new(), ..record.clone() },
            IndexRecord { certificate: Vec::new(), ..record.clone() },
            IndexRecord::default(),
        ] {
            assert!(check_index(&wrong, &trust, 5).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_values_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let task = TaskId::from_bytes([0; 32]);
            match SignedValue::decode(task, 1, &bytes) {
                Ok(signed) => {
                    prop_assert_eq!(signed.encode(), bytes);
                    prop_assert!(signed.check(&Trust::new(Duration::ZERO), 0).is_err());
                }
                Err(error) => prop_assert_eq!(error, Error::Value),
            }
        }
    }
}
