//! The clusters that this process schedules: one owner each, started when the first node comes.
//!
//! All of it is of one *world*: it lasts while the same schedulers run. When one comes or goes, every
//! stream is closed, all that was learned is dropped, and the nodes come again with what they have:
//! so no task has two owners, and none is planned by what its former owner knew.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use skimmer_identity::PeerId;
use skimmer_manager::Manager;
use skimmer_proto::TaskId;
use skimmer_scheduler::Limits;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::cluster::{Command, Detail, Errand, INBOX, Owner, TaskRow};
use super::front::Front;
use super::metrics::Metrics;
use super::ring::Ring;
use crate::clock::unix_now;
use crate::directory::Directory;

/// Things to write down that may wait, of all clusters.
const ERRANDS: usize = 1024;

pub struct Hub {
    manager: Arc<Manager>,
    directory: Arc<Directory>,
    metrics: Metrics,
    world: Mutex<Arc<World>>,
    /// Ends every stream.
    stop: CancellationToken,
}

/// See the module.
pub struct World {
    pub ring: Arc<Ring>,
    pub end: CancellationToken,
    epoch: u64,
    /// By cluster id.
    clusters: Mutex<BTreeMap<String, Cluster>>,
}

#[derive(Clone)]
struct Cluster {
    owner: mpsc::Sender<Command>,
    /// `None` where there are no other schedulers.
    front: Option<Arc<Front>>,
}

impl Hub {
    /// Follows `ring` for as long as `stop` isn't cancelled.
    pub fn new(
        manager: Arc<Manager>,
        directory: Arc<Directory>,
        metrics: Metrics,
        ring: watch::Receiver<Arc<Ring>>,
        stop: CancellationToken,
    ) -> Arc<Self> {
        // Later than any epoch before, if the clock doesn't go back.
        let epoch = u64::try_from(unix_now()).unwrap_or(0);
        let world = Arc::new(World::new(Arc::clone(&ring.borrow()), epoch, &stop));
        let hub = Self { manager, directory, metrics, world: Mutex::new(world), stop };
        let hub = Arc::new(hub);
        let follow = Arc::clone(&hub).follow(ring);
        tokio::spawn(hub.stop.clone().run_until_cancelled_owned(follow));
        hub
    }

    pub const fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    pub const fn manager(&self) -> &Arc<Manager> {
        &self.manager
    }

