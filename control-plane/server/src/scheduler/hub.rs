//! The clusters that this process schedules: one owner each, started when the first node comes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use skimmer_identity::PeerId;
use skimmer_manager::Manager;
use skimmer_proto::TaskId;
use skimmer_scheduler::Limits;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::cluster::{Command, Detail, Errand, INBOX, Owner, TaskRow};
use super::metrics::Metrics;
use crate::clock::unix_now;
use crate::directory::Directory;

/// Things to write down that may wait, of all clusters.
const ERRANDS: usize = 1024;

pub struct Hub {
    manager: Arc<Manager>,
    directory: Arc<Directory>,
    metrics: Metrics,
    epoch: u64,
    /// By cluster id.
    owners: Mutex<BTreeMap<String, mpsc::Sender<Command>>>,
    /// Ends every stream.
    stop: CancellationToken,
}

impl Hub {
    pub fn new(
        manager: Arc<Manager>,
        directory: Arc<Directory>,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Arc<Self> {
        // Later than any epoch before, if the clock doesn't go back.
        let epoch = u64::try_from(unix_now()).unwrap_or(0);
        Arc::new(Self { manager, directory, metrics, epoch, owners: Mutex::default(), stop })
    }

    pub const fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    pub const fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    pub const fn manager(&self) -> &Arc<Manager> {
        &self.manager
    }

    /// The owner of the cluster with this id, which is known to exist.
    pub fn owner(&self, cluster: &str) -> mpsc::Sender<Command> {
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(owner) = owners.get(cluster) {
            return owner.clone();
        }
        let (commands, inbox) = mpsc::channel(INBOX);
        let (errands, errand) = mpsc::channel(ERRANDS);
        let owner = Owner::new(Limits::default(), self.metrics.of(cluster), errands, self.epoch);
        tokio::spawn(owner.run(inbox));
        let (manager, directory) = (Arc::clone(&self.manager), Arc::clone(&self.directory));
        tokio::spawn(run_errands(manager, Arc::clone(&directory), cluster.to_owned(), errand));
        tokio::spawn(pass_blocked(directory, cluster.to_owned(), commands.downgrade()));
        owners.insert(cluster.to_owned(), commands.clone());
        commands
    }

    fn owners(&self) -> Vec<(String, mpsc::Sender<Command>)> {
        let owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        owners.iter().map(|(cluster, owner)| (cluster.clone(), owner.clone())).collect()
    }

    /// The connected nodes of all clusters.
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
