//! The trait that every database implements.

use std::path::PathBuf;

use async_trait::async_trait;

use crate::model::{
    Authority, Cluster, Enrolment, Event, Joined, Node, Scheduler, Token, TokenHash,
};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("create the database file {path} for its owner only")]
    Create { path: PathBuf, source: std::io::Error },
    #[error("open the database {path}")]
    Open { path: PathBuf, source: sqlx::Error },
    #[error("bring the database {path} to this version's form")]
    Migrate { path: PathBuf, source: sqlx::migrate::MigrateError },
    #[error("database: {doing}")]
    Query { doing: &'static str, source: sqlx::Error },
    #[error(
        "database: a row of {table} holds {value:?}, which no version of skimmer-control wrote"
    )]
    Row { table: &'static str, value: String },
}

/// Durable state of the control plane. Every method is one transaction.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Keeps `proposed` as the root CA unless there is one already; returns the one that counts.
    async fn root(&self, proposed: Authority) -> Result<Authority, Error>;

    /// Whether it was added; not if its id or name is taken.
    async fn add_cluster(&self, cluster: &Cluster) -> Result<bool, Error>;
    /// All of them, by name.
    async fn clusters(&self) -> Result<Vec<Cluster>, Error>;
    /// Whether there is such a cluster.
    async fn set_repositories(&self, cluster: &str, repositories: &[String])
    -> Result<bool, Error>;

    async fn add_token(&self, token: &Token) -> Result<(), Error>;
    /// Takes one use off the token and records the node, or neither.
    ///
    /// A node that is in by this token already takes no further use: it may ask again when the answer got lost.
    async fn enrol(&self, token: &TokenHash, node: &Enrolment, now: i64) -> Result<Joined, Error>;
    /// Forgets tokens that expired before `now`; returns how many.
    async fn drop_tokens(&self, now: i64) -> Result<u64, Error>;

    async fn node(&self, peer: &str) -> Result<Option<Node>, Error>;
    /// Of the cluster with this id, or of all; by cluster, name and peer id.
    async fn nodes(&self, cluster: Option<&str>) -> Result<Vec<Node>, Error>;
    /// Notes the end of the node's newest certificate, unless it is revoked or unknown: then `None`.
    async fn renew(&self, peer: &str, expires: i64) -> Result<Option<Node>, Error>;
    /// The node, if it wasn't revoked before; the first reason stays.
    async fn revoke(&self, peer: &str, reason: &str) -> Result<Option<Node>, Error>;

    /// Nodes that were revoked and whose last certificate ends after `end`, by cluster, name and peer id.
    async fn revoked(&self, end: i64) -> Result<Vec<Node>, Error>;

    /// Says that the scheduler runs at `now_ms`; others that were last seen before `since_ms`, or
    /// that had its address, are forgotten. Returns all that are left, by id.
    async fn beat(
        &self,
        scheduler: &Scheduler,
        now_ms: i64,
        since_ms: i64,
    ) -> Result<Vec<Scheduler>, Error>;
    /// The schedulers seen since `since_ms`, by id.
    async fn schedulers(&self, since_ms: i64) -> Result<Vec<Scheduler>, Error>;
    /// The scheduler with this id has ended.
    async fn retire(&self, id: &str) -> Result<(), Error>;

    async fn add_event(&self, event: &Event) -> Result<(), Error>;
    /// The latest `limit`, oldest first, of the cluster with this id, or of all.
    async fn events(&self, cluster: Option<&str>, limit: u32) -> Result<Vec<Event>, Error>;
}
