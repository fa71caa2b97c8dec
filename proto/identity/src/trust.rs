//! Whose certificates are accepted: known clusters, a grace period, peers that are out.
//!
//! Owns: the authorities' public keys, the block list, and a bounded memory of certificates whose
//! signatures have been checked already.
//! Invariant: what is remembered of a certificate is its signature only. Time and the block list
//! are looked at on every check.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use crate::authority::fingerprint;
use crate::certificate::{self, Membership};
use crate::grant::{self, Grant};
use crate::{PeerId, statement};

/// How far another machine's clock may be ahead of ours, in seconds.
const SKEW_S: i64 = 300;

/// Certificates whose signature is remembered.
const REMEMBERED: usize = 4096;

/// Shared by everything in a process that checks certificates; updated in place.
#[derive(Debug)]
pub struct Trust {
    grace_s: i64,
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Public keys by cluster id.
    authorities: BTreeMap<String, [u8; 32]>,
    blocked: BTreeSet<PeerId>,
    /// By SHA-256 of the certificate.
    signed: BTreeMap<[u8; 32], Membership>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("trust the authority of cluster {cluster}")]
    Authority { cluster: String, source: certificate::Error },
    #[error("trust the authority of cluster {cluster}: its certificate isn't one of an authority")]
    NotAuthority { cluster: String },
    #[error("check a certificate")]
    Certificate(#[from] certificate::Error),
    #[error("check the certificate of {peer}: cluster {cluster} is unknown here")]
    Cluster { peer: PeerId, cluster: String },
    #[error("check the certificate of {peer}: it isn't signed by cluster {cluster}")]
    Signature { peer: PeerId, cluster: String },
    #[error(
        "check the certificate of {peer}: it begins at {not_before} and it is {now} (Unix seconds); compare the clocks"
    )]
    NotYet { peer: PeerId, not_before: i64, now: i64 },
    #[error(
        "check the certificate of {peer}: it ended at {not_after} and it is {now} (Unix seconds), past the grace period"
    )]
    Expired { peer: PeerId, not_after: i64, now: i64 },
    #[error("check the certificate of {peer}: the node is blocked")]
    Blocked { peer: PeerId },
    #[error("check a grant: cluster {cluster} is unknown here")]
    GrantCluster { cluster: String },
    #[error("check a grant")]
    Grant(#[from] grant::Error),
    #[error("check a statement")]
    Statement(#[from] statement::Error),
}

impl Trust {
    /// Trusts nobody yet. Certificates are accepted for `grace` after they ended.
    pub fn new(grace: Duration) -> Self {
        let grace_s = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        Self { grace_s, state: RwLock::default() }
    }

    /// Accepts what this authority (certificate, DER) signs for `cluster`, and nothing else for it.
    pub fn set_authority(&self, cluster: &str, certificate: &[u8]) -> Result<(), Error> {
        let failed = |source| Error::Authority { cluster: cluster.to_owned(), source };
        let (x509, key) = certificate::parse(certificate).map_err(failed)?;
        if !x509.is_ca() || !certificate::is_signed_by(&x509, &key) {
            return Err(Error::NotAuthority { cluster: cluster.to_owned() });
        }
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.authorities.insert(cluster.to_owned(), key) != Some(key) {
            state.signed.clear();
        }
        Ok(())
    }

    pub fn remove_authority(&self, cluster: &str) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.authorities.remove(cluster);
        state.signed.clear();
    }

    /// These and no others are blocked from now on.
    pub fn set_blocked(&self, peers: impl IntoIterator<Item = PeerId>) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.blocked = peers.into_iter().collect();
    }

    /// Blocks one more.
    pub fn block(&self, peer: PeerId) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).blocked.insert(peer);
    }

    /// Blocks one less.
    pub fn unblock(&self, peer: &PeerId) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).blocked.remove(peer);
    }

    pub fn is_blocked(&self, peer: &PeerId) -> bool {
        self.state.read().unwrap_or_else(PoisonError::into_inner).blocked.contains(peer)
    }

    /// Checks a membership certificate (DER) from outside at `now` (Unix seconds). One that has
    /// ended within the grace period passes: ask [`Membership::is_current`] where that matters.
    pub fn check(&self, certificate: &[u8], now: i64) -> Result<Membership, Error> {
        let membership = self.identify(certificate)?;
        self.admit(&membership, now)?;
        Ok(membership)
    }

    /// Whose certificate (DER) from outside it is, or was.
    pub(crate) fn identify(&self, certificate: &[u8]) -> Result<Membership, Error> {
        if certificate.len() > certificate::MAX_CERTIFICATE {
            return Err(certificate::Error::Form.into());
        }
        let sum = fingerprint(certificate);
        let known = {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            state.signed.get(&sum).cloned()
        };
        match known {
            Some(membership) => Ok(membership),
            None => self.check_signature(certificate, sum),
        }
    }

    /// Whether it counts at `now`, as [`Self::check`] says.
    pub(crate) fn admit(&self, membership: &Membership, now: i64) -> Result<(), Error> {
        let Membership { peer, not_before, not_after, .. } = *membership;
        if now < not_before.saturating_sub(SKEW_S) {
            return Err(Error::NotYet { peer, not_before, now });
        }
        if now > not_after.saturating_add(self.grace_s) {
            return Err(Error::Expired { peer, not_after, now });
        }
        if self.is_blocked(&peer) {
            return Err(Error::Blocked { peer });
        }
        Ok(())
    }

    fn check_signature(&self, certificate: &[u8], sum: [u8; 32]) -> Result<Membership, Error> {
        let unproved = certificate::read(certificate)?;
        let Membership { peer, cluster, .. } = &unproved.membership;
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let Some(authority) = state.authorities.get(cluster) else {
            return Err(Error::Cluster { peer: *peer, cluster: cluster.clone() });
        };
        if !certificate::is_signed_by(&unproved.x509, authority) {
            return Err(Error::Signature { peer: *peer, cluster: cluster.clone() });
        }
        if state.signed.len() >= REMEMBERED {
            state.signed.clear();
        }
        state.signed.insert(sum, unproved.membership.clone());
        Ok(unproved.membership)
    }

    /// Checks an encoded grant from outside. It must be by the authority of `cluster` and run at `now`.
    pub fn check_grant(&self, cluster: &str, grant: &[u8], now: i64) -> Result<Grant, Error> {
        let authority = {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            state.authorities.get(cluster).copied()
        };
        let authority =
            authority.ok_or_else(|| Error::GrantCluster { cluster: cluster.to_owned() })?;
        Ok(Grant::check(grant, &PeerId::from_public_key(authority), now)?)
    }
}

#[cfg(test)]
mod tests;
