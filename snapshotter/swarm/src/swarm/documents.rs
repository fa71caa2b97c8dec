//! Manifests, image indexes and configurations by way of the swarm: by digest, whole, under the same
//! rights as blobs.
//!
//! A node keeps the documents of what it pulled, and announces them as tasks in the scope in which it
//! read them. Who looks for one asks the scheduler for holders; the digest is all that it need know.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use skimmer_cache::documents::{self, Kept};
use skimmer_cache::{BlobKind, BlobRef, Cache, Origin};
use skimmer_identity::Membership;
use skimmer_proto::control as wire;
use skimmer_proto::control::node_message::Message;
use skimmer_proto::{Digest, Geometry, PieceSet, Scope, TaskId};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::rights::Standing;
use super::{Inner, Swarm, convert};
use crate::transport::{Call, Kind, Reason, Refusal, Reply};

/// The scheduler, the control plane and the holders get so long, together.
const PATIENCE: Duration = Duration::from_secs(10);
/// Holders that are asked for one document.
const ASKED: usize = 4;

impl Swarm {
    /// The document from another node; it matches its digest. `origin` is where it belongs: it says
    /// which rights are shown.
    pub async fn find_document(&self, origin: &Origin, digest: Digest) -> Option<Bytes> {
        let inner = &self.inner;
        inner.state().outbox.as_ref()?;
        timeout(PATIENCE, inner.find_document(origin, digest)).await.ok().flatten()
    }

    /// The length of a public blob that other nodes have whole.
    pub async fn find_len(&self, blob: Digest) -> Option<u64> {
        let inner = &self.inner;
        inner.state().outbox.as_ref()?;
        let found = inner.found_whole(blob, &Scope::Public).await?;
        (!found.holders.is_empty()).then_some(found.len)
    }

    /// This node has read the manifest with this digest at `origin`: by it the control plane can find
    /// out whether it may.
    pub fn note_manifest(&self, origin: &Origin, manifest: Digest) {
        self.inner.note_manifest(origin, manifest);
    }

    /// Keeps documents of the repository `origin`, and serves them to who may read it. `sample` is a
    /// blob there, by which the origin is asked whether anybody may.
    pub async fn keep_documents(&self, sample: &BlobRef, documents: Vec<(Digest, Bytes)>) {
        let Standing { scope, proved } = self.inner.standing(sample).await;
        for (digest, bytes) in documents {
            self.inner.keep_document(digest, bytes, proved.then_some(&scope)).await;
        }
    }
}

impl Inner {
    async fn find_document(self: &Arc<Self>, origin: &Origin, digest: Digest) -> Option<Bytes> {
        let private = Scope::Repository(origin.to_string());
        let (public, own) =
            tokio::join!(self.holders(digest, &Scope::Public), self.holders(digest, &private));
        for (scope, holders) in [(Scope::Public, public), (private, own)] {
            for holder in holders.iter().take(ASKED) {
                if let Some(bytes) = self.get_document(holder, &scope, digest).await {
                    self.suppose(origin, &scope);
                    self.keep_document(digest, bytes.clone(), None).await;
                    return Some(bytes);
                }
            }
        }
        None
    }

    async fn holders(&self, digest: Digest, scope: &Scope) -> Vec<wire::Peer> {
        let found = self.found_whole(digest, scope).await;
        found.map(|found| found.holders).unwrap_or_default()
    }

    /// Who has all of a blob whose length isn't known here.
    async fn found_whole(&self, digest: Digest, scope: &Scope) -> Option<wire::Found> {
        let blob = BlobRef { digest, len: 0, kind: BlobKind::Blob, origins: Vec::new() };
        let task = TaskId::of(scope, &digest);
        self.ask_scheduler(task, convert::task_of(&blob, scope)).await
    }

    async fn get_document(
        &self,
        holder: &wire::Peer,
        scope: &Scope,
        digest: Digest,
    ) -> Option<Bytes> {
        let peer = self.meet(holder)?;
        let joined = self.joined()?;
        joined.transport.connect(&peer, &self.addresses(&peer)).await.ok()?;
        self.show_grant(&joined, &peer, scope).await.ok()?;
        let (scope, kind) = (scope.clone(), Kind::Document);
        let get = Call::Get { scope, blob: digest, kind, object: digest };
        match joined.transport.call(&peer, get).await {
            Ok(Reply::Object(bytes)) if bytes.len() <= documents::MAX_DOCUMENT => {
                self.metrics.received.inc_by(bytes.len() as u64);
                Some(bytes)
            }
            answer => {
                tracing::debug!(%peer, %digest, ?answer, "no document from there");
                None
            }
        }
    }

    async fn keep_document(&self, digest: Digest, bytes: Bytes, scope: Option<&Scope>) {
        let Some(cache) = self.cache() else { return };
        let (len, of) = (bytes.len() as u64, scope.cloned());
        let put = move || cache.documents().put(digest, &bytes, of.as_ref());
        let gone = match spawn_blocking(put).await {
            Ok(Ok(gone)) => gone,
            Ok(Err(error)) => {
                let error = &error as &dyn std::error::Error;
                tracing::info!(error, "a document is not kept for other nodes");
                return;
            }
            Err(_) => return,
        };
        for kept in gone {
            for scope in kept.scopes {
                let task = TaskId::of(&scope, &kept.digest).as_bytes().to_vec();
                self.tell(convert::message(Message::Withdraw(wire::Withdraw {
                    task,
                    pieces: None,
                })));
            }
        }
        let scopes = BTreeSet::from_iter(scope.cloned());
        for message in announcements(&Kept { digest, len, scopes }) {
            self.tell(message);
        }
    }

    /// A document to a peer that has shown what it has to.
    pub(super) async fn document(
        &self,
        from: &Membership,
        scope: Scope,
        digest: Digest,
    ) -> Result<Bytes, Refusal> {
        self.may_read(from, &scope)?;
        let absent = || Refusal::new(Reason::Absent, "");
        let cache = self.cache().ok_or_else(absent)?;
        let read = spawn_blocking(move || cache.documents().get(digest)).await;
        match read {
            Ok(Ok(Some((bytes, scopes)))) if scopes.contains(&scope) => {
                self.metrics.served.inc_by(bytes.len() as u64);
                Ok(bytes)
            }
            Ok(Err(error)) => {
                let error = &error as &dyn std::error::Error;
                tracing::info!(error, "a document is not served");
                Err(absent())
            }
            _ => Err(absent()),
        }
    }
}

/// What a new stream is told of the documents that are here.
pub fn announce_all(cache: &Cache) -> Vec<wire::NodeMessage> {
    cache.documents().list().iter().flat_map(announcements).collect()
}

/// One message for each scope in which the document may be served.
fn announcements(kept: &Kept) -> impl Iterator<Item = wire::NodeMessage> {
    let Kept { digest, len, .. } = *kept;
    let blob = BlobRef { digest, len, kind: BlobKind::Blob, origins: Vec::new() };
    let pieces = Geometry::of(len).map(|geometry| PieceSet::all(geometry.pieces()));
    let pieces = pieces.unwrap_or_default();
    kept.scopes.iter().map(move |scope| {
        let (task, pieces) = (convert::task_of(&blob, scope), convert::runs(&pieces));
        let announce = wire::Announce { task: Some(task), pieces: Some(pieces) };
        convert::message(Message::Announce(announce))
    })
}
