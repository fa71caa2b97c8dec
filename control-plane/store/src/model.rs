//! The rows of the store. Times are Unix seconds.

use std::fmt;

/// A CA: its certificate (DER) and its private key (PKCS#8, DER).
#[derive(Clone, PartialEq, Eq)]
pub struct Authority {
    pub certificate: Vec<u8>,
    pub private_key: Vec<u8>,
}

/// SHA-256 of a token's secret; the secret itself is never kept.
pub type TokenHash = [u8; 32];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    pub id: String,
    /// Unique; for people.
    pub name: String,
    pub authority: Authority,
    /// Readable by every node without asking the registry: `host/repository`, `*` at the end.
    pub repositories: Vec<String>,
    pub created: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Peer,
    Seed,
}

/// The right to join a cluster in a role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub hash: TokenHash,
    /// Cluster id.
    pub cluster: String,
    pub role: Role,
    pub expires: i64,
    /// `None`: as often as it is valid.
    pub uses_left: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its peer id, as text.
    pub peer: String,
    /// Cluster id.
    pub cluster: String,
    pub name: String,
    pub zone: String,
    pub role: Role,
    /// The token that it joined with. Nodes of one token may be one party.
    pub token: TokenHash,
    pub enrolled: i64,
    /// Of the last certificate issued to it.
    pub expires: i64,
    /// Why it is out, if it is.
    pub revoked: Option<String>,
}

/// A node that shows a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolment {
    pub peer: String,
    pub name: String,
    pub zone: String,
    /// Of the certificate that it gets if the token is good.
    pub expires: i64,
}

/// What came of showing a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Joined {
    /// The node is in the token's cluster, in its role.
    In(Node),
    Refused(Refusal),
}

/// Why a token doesn't let a node in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    UnknownToken,
    ExpiredToken,
    /// As many nodes as it was made for have joined with it.
    UsedToken,
    /// The node was revoked, for this reason; its key stays out.
    Revoked(String),
    /// The node's key is in the cluster with this id.
    OtherCluster(String),
}

/// A scheduler process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scheduler {
    /// Another with each start.
    pub id: String,
    /// `host:port` at which the others reach it.
    pub address: String,
}

/// Something that a person may want to know later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub at: i64,
    /// Cluster id; empty: the whole control plane.
    pub cluster: String,
    pub what: String,
}

impl Token {
    /// Whether the token lets a node in that the store knows as `known`, and then whether that takes one of its uses.
    pub fn admit(&self, known: Option<&Node>, now: i64) -> Result<bool, Refusal> {
        if self.expires <= now {
            return Err(Refusal::ExpiredToken);
        }
        if let Some(reason) = known.and_then(|node| node.revoked.clone()) {
            return Err(Refusal::Revoked(reason));
        }
        match known {
            Some(node) if node.cluster != self.cluster => {
                Err(Refusal::OtherCluster(node.cluster.clone()))
            }
            Some(node) if node.token == self.hash => Ok(false),
            _ if self.uses_left == Some(0) => Err(Refusal::UsedToken),
            _ => Ok(self.uses_left.is_some()),
        }
    }
}

impl Role {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Seed => "seed",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Peer, Self::Seed].into_iter().find(|role| role.name() == name)
    }
}

impl fmt::Debug for Authority {
    /// Without the private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}