    pub fn world(&self) -> Arc<World> {
        Arc::clone(&self.world.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn follow(self: Arc<Self>, mut ring: watch::Receiver<Arc<Ring>>) {
        while ring.changed().await.is_ok() {
            let ring = Arc::clone(&ring.borrow_and_update());
            let mut world = self.world.lock().unwrap_or_else(PoisonError::into_inner);
            let epoch = u64::try_from(unix_now()).unwrap_or(0).max(world.epoch + 1);
            let ended =
                std::mem::replace(&mut *world, Arc::new(World::new(ring, epoch, &self.stop)));
            drop(world);
            ended.end.cancel();
        }
    }

    fn owners(&self) -> Vec<(String, mpsc::Sender<Command>)> {
        let world = self.world();
        let clusters = world.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        clusters.iter().map(|(id, cluster)| (id.clone(), cluster.owner.clone())).collect()
    }

    /// The nodes of all clusters that attend here or speak through another scheduler.
    pub async fn peers(&self) -> BTreeSet<PeerId> {
        let mut all = BTreeSet::new();
        for (_, owner) in self.owners() {
            all.extend(
                ask(&owner, |answer| Command::ListPeers { answer }).await.unwrap_or_default(),
            );
        }
        all
    }

    /// The tasks of the cluster with this id, or of all, each with its cluster's id.
    pub async fn tasks(&self, cluster: Option<&str>) -> Vec<(String, TaskRow)> {
        let mut all = Vec::new();
        for (id, owner) in self.owners() {
            if cluster.is_none_or(|cluster| cluster == id) {
                let rows = ask(&owner, |answer| Command::ListTasks { answer }).await;
                all.extend(rows.into_iter().flatten().map(|row| (id.clone(), row)));
            }
        }
        all
    }

    pub async fn task(&self, cluster: &str, id: TaskId) -> Option<Detail> {
        let (_, owner) = self.owners().into_iter().find(|(known, _)| known == cluster)?;
        ask(&owner, |answer| Command::ShowTask { id, answer }).await?
    }
}

impl World {
    fn new(ring: Arc<Ring>, epoch: u64, stop: &CancellationToken) -> Self {
        Self { ring, end: stop.child_token(), epoch, clusters: Mutex::default() }
    }

    /// The owner of the cluster with this id, which is known to exist.
    pub fn owner(&self, hub: &Hub, cluster: &str) -> mpsc::Sender<Command> {
        self.cluster(hub, cluster).owner
    }

    /// The way to the other schedulers, if there are any.
    pub fn front(&self, hub: &Hub, cluster: &str) -> Option<Arc<Front>> {
        self.cluster(hub, cluster).front
    }

    fn cluster(&self, hub: &Hub, id: &str) -> Cluster {
        let mut clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = clusters.get(id) {
            return known.clone();
        }
        let (commands, inbox) = mpsc::channel(INBOX);
        let (errands, errand) = mpsc::channel(ERRANDS);
        let owner = Owner::new(Limits::default(), hub.metrics.of(id), errands, self.epoch);
        tokio::spawn(owner.run(inbox));
        let (manager, directory) = (Arc::clone(&hub.manager), Arc::clone(&hub.directory));
        tokio::spawn(run_errands(manager, Arc::clone(&directory), id.to_owned(), errand));
        tokio::spawn(pass_blocked(directory, id.to_owned(), commands.downgrade()));
        let front = || Front::new(Arc::clone(&self.ring), &hub.manager, id, &self.end);
        let front = (!self.ring.is_alone()).then(front);
        let cluster = Cluster { owner: commands, front };
        clusters.insert(id.to_owned(), cluster.clone());
        cluster
    }
}

async fn ask<T>(
    owner: &mpsc::Sender<Command>,
    question: impl FnOnce(oneshot::Sender<T>) -> Command,
) -> Option<T> {
    let (answer, answered) = oneshot::channel();
    owner.send(question(answer)).await.ok()?;
    answered.await.ok()
}

/// Tells the owner who is out, now and whenever that changes.
async fn pass_blocked(
    directory: Arc<Directory>,
    cluster: String,
    owner: mpsc::WeakSender<Command>,
) {
    let mut blocked = directory.blocked();
    loop {
        let peers = blocked.borrow_and_update().get(&cluster).cloned().unwrap_or_default();
        let Some(owner) = owner.upgrade() else { return };
        if owner.send(Command::Blocked { peers }).await.is_err() {
            return;
        }
        drop(owner);
        if blocked.changed().await.is_err() {
            return;
        }
    }
}

async fn run_errands(
    manager: Arc<Manager>,
    directory: Arc<Directory>,
    cluster: String,
    mut errands: mpsc::Receiver<Errand>,
) {
    while let Some(errand) = errands.recv().await {
        let done = match errand {
            Errand::Note(what) => manager.note(&cluster, what, unix_now()).await,
            Errand::Revoke { peers, reason } => {
                let mut done = Ok(());
                for peer in peers {
                    let revoked = manager.revoke(&peer.to_string(), &reason, unix_now()).await;
                    done = done.and(revoked.map(|_| ()));
                }
                done.and(directory.refresh().await)
            }
        };
        if let Err(error) = done {
            let error = anyhow::Error::from(error);
            tracing::error!(
                cluster,
                error = format!("{error:#}"),
                "write down what the scheduler found"
            );
        }
    }
}
