//! What this node gives to others: pieces that it vouches for, have-maps, indexes; to those who may
//! have them.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use bytes::Bytes;
use skimmer_cache::{Blob, Cache, Held as HeldBlob};
use skimmer_identity::{Membership, PeerId, SignedValue};
use skimmer_proto::piece_table::piece_value;
use skimmer_proto::{Digest, PieceTable, Scope, TaskId};
use tokio::task::spawn_blocking;

use super::{Inner, unix_now};
use crate::plan::Peer;
use crate::transport::{Call, Held, Kind, PieceReader, Reason, Refusal, Reply, Request, Serve};

/// Grants remembered, over all peers.
const GRANTS: usize = 65_536;

/// Grants that were shown, either way.
#[derive(Debug, Default)]
pub struct Shown {
    /// By peers to this node: until when, Unix seconds.
    theirs: Mutex<HashMap<(PeerId, Scope), i64>>,
    /// By this node to peers that it is linked with.
    ours: Mutex<HashSet<(PeerId, Scope)>>,
}

impl Shown {
    pub fn is_new(&self, peer: &PeerId, scope: &Scope) -> bool {
        let ours = self.ours.lock().unwrap_or_else(PoisonError::into_inner);
        !ours.contains(&(*peer, scope.clone()))
    }

    pub fn note(&self, peer: &PeerId, scope: &Scope) {
        self.ours.lock().unwrap_or_else(PoisonError::into_inner).insert((*peer, scope.clone()));
    }

    /// The link is gone: the peer may have forgotten what it was shown.
    pub fn forget(&self, peer: &PeerId) {
        let mut ours = self.ours.lock().unwrap_or_else(PoisonError::into_inner);
        ours.retain(|(other, _)| other != peer);
    }

    fn take(&self, peer: PeerId, scope: Scope, expires: i64) {
        let mut theirs = self.theirs.lock().unwrap_or_else(PoisonError::into_inner);
        if theirs.len() >= GRANTS {
            let now = unix_now();
            theirs.retain(|_, until| *until >= now);
        }
        if theirs.len() < GRANTS {
            theirs.insert((peer, scope), expires);
        }
    }

    fn covers(&self, peer: &PeerId, scope: &Scope) -> bool {
        let theirs = self.theirs.lock().unwrap_or_else(PoisonError::into_inner);
        theirs.get(&(*peer, scope.clone())).is_some_and(|until| *until >= unix_now())
    }
}

/// This node to its peers.
pub struct Server {
    inner: Weak<Inner>,
}

impl Server {
    pub fn of(inner: &Arc<Inner>) -> Self {
        Self { inner: Arc::downgrade(inner) }
    }

    fn inner(&self) -> Result<Arc<Inner>, Refusal> {
        let stopping = || Refusal::new(Reason::Busy, "the node is stopping");
        self.inner.upgrade().ok_or_else(stopping)
    }
}

#[async_trait]
impl Serve for Server {
    async fn open(
        &self,
        from: &Membership,
        request: &Request,
    ) -> Result<Box<dyn PieceReader>, Refusal> {
        let inner = self.inner()?;
        let held = inner.readable(from, &request.scope, request.blob).await?;
        if held.blob.len() != request.len {
            return Err(Refusal::new(Reason::Invalid, "the blob has another length"));
        }
        let task = request.task();
        // The cache forgets a table that isn't on disk when it closes the blob.
        let proved = || inner.state().tasks.get(&task).and_then(|task| task.table.clone());
        let table = held.table.or_else(proved);
        Ok(Box::new(Reader { inner, task, blob: held.blob, table }))
    }

    async fn call(&self, from: &Membership, call: Call) -> Result<Reply, Refusal> {
        let inner = self.inner()?;
        match call {
            Call::Haves { task, haves } => {
                let peer = Peer(*from.peer.public_key());
                inner.hear_haves(task, peer, haves, true);
                Ok(Reply::Haves(inner.haves(&task)))
            }
            Call::Get { scope, blob, kind: Kind::Document, object } if blob == object => {
                inner.document(from, scope, blob).await.map(Reply::Object)
            }
            Call::Get { scope, blob, kind, object } => {
                inner.readable(from, &scope, blob).await?;
                inner.object(blob, kind, object).await.map(Reply::Object)
            }
            Call::ShowGrant(grant) => {
                let trust = inner.joined().map(|joined| Arc::clone(&joined.member.trust));
                let grant = trust.map(|t| t.check_grant(&from.cluster, &grant, unix_now()));
                match grant {
                    Some(Ok(grant)) if grant.peer == from.peer => {
                        inner.shown.take(grant.peer, grant.scope, grant.expires_unix);
                        Ok(Reply::Done)
                    }
                    Some(Err(error)) => Err(Refusal::new(Reason::Rights, error.to_string())),
                    _ => Err(Refusal::new(Reason::Rights, "the grant is another node's")),
                }
            }
        }
    }
}

impl Inner {
    /// Whether `from` has shown a right to read `scope`.
    pub(super) fn may_read(&self, from: &Membership, scope: &Scope) -> Result<(), Refusal> {
        if *scope == Scope::Public || self.shown.covers(&from.peer, scope) {
            return Ok(());
        }
        Err(Refusal::new(Reason::Rights, "no grant for the repository was shown"))
    }

