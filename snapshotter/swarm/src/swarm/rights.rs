//! In which scope this node reads a blob, and by what right.
//!
//! A blob is public if its origin serves it to this node without credentials; otherwise it is read
//! in its repository's scope, for which other nodes want a grant. Answers are kept per repository.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use skimmer_cache::{BlobRef, Origin};
use skimmer_proto::Scope;
use skimmer_proto::control::GrantRequest;
use tokio::time::{Instant, timeout};

use super::Inner;

/// How long an answer of the origin or the control plane is kept.
const KEPT: Duration = Duration::from_secs(600);
/// How long a failure is.
const KEPT_FAILURE: Duration = Duration::from_secs(5);
/// The origin gets so long to say whether it serves everybody.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the origin says of this node's rights.
#[async_trait]
pub trait Rights: Send + Sync + 'static {
    /// Whether the origin serves the blob without credentials; `None` if it doesn't answer.
    async fn is_public(&self, blob: &BlobRef) -> Option<bool>;

    /// An Authorization header that the origin accepts for reading the repository.
    async fn authorization(&self, origin: &Origin) -> Option<String>;
}

/// A scope, and whether this node has itself proved that it may read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    pub scope: Scope,
    pub proved: bool,
}

#[derive(Debug, Default)]
pub struct Known {
    standings: Mutex<HashMap<Origin, (Standing, Instant)>>,
    grants: Mutex<HashMap<Scope, (Option<Bytes>, Instant)>>,
}

impl Inner {
    /// In which scope the blob is read. One that isn't proved is read, but not served.
    pub(super) async fn standing(&self, blob: &BlobRef) -> Standing {
        let Some(origin) = blob.origins.first() else {
            return Standing { scope: Scope::Public, proved: false };
        };
        let lock = || self.known.standings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((standing, until)) = lock().get(origin)
            && *until > Instant::now()
        {
            return standing.clone();
        }
        let asked = timeout(PATIENCE, self.rights.is_public(blob)).await.ok().flatten();
        let (standing, kept) = match asked {
            Some(true) => (Standing { scope: Scope::Public, proved: true }, KEPT),
            Some(false) => {
                let scope = Scope::Repository(origin.to_string());
                let proved = self.grant(&scope).await.is_some();
                (Standing { scope, proved }, if proved { KEPT } else { KEPT_FAILURE })
            }
            None => {
                // What it was before, if that is known; else what anybody may read.
                let before = lock().get(origin).map(|(standing, _)| standing.clone());
                let public = Standing { scope: Scope::Public, proved: false };
                (before.unwrap_or(public), KEPT_FAILURE)
            }
        };
        lock().insert(origin.clone(), (standing.clone(), Instant::now() + kept));
        standing
    }

    /// What other nodes had of `origin` was in `scope`: so it is read there while the origin says
    /// nothing.
    pub(super) fn suppose(&self, origin: &Origin, scope: &Scope) {
        let standing = Standing { scope: scope.clone(), proved: false };
        let mut standings = self.known.standings.lock().unwrap_or_else(PoisonError::into_inner);
        standings.entry(origin.clone()).or_insert((standing, Instant::now()));
    }

    /// The control plane's word that this node may read `scope`, to be shown to others.
    pub(super) async fn grant(&self, scope: &Scope) -> Option<Bytes> {
        let Scope::Repository(name) = scope else { return None };
        let lock = || self.known.grants.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((grant, until)) = lock().get(scope)
            && *until > Instant::now()
        {
            return grant.clone();
        }
        let (host, repository) = name.split_once('/')?;
        let origin = Origin { host: host.to_owned(), repository: repository.to_owned() };
        let asked = timeout(PATIENCE, self.ask_grant(&origin)).await.ok().flatten();
        let kept = if asked.is_some() { KEPT } else { KEPT_FAILURE };
        lock().insert(scope.clone(), (asked.clone(), Instant::now() + kept));
        asked
    }

    async fn ask_grant(&self, origin: &Origin) -> Option<Bytes> {
        let joined = self.joined()?;
        let mut manager = joined.member.manager(&self.settings.manager).await.ok()?;
        let authorization = self.rights.authorization(origin).await.unwrap_or_default();
        let request = GrantRequest {
            registry: origin.host.clone(),
            repository: origin.repository.clone(),
            authorization,
            ..GrantRequest::default()
        };
        match manager.grant(request).await {
            Ok(answer) => Some(answer.into_inner().grant.into()),
            Err(status) => {
                tracing::info!(%origin, error = status.message(), "no grant; the repository is read from the origin alone");
                None
            }
        }
    }
}
