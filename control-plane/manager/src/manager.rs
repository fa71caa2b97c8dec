//! The control plane's authority over its clusters.
//!
//! Owns: the root CA in memory; when certificates and grants are issued, and to whom.
//! Does not own: storage ([`Store`]), registries ([`AskRegistry`]), connections and who is on them.
//!
//! Invariants:
//! - A certificate is issued only to the key that proved itself, in a cluster that the node was let into by a token.
//! - Nothing is issued to a revoked node.
//! - A grant is issued only by the cluster's policy, or after the registry itself said yes to the node's own credentials.

mod grants;
mod nodes;
mod schedulers;

use std::sync::Arc;
use std::time::Duration;

use ring::rand::{SecureRandom as _, SystemRandom};
use skimmer_control_store as store;
use skimmer_control_store::{Cluster, Event, Refusal, Store, Token};
use skimmer_identity::{Authority, JoinToken, authority, grant, key, token};

use crate::policy::{self, Policy};
use crate::registries::{self, AskRegistry};

pub use grants::Asked;
pub use nodes::{Application, Issued};
pub use schedulers::SILENCE;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Of membership certificates; renewed at half of it.
    pub certificate_lifetime: Duration,
    /// For how long a certificate that ended is still renewed.
    pub grace: Duration,
    pub grant_lifetime: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("make or load a CA")]
    Authority(#[from] authority::Error),
    #[error("the system gives no random bytes")]
    Random,
    #[error("make a join token")]
    MakeToken(#[source] token::Error),
    #[error("read the join token")]
    Token(#[source] token::Error),
    #[error("the join token is of another control plane")]
    OtherControlPlane,
    #[error("{}", refusal(.0))]
    Refused(Refusal),
    #[error("check the certificate request")]
    Csr(#[source] key::Error),
    #[error("the certificate request is for another key than the connection's")]
    OtherKey,
    #[error("{0:?} can't name a zone: at most 128 bytes, no control characters")]
    Zone(String),
    #[error("{0:?} can't name a node: at most 253 bytes, no control characters")]
    NodeName(String),
    #[error(
        "{0:?} can't name a cluster: 1 to 63 of a-z, 0-9 and '-', beginning with a letter or a digit"
    )]
    ClusterName(String),
    #[error("cluster {0:?} exists already")]
    ClusterExists(String),
    #[error("there is no cluster {0:?} (`skimmer cluster list` shows them)")]
    NoCluster(String),
    #[error("there is no node {0:?}, or it is revoked already (`skimmer node list` shows them)")]
    NoNode(String),
    #[error("the node isn't a member any more: it is unknown or revoked")]
    NotMember,
    #[error(
        "the certificate ended at {0} (Unix seconds), past the grace period: enrol again with a new join token"
    )]
    Expired(i64),
    #[error(transparent)]
    Policy(#[from] policy::Error),
    #[error(
        "{0:?} isn't a repository: expected a host and a path such as docker.io and library/debian"
    )]
    Repository(String),
    #[error("the node may not read {0}: no policy of its cluster allows it, and {1}")]
    Denied(String, &'static str),
    #[error("find out whether the node may read {name}")]
    Ask { name: String, source: registries::Error },
    #[error("sign a grant")]
    Grant(#[source] grant::Error),
}

fn refusal(refusal: &Refusal) -> String {
    match refusal {
        Refusal::UnknownToken => "the join token is unknown here".into(),
        Refusal::ExpiredToken => "the join token has expired".into(),
        Refusal::UsedToken => {
            "the join token has been used; make another with `skimmer token create`".into()
        }
        Refusal::Revoked(reason) => {
            format!(
                "the node was revoked ({reason}); to join again it needs a new key: remove its identity folder"
            )
        }
        Refusal::OtherCluster(id) => {
            format!(
                "the node's key belongs to another cluster ({id}); to move it, remove its identity folder"
            )
        }
    }
}

/// See the module.
pub struct Manager {
    store: Arc<dyn Store>,
    registries: Arc<dyn AskRegistry>,
    root: Authority,
    settings: Settings,
}

impl Manager {
    /// The manager of what is in `store`; an empty one gets its root CA now.
    pub async fn open(
        store: Arc<dyn Store>,
        registries: Arc<dyn AskRegistry>,
        settings: Settings,
        now: i64,
    ) -> Result<Self, Error> {
        let proposed = row(&Authority::create("skimmer control plane", now)?);
        let root = load(&store.root(proposed).await?)?;
        Ok(Self { store, registries, root, settings })
    }

    /// The CA of the control plane's own servers.
    pub const fn root(&self) -> &Authority {
        &self.root
    }

    pub async fn create_cluster(&self, name: &str, now: i64) -> Result<Cluster, Error> {
        if !is_cluster_name(name) {
            return Err(Error::ClusterName(name.chars().take(100).collect()));
        }
        let mut id = [0; 8];
        SystemRandom::new().fill(&mut id).map_err(|_| Error::Random)?;
        let cluster = Cluster {
            id: hex::encode(id),
            name: name.to_owned(),
            authority: row(&Authority::create(&format!("skimmer cluster {name}"), now)?),
            repositories: Vec::new(),
            created: now,
        };
        if !self.store.add_cluster(&cluster).await? {
            return Err(Error::ClusterExists(name.to_owned()));
        }
        self.note(&cluster.id, format!("cluster {name} created"), now).await?;
        Ok(cluster)
    }

    pub async fn clusters(&self) -> Result<Vec<Cluster>, Error> {
        Ok(self.store.clusters().await?)
    }

    /// By its name or its id.
    pub async fn cluster(&self, name: &str) -> Result<Cluster, Error> {
        let found =
            self.store.clusters().await?.into_iter().find(|c| c.name == name || c.id == name);
        found.ok_or_else(|| Error::NoCluster(name.chars().take(100).collect()))
    }

    /// The repositories that the nodes of the cluster may read without the registry being asked.
    pub async fn set_policy(
        &self,
        cluster: &str,
        patterns: &[String],
        now: i64,
    ) -> Result<Cluster, Error> {
        Policy::parse(patterns)?;
        let mut cluster = self.cluster(cluster).await?;
        self.store.set_repositories(&cluster.id, patterns).await?;
        cluster.repositories = patterns.to_vec();
        self.note(&cluster.id, format!("policy set: {}", patterns.join(", ")), now).await?;
        Ok(cluster)
    }

    /// A new join token; it can't be had again. `uses`: `None` for as often as it is valid.
    pub async fn create_token(
        &self,
        cluster: &str,
        role: store::Role,
        ttl: Duration,
        uses: Option<u32>,
        now: i64,
    ) -> Result<JoinToken, Error> {
        let cluster = self.cluster(cluster).await?;
        let made = JoinToken::generate(self.root.fingerprint()).map_err(Error::MakeToken)?;
        let expires = now.saturating_add(seconds(ttl));
        let hash = made.hash();
        self.store.drop_tokens(now).await?;
        let token = Token { hash, cluster: cluster.id.clone(), role, expires, uses_left: uses };
        self.store.add_token(&token).await?;
        let uses = uses.map_or("any number of".to_owned(), |uses| uses.to_string());
        let what =
            format!("token for {uses} nodes of role {} created, until {expires}", role.name());
        self.note(&cluster.id, what, now).await?;
        Ok(made)
    }

    pub async fn events(&self, cluster: Option<&str>, limit: u32) -> Result<Vec<Event>, Error> {
        Ok(self.store.events(cluster, limit).await?)
    }

    /// Writes down something that a person may want to know later. `cluster`: its id.
    pub async fn note(&self, cluster: &str, what: String, now: i64) -> Result<(), Error> {
        tracing::info!(cluster, what, "event");
        let event = Event { at: now, cluster: cluster.to_owned(), what };
        Ok(self.store.add_event(&event).await?)
    }
}

fn row(authority: &Authority) -> store::Authority {
    store::Authority {
        certificate: authority.certificate_der().to_vec(),
        private_key: authority.key_pkcs8().to_vec(),
    }
}

fn load(row: &store::Authority) -> Result<Authority, Error> {
    Ok(Authority::load(&row.private_key, &row.certificate)?)
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

/// DNS's rule for a label: names turn up in URLs and files.
fn is_cluster_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && !name.starts_with('-')
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

#[cfg(test)]
mod tests;
