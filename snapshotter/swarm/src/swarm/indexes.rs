//! Layer indexes by way of the swarm: signed records at the scheduler, the objects from peers.
//!
//! A record is believed if a seed peer signed it, or two distinct nodes signed the same table.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use skimmer_cache::BlobRef;
use skimmer_identity::{PeerId, Role, statement};
use skimmer_proto::control::node_message::Message;
use skimmer_proto::control::{self as wire, NodeMessage};
use skimmer_proto::{Digest, PieceTable, Scope, TaskId};
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::rights::Standing;
use super::{Inner, Swarm, convert, unix_now};
use crate::transport::{Call, Kind, Reply};

/// The scheduler and the holders get so long, together, before a layer is pulled through instead.
const PATIENCE: Duration = Duration::from_secs(10);
/// The scheduler alone.
const ANSWER: Duration = Duration::from_secs(2);

/// Nodes that must have said the same where none is a seed peer.
const WITNESSES: usize = 2;

/// Wrong tables remembered.
const LIES: usize = 1024;

/// Blobs of which it is remembered who vouched for them.
const BELIEVED: usize = 16_384;

/// Called with a blob and its table's digest when both have been found to be lies.
pub type OnPurge = Box<dyn Fn(Digest, Digest) + Send + Sync>;

/// The table of a blob that this node has itself read and checked from end to end. Blocks.
pub type Prove = Box<dyn Fn(Digest) -> Option<PieceTable> + Send + Sync>;

/// What was asked of the scheduler, and what was said to it.
#[derive(Default)]
pub struct Found {
    waits: Mutex<HashMap<TaskId, Vec<oneshot::Sender<wire::Found>>>>,
    /// What this node vouches for, by blob: the task and the table's digest. It is signed when it is said.
    published: Mutex<BTreeMap<Digest, (wire::Task, Digest)>>,
    /// Who vouched for what this node believed and hasn't seen for itself.
    believed: Mutex<BTreeMap<Digest, (Digest, BTreeSet<PeerId>)>>,
    /// Tables that this node has found to be wrong, the first found first.
    lies: Mutex<VecDeque<Digest>>,
    on_purge: OnceLock<OnPurge>,
    prove_by: OnceLock<Prove>,
}

/// A table and an index that belong together.
#[derive(Clone, Debug)]
pub struct Objects {
    pub table: PieceTable,
    /// Encoded.
    pub index: Vec<u8>,
}

impl Found {
    /// The table isn't believed again, whoever vouches for it.
    fn remember_lie(&self, table: Digest) {
        let mut lies = lock(&self.lies);
        if lies.len() >= LIES {
            lies.pop_front();
        }
        lies.push_back(table);
    }

    fn is_lie(&self, table: &Digest) -> bool {
        lock(&self.lies).contains(table)
    }

    fn believe(&self, blob: Digest, table: Digest, signers: BTreeSet<PeerId>) {
        let mut believed = lock(&self.believed);
        believed.insert(blob, (table, signers));
        if believed.len() > BELIEVED {
            believed.pop_first();
        }
    }

    /// The blob is gone: nobody gets its index from here.
    pub(super) fn forget(&self, blob: &Digest) {
        lock(&self.published).remove(blob);
    }
}

impl Swarm {
    /// A trusted index of the blob, if the swarm has one.
    pub async fn find_index(&self, blob: &BlobRef) -> Option<Objects> {
        let inner = &self.inner;
        if inner.state().outbox.is_none() || inner.is_distrusted(blob.digest) {
            return None;
        }
        timeout(PATIENCE, inner.find_index(blob)).await.ok().flatten()
    }

    /// This node has read the whole blob, and it decodes as `table` says.
    pub async fn publish_index(&self, blob: &BlobRef, table: &PieceTable) {
        let inner = &self.inner;
        lock(&inner.indexes.believed).remove(&blob.digest);
        if inner.joined().is_none() {
            return;
        }
        let Standing { scope, proved } = inner.standing(blob).await;
        if proved && let Some(stated) = inner.state_index(blob, &scope, table) {
            inner.tell(stated);
        }
    }

