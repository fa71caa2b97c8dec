//! In which scope this node reads a blob, and by what right.
//!
//! A blob is public if its origin serves it to this node without credentials; otherwise it is read
//! in its repository's scope, for which other nodes want a grant. Answers are kept per repository.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use skimmer_cache::{BlobRef, Origin};
use skimmer_proto::control::GrantRequest;
use skimmer_proto::{Digest, Scope};
use tokio::time::timeout;
use tonic::Code;

use super::kept::Kept;
use super::{Inner, unix_now};
use crate::member::Member;

/// How long an answer of the origin or the control plane is kept.
const KEPT: Duration = Duration::from_secs(600);
/// How long a failure is.
const KEPT_FAILURE: Duration = Duration::from_secs(5);
/// Answers kept of each kind.
const ANSWERS: usize = 4096;
/// The origin gets so long to say whether it serves everybody.
const PATIENCE: Duration = Duration::from_secs(5);
/// The control plane gets so long for a grant, which may take it a question to the registry.
const GRANT_PATIENCE: Duration = Duration::from_secs(10);

/// What the origin says of this node's rights.
#[async_trait]
pub trait Rights: Send + Sync + 'static {
    /// Whether the origin serves the blob without credentials; `None` if it doesn't answer.
    async fn is_public(&self, blob: &BlobRef) -> Option<bool>;

    /// An Authorization header that the origin accepts for reading the repository, and `manifest`
    /// there if it is known. A secret: it is sent to the control plane and nowhere else, not even to
    /// a log.
    async fn authorization(&self, origin: &Origin, manifest: Option<Digest>) -> Option<String>;

    /// Whether only whoever asked says that the origin has this blob: what others took there for it
    /// may be something else, and they no liars.
    fn is_claimed(&self, blob: &BlobRef) -> bool;
}

/// A scope, and whether this node has itself proved that it may read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    pub scope: Scope,
    pub proved: bool,
}

#[derive(Debug)]
pub struct Known {
    standings: Kept<Origin, Standing>,
    grants: Kept<Scope, Option<Bytes>>,
    /// A manifest that this node has read in each repository: the registry can be asked for it.
    manifests: Kept<Origin, Digest>,
}

impl Default for Known {
    fn default() -> Self {
        Self {
            standings: Kept::new(ANSWERS),
            grants: Kept::new(ANSWERS),
            manifests: Kept::new(ANSWERS),
        }
    }
}

/// Why there is no grant.
enum NoGrant {
    /// The control plane says no.
    Denied,
    /// It can't be asked, or can't find out.
    Unknown,
}

impl Inner {
    /// In which scope the blob is read. One that isn't proved is read, but not served.
    pub(super) async fn standing(&self, blob: &BlobRef) -> Standing {
        let Some(origin) = blob.origins.first() else {
            return Standing { scope: Scope::Public, proved: false };
        };
        let known = &self.known.standings;
        if let Some(standing) = known.fresh(origin) {
            return standing;
        }
        // All layers of an image come at once: one asks for all.
        let _turn = known.turn(origin).await;
        if let Some(standing) = known.fresh(origin) {
            return standing;
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
                let public = Standing { scope: Scope::Public, proved: false };
                (known.last(origin).unwrap_or(public), KEPT_FAILURE)
            }
        };
        known.put(origin.clone(), standing.clone(), kept);
        standing
    }

    /// This node has read the manifest at `origin`.
    pub(super) fn note_manifest(&self, origin: &Origin, manifest: Digest) {
        self.known.manifests.put(origin.clone(), manifest, KEPT);
    }

    /// What other nodes had of `origin` was in `scope`: so it is read there while the origin says
    /// nothing.
    pub(super) fn suppose(&self, origin: &Origin, scope: &Scope) {
        let standing = Standing { scope: scope.clone(), proved: false };
        if self.known.standings.last(origin).is_none() {
            self.known.standings.put(origin.clone(), standing, Duration::ZERO);
        }
    }

    /// The control plane's word that this node may read `scope`, to be shown to others.
    pub(super) async fn grant(&self, scope: &Scope) -> Option<Bytes> {
        let Scope::Repository(name) = scope else { return None };
        let known = &self.known.grants;
        if let Some(grant) = known.fresh(scope) {
            return grant;
        }
        let (host, repository) = name.split_once('/')?;
        let origin = Origin { host: host.to_owned(), repository: repository.to_owned() };
        let asked = timeout(GRANT_PATIENCE, self.ask_grant(&origin)).await;
        let (grant, kept) = match asked.unwrap_or(Err(NoGrant::Unknown)) {
            Ok(grant) => (Some(grant), KEPT),
            Err(NoGrant::Denied) => (None, KEPT_FAILURE),
            Err(NoGrant::Unknown) => {
                let before = known.last(scope).flatten();
                (before.filter(|grant| self.is_running(grant)), KEPT_FAILURE)
            }
        };
        known.put(scope.clone(), grant.clone(), kept);
        grant
    }

    /// By policy if that is enough; else by asking the registry with this node's own credentials.
    async fn ask_grant(&self, origin: &Origin) -> Result<Bytes, NoGrant> {
        let joined = self.joined().ok_or(NoGrant::Unknown)?;
        let manager = joined.member.manager(&self.settings.manager).await;
        let mut manager = manager.map_err(|_| NoGrant::Unknown)?;
        let manifest = self.known.manifests.last(origin);
        let mut request = GrantRequest {
            registry: origin.host.clone(),
            repository: origin.repository.clone(),
            manifest: manifest.map(|digest| digest.to_string()).unwrap_or_default(),
            authorization: String::new(),
        };
        let mut answer = manager.grant(request.clone()).await;
        if answer.as_ref().is_err_and(|status| status.code() == Code::PermissionDenied)
            && let Some(secret) = self.rights.authorization(origin, manifest).await
        {
            request.authorization = secret;
            answer = manager.grant(request).await;
        }
        match answer {
            Ok(answer) => Ok(answer.into_inner().grant.into()),
            Err(status) => {
                tracing::info!(%origin, error = status.message(), "no grant; the repository is read from the origin alone");
                let denied = status.code() == Code::PermissionDenied;
                Err(if denied { NoGrant::Denied } else { NoGrant::Unknown })
            }
        }
    }

    fn is_running(&self, grant: &[u8]) -> bool {
        let Some(joined) = self.joined() else { return false };
        let Member { trust, cluster, .. } = &joined.member;
        trust.check_grant(cluster, grant, unix_now()).is_ok()
    }
}
