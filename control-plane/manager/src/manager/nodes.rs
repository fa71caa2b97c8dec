//! Nodes: let in, renewed, thrown out.

use skimmer_control_store as store;
use skimmer_control_store::{Enrolment, Joined, Node};
use skimmer_identity::{JoinToken, Membership, PeerId, Role, certificate, read_csr};

use super::{Error, Manager, load, seconds};

/// A node's fresh membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    pub membership: Membership,
    /// DER.
    pub certificate: Vec<u8>,
    /// The cluster's CA, DER.
    pub authority: Vec<u8>,
    /// Members of the cluster that are out though their certificates may still run.
    pub blocked: Vec<PeerId>,
}

/// Asked for by a node that shows a token.
#[derive(Clone, Copy, Debug)]
pub struct Application<'a> {
    pub token: &'a str,
    /// PKCS#10, DER.
    pub csr: &'a [u8],
    pub zone: &'a str,
    pub name: &'a str,
}

impl Manager {
    /// Lets a node in. The token's use is taken only if everything else is right.
    pub async fn enrol(&self, asked: Application<'_>, now: i64) -> Result<Issued, Error> {
        let token: JoinToken = asked.token.parse().map_err(Error::Token)?;
        if token.fingerprint != self.root.fingerprint() {
            return Err(Error::OtherControlPlane);
        }
        let peer = read_csr(asked.csr).map_err(Error::Csr)?;
        if !certificate::is_zone(asked.zone) {
            return Err(Error::Zone(asked.zone.chars().take(100).collect()));
        }
        if asked.name.len() > 253 || asked.name.chars().any(char::is_control) {
            return Err(Error::NodeName(asked.name.chars().take(100).collect()));
        }
        let enrolment = Enrolment {
            peer: peer.to_string(),
            name: asked.name.to_owned(),
            zone: asked.zone.to_owned(),
            expires: self.end_of_certificate(now),
        };
        let node = match self.store.enrol(&token.hash(), &enrolment, now).await? {
            Joined::In(node) => node,
            Joined::Refused(refusal) => return Err(Error::Refused(refusal)),
        };
        let what = format!("node {} ({peer}) enrolled as {}", node.name, node.role.name());
        self.note(&node.cluster, what, now).await?;
        self.issue(peer, &node, now).await
    }

    /// A fresh certificate for the member that made the connection, whose certificate may have ended within the grace period.
    pub async fn renew(&self, member: &Membership, csr: &[u8], now: i64) -> Result<Issued, Error> {
        if read_csr(csr).map_err(Error::Csr)? != member.peer {
            return Err(Error::OtherKey);
        }
        if now > member.not_after.saturating_add(seconds(self.settings.grace)) {
            return Err(Error::Expired(member.not_after));
        }
        let renewed =
            self.store.renew(&member.peer.to_string(), self.end_of_certificate(now)).await?;
        match renewed.filter(|node| node.cluster == member.cluster) {
            Some(node) => self.issue(member.peer, &node, now).await,
            None => Err(Error::NotMember),
        }
    }

    /// Throws a node out for good. `peer`: its id, as text.
    pub async fn revoke(&self, peer: &str, reason: &str, now: i64) -> Result<Node, Error> {
        let shorten = |text: &str| text.chars().filter(|c| !c.is_control()).take(500).collect();
        let reason: String = shorten(reason);
        let revoked = self.store.revoke(peer, &reason).await?;
        let node = revoked.ok_or_else(|| Error::NoNode(shorten(peer)))?;
        let what = format!("node {} ({peer}) revoked: {reason}", node.name);
        self.note(&node.cluster, what, now).await?;
        Ok(node)
    }

    pub async fn node(&self, peer: &PeerId) -> Result<Option<Node>, Error> {
        Ok(self.store.node(&peer.to_string()).await?)
    }

    /// Of the cluster with this id, or of all.
    pub async fn nodes(&self, cluster: Option<&str>) -> Result<Vec<Node>, Error> {
        Ok(self.store.nodes(cluster).await?)
    }

    /// Revoked nodes whose certificates might still be accepted somewhere, with their clusters' ids.
    pub async fn blocked(&self, now: i64) -> Result<Vec<(String, PeerId)>, Error> {
        let end = now.saturating_sub(seconds(self.settings.grace));
        let out = self.store.revoked(end).await?.into_iter();
        // Peer ids are written by this crate only; one that can't be read can't be on a certificate either.
        Ok(out.filter_map(|node| Some((node.cluster, node.peer.parse().ok()?))).collect())
    }

    async fn issue(&self, peer: PeerId, node: &Node, now: i64) -> Result<Issued, Error> {
        let cluster = self.cluster(&node.cluster).await?;
        let membership = Membership {
            peer,
            cluster: node.cluster.clone(),
            zone: node.zone.clone(),
            role: match node.role {
                store::Role::Peer => Role::Peer,
                store::Role::Seed => Role::Seed,
            },
            not_before: now,
            not_after: node.expires,
        };
        let blocked = self.blocked(now).await?.into_iter();
        Ok(Issued {
            certificate: load(&cluster.authority)?.issue(&membership)?,
            authority: cluster.authority.certificate,
            blocked: blocked.filter(|(c, _)| *c == node.cluster).map(|(_, peer)| peer).collect(),
            membership,
        })
    }

    pub(super) fn end_of_certificate(&self, now: i64) -> i64 {
        now.saturating_add(seconds(self.settings.certificate_lifetime))
    }
}