    /// A blob that this node has and that `from` may read in `scope`.
    async fn readable(
        self: &Arc<Self>,
        from: &Membership,
        scope: &Scope,
        blob: Digest,
    ) -> Result<HeldBlob, Refusal> {
        self.may_read(from, scope)?;
        let absent = || Refusal::new(Reason::Absent, "");
        let cache = self.cache().ok_or_else(absent)?;
        let held = self.held(cache, blob).await.ok_or_else(absent)?;
        let task = TaskId::of(scope, &blob);
        let proved = self.state().tasks.get(&task).is_some_and(|task| task.proved);
        let (known, wanted) = (Arc::clone(&held.blob), scope.clone());
        let stored = move || known.scopes().contains(&wanted);
        // Another scope's bytes are as good as none.
        if proved || spawn_blocking(stored).await.unwrap_or(false) {
            Ok(held)
        } else {
            Err(absent())
        }
    }

    /// The blob with the table that vouches for its pieces, if there is one.
    pub(super) async fn held(&self, cache: Cache, blob: Digest) -> Option<HeldBlob> {
        let found = spawn_blocking(move || cache.held(blob)).await;
        match found {
            Ok(Ok(held)) => held,
            Ok(Err(error)) => {
                tracing::info!(error = &error as &dyn std::error::Error, "blob not served");
                None
            }
            Err(_) => None,
        }
    }

    /// A piece table or an index by its digest.
    async fn object(&self, blob: Digest, kind: Kind, object: Digest) -> Result<Bytes, Refusal> {
        let absent = || Refusal::new(Reason::Absent, "");
        let cache = self.cache().ok_or_else(absent)?;
        let read = move || {
            let objects = cache.layer(blob).ok()?.load().ok()??;
            let bytes = match kind {
                Kind::PieceTable => objects.table.encode(),
                Kind::LayerIndex => objects.index,
                Kind::Document => return None,
            };
            (Digest::of(&bytes) == object).then(|| Bytes::from(bytes))
        };
        spawn_blocking(read).await.ok().flatten().ok_or_else(absent)
    }
}

/// The blob may be served in these scopes from now on, also after a restart.
pub fn allow(inner: &Inner, blob: &Arc<Blob>, scopes: Vec<Scope>) {
    let blob = Arc::clone(blob);
    inner.runtime.spawn_blocking(move || {
        for scope in scopes {
            if let Err(error) = blob.allow(&scope) {
                tracing::warn!(blob = %blob.digest(), %error, "after a restart the blob will not be served");
            }
        }
    });
}

/// The pieces of one request.
struct Reader {
    inner: Arc<Inner>,
    task: TaskId,
    blob: Arc<Blob>,
    table: Option<Arc<PieceTable>>,
}

impl PieceReader for Reader {
    fn find(&mut self, piece: u32) -> io::Result<Held> {
        if self.table.is_none() {
            // The blob may have been proved meanwhile: whoever vouched for its pieces is forgotten then.
            let state = self.inner.state();
            self.table = state.tasks.get(&self.task).and_then(|task| task.table.clone());
        }
        let right = self.table.as_ref().and_then(|table| table.value(piece));
        if !self.blob.has(piece, None) {
            return Ok(Held::Absent);
        }
        if let Some(value) = right
            && self.blob.has(piece, self.table.as_deref())
        {
            return Ok(Held::Here(self.sign(piece, *value)));
        }
        // It came before there was a table, and hasn't been checked against it yet.
        let fits = |signed: &SignedValue| right.is_none_or(|right| signed.value == *right);
        let (signed, own) = {
            let state = self.inner.state();
            let task = state.tasks.get(&self.task);
            let signed = task.and_then(|task| task.values.get(&piece).cloned());
            (signed, task.is_some_and(|task| task.own.contains(piece)))
        };
        if signed.is_some() || !own {
            let signed = signed.filter(fits).and_then(|signed| self.renewed(signed));
            return Ok(signed.map_or(Held::Absent, |signed| Held::Here(Some(signed))));
        }
        let Some(bytes) = self.blob.read_piece(piece)? else { return Ok(Held::Absent) };
        let signed = self.sign(piece, piece_value(self.blob.geometry(), piece, &bytes));
        if !signed.as_ref().is_none_or(fits) {
            return Ok(Held::Absent);
        }
        if let (Some(signed), Some(task)) =
            (signed.clone(), self.inner.state().tasks.get_mut(&self.task))
        {
            task.vouch(signed);
        }
        Ok(Held::Here(signed))
    }

    fn read(&mut self, piece: u32, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.blob.read_at(buffer, self.blob.geometry().span(piece).start + offset)?;
        self.inner.metrics.served.inc_by(buffer.len() as u64);
        Ok(())
    }
}

impl Reader {
    fn sign(&self, piece: u32, value: [u8; 32]) -> Option<SignedValue> {
        self.inner.joined().map(|joined| joined.sign(self.task, piece, value))
    }

    /// What others can still check: this node's own word, with its certificate of today, or another's
    /// as long as that one's certificate holds.
    fn renewed(&self, signed: SignedValue) -> Option<SignedValue> {
        let joined = self.inner.joined()?;
        let own = joined.sign(self.task, signed.piece, signed.value);
        // A key signs a message in one way only.
        if own.signature == signed.signature {
            return Some(own);
        }
        let trust = &joined.member.trust;
        trust.check(&signed.certificate, unix_now()).is_ok().then_some(signed)
    }
}