    /// By what this node knows, after a restart, what it had read before. Set once.
    pub fn prove_by(&self, prove: Prove) {
        // The first one stays.
        let _ = self.inner.indexes.prove_by.set(prove);
    }

    /// What the swarm said of the blob has turned out wrong.
    pub fn accuse(&self, blob: Digest, scope_of: &BlobRef) {
        let (swarm, scope_of) = (self.clone(), scope_of.clone());
        self.inner.runtime.spawn(async move {
            let inner = &swarm.inner;
            let Some((table, signers)) = lock(&inner.indexes.believed).remove(&blob) else {
                return;
            };
            inner.indexes.remember_lie(table);
            let standing = inner.standing(&scope_of).await;
            let task = TaskId::of(&standing.scope, &blob);
            for signer in signers {
                tracing::error!(peer = %signer, %blob, "a node vouched for an index that is wrong");
                let failed = wire::Failed {
                    task: task.as_bytes().to_vec(),
                    pieces: None,
                    parent: signer.to_bytes().to_vec(),
                    fault: wire::Fault::Corrupt.into(),
                    detail: format!("index {table}"),
                };
                let message = Message::Failed(failed);
                inner.tell(NodeMessage { message: Some(message) });
            }
        });
    }

    /// What is done when the control plane says that an index is a lie. Set once.
    pub fn on_purge(&self, purge: OnPurge) {
        // The first one stays.
        let _ = self.inner.indexes.on_purge.set(purge);
    }
}

impl Inner {
    pub(super) fn tell(&self, message: NodeMessage) {
        self.state().tell(message);
    }

    /// This node's word for a table, which it gives again to each scheduler and with each certificate.
    fn state_index(
        &self,
        blob: &BlobRef,
        scope: &Scope,
        table: &PieceTable,
    ) -> Option<NodeMessage> {
        let kept = (convert::task_of(blob, scope), Digest::of(&table.encode()));
        lock(&self.indexes.published).insert(blob.digest, kept);
        self.stated(&blob.digest)
    }

    /// What this node vouches for of a blob, with its certificate of the moment.
    fn stated(&self, blob: &Digest) -> Option<NodeMessage> {
        let (task, table) = lock(&self.indexes.published).get(blob).cloned()?;
        let joined = self.joined()?;
        let credentials = &joined.member.credentials;
        let certificate = credentials.certificate();
        let record = statement::sign_index(credentials.key(), &certificate, blob, &table);
        let publish = wire::Publish { task: Some(task), record: Some(record) };
        Some(convert::message(Message::Publish(publish)))
    }

    /// Says again all that this node vouches for: to a new scheduler, or with a new certificate.
    pub(super) async fn state_again(&self, outbox: &mpsc::Sender<NodeMessage>) {
        let blobs: Vec<Digest> = lock(&self.indexes.published).keys().copied().collect();
        for blob in blobs {
            // It may be gone meanwhile.
            let Some(stated) = self.stated(&blob) else { continue };
            if outbox.send(stated).await.is_err() {
                return;
            }
        }
    }

    /// What this node read before it was started, if it hasn't said so yet.
    pub(super) async fn restate_index(self: &Arc<Self>, digest: Digest) -> Option<NodeMessage> {
        if lock(&self.indexes.published).contains_key(&digest) {
            return None;
        }
        let of_task = |state: &super::State| {
            let ids = state.of_blob.get(&digest)?;
            let task = ids.iter().filter_map(|id| state.tasks.get(id)).find(|task| task.proved)?;
            Some((task.blob.clone(), task.scope.clone()))
        };
        let (blob, scope) = of_task(&self.state())?;
        let this = Arc::clone(self);
        let prove = move || this.indexes.prove_by.get().and_then(|prove| prove(digest));
        let table = spawn_blocking(prove).await.ok().flatten()?;
        self.state_index(&blob, &scope, &table)
    }

    /// A new stream: what the old one was asked it doesn't answer any more. Whoever waits pulls through.
    pub(super) fn give_up_waits(&self) {
        lock(&self.indexes.waits).clear();
    }

    pub(super) fn found(&self, found: wire::Found) {
        let Some(task) = convert::task_id(&found.task) else { return };
        for wait in lock(&self.indexes.waits).remove(&task).unwrap_or_default() {
            // It may have given up.
            let _ = wait.send(found.clone());
        }
    }

    /// What the scheduler knows of a task.
    pub(super) async fn ask_scheduler(&self, task: TaskId, of: wire::Task) -> Option<wire::Found> {
        let (sender, answer) = oneshot::channel();
        lock(&self.indexes.waits).entry(task).or_default().push(sender);
        self.tell(convert::message(Message::Find(wire::Find { task: Some(of) })));
        timeout(ANSWER, answer).await.ok()?.ok()
    }

    async fn find_index(&self, blob: &BlobRef) -> Option<Objects> {
        let Standing { scope, .. } = self.standing(blob).await;
        let task = TaskId::of(&scope, &blob.digest);
        let found = self.ask_scheduler(task, convert::task_of(blob, &scope)).await?;
        let (table, signers) = self.believable(blob, &found.records)?;
        for holder in &found.holders {
            let Some(peer) = self.meet(holder) else { continue };
            match self.get_objects(&peer, blob, &scope, table).await {
                Some(objects) => {
                    self.indexes.believe(blob.digest, table, signers);
                    return Some(objects);
                }
                None => tracing::debug!(%peer, blob = %blob.digest, "no index from there"),
            }
        }
        None
    }

    /// The digest of the table to believe, and who signed it.
    pub(super) fn believable(
        &self,
        blob: &BlobRef,
        records: &[wire::IndexRecord],
    ) -> Option<(Digest, BTreeSet<PeerId>)> {
        let trust = Arc::clone(&self.joined()?.member.trust);
        let mut by_table: BTreeMap<Digest, (bool, BTreeSet<PeerId>)> = BTreeMap::new();
        for record in records {
            match statement::check_index(record, &trust, unix_now()) {
                Ok(checked) if self.indexes.is_lie(&checked.table) => {}
                Ok(checked) if checked.blob == blob.digest => {
                    let (seed, signers) = by_table.entry(checked.table).or_default();
                    *seed |= checked.signer.role == Role::Seed;
                    signers.insert(checked.signer.peer);
                }
                Ok(_) => {}
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::info!(blob = %blob.digest, error, "an index record isn't believed");
                }
            }
        }
        let enough = |(_, (seed, signers)): &(Digest, (bool, BTreeSet<PeerId>))| {
            *seed || signers.len() >= WITNESSES
        };
        let best = by_table
            .into_iter()
            .filter(enough)
            .max_by_key(|(table, (seed, signers))| (*seed, signers.len(), *table));
        best.map(|(table, (_, signers))| (table, signers))
    }

    async fn get_objects(
        &self,
        peer: &PeerId,
        blob: &BlobRef,
        scope: &Scope,
        table: Digest,
    ) -> Option<Objects> {
        let joined = self.joined()?;
        joined.transport.connect(peer, &self.addresses(peer)).await.ok()?;
        self.show_grant(&joined, peer, scope).await.ok()?;
        let get = async |kind, object| -> Option<Bytes> {
            let call = Call::Get { scope: scope.clone(), blob: blob.digest, kind, object };
            match joined.transport.call(peer, call).await {
                Ok(Reply::Object(bytes)) => Some(bytes),
                _ => None,
            }
        };
        let table = PieceTable::decode(&get(Kind::PieceTable, table).await?).ok()?;
        if table.blob != blob.digest || table.geometry.blob_len() != blob.len {
            return None;
        }
        let index = get(Kind::LayerIndex, table.index).await?.to_vec();
        Some(Objects { table, index })
    }

    /// The control plane says that a record is a lie.
    pub(super) fn purge(&self, purge: wire::Purge) {
        let table = purge.table.try_into().map(Digest::from_bytes).ok();
        let Some(((blob, ..), table)) = convert::task(purge.task).zip(table) else { return };
        tracing::warn!(%blob, reason = purge.reason, "the control plane purges an index");
        lock(&self.indexes.believed).remove(&blob);
        if let Some(act) = self.indexes.on_purge.get() {
            act(blob, table);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
