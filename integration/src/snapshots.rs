//! containerd's snapshot service as a client of containerd sees it.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CleanupRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UsageRequest, UsageResponse, ViewSnapshotRequest,
};
use containerd_client::types::Mount;
use containerd_client::with_namespace;
use tokio::runtime::Runtime;
use tonic::Request;
use tonic::transport::Channel;

use crate::ctr::unique;
use crate::mounts::{self, Mounted};

/// How often the removal of a view is tried.
const REMOVALS: u32 = 5;

/// The service at a socket: containerd's, or a snapshotter's own.
pub struct Snapshots {
    runtime: Runtime,
    client: SnapshotsClient<Channel>,
    snapshotter: String,
}

/// A snapshot that is mounted for as long as this is held.
pub struct View {
    // Unmounted first, because the snapshot can't be removed while it is in use.
    mounted: Vec<Mounted>,
    key: String,
    snapshots: Snapshots,
}

impl Snapshots {
    pub fn connect(socket: &Path, snapshotter: &str) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime
            .block_on(containerd_client::connect(socket))
            .with_context(|| format!("connect to {}", socket.display()))?;
        Ok(Self {
            runtime,
            client: SnapshotsClient::new(channel),
            snapshotter: snapshotter.to_owned(),
        })
    }

    pub fn list(&mut self, filters: &[&str]) -> anyhow::Result<Vec<Info>> {
        let request = ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            filters: filters.iter().map(|&filter| filter.to_owned()).collect(),
        };
        let client = &mut self.client;
        self.runtime.block_on(async {
            let mut stream = client.list(with_namespace!(request, "default")).await?.into_inner();
            let mut all = Vec::new();
            while let Some(part) = stream.message().await? {
                all.extend(part.info);
            }
            Ok(all)
        })
    }

    pub fn stat(&mut self, key: &str) -> Result<Info, tonic::Status> {
        let request =
            StatSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        let reply = self.runtime.block_on(self.client.stat(with_namespace!(request, "default")))?;
        reply.into_inner().info.ok_or_else(|| tonic::Status::internal("no info in the reply"))
    }

    pub fn usage(&mut self, key: &str) -> anyhow::Result<UsageResponse> {
        let request = UsageRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        Ok(self
            .runtime
            .block_on(self.client.usage(with_namespace!(request, "default")))?
            .into_inner())
    }

    pub fn mounts(&mut self, key: &str) -> anyhow::Result<Vec<Mount>> {
        let request = MountsRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        Ok(self
            .runtime
            .block_on(self.client.mounts(with_namespace!(request, "default")))?
            .into_inner()
            .mounts)
    }

    pub fn prepare(
        &mut self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> anyhow::Result<Vec<Mount>> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        Ok(self
            .runtime
            .block_on(self.client.prepare(with_namespace!(request, "default")))?
            .into_inner()
            .mounts)
    }

    pub fn remove(&mut self, key: &str) -> anyhow::Result<()> {
        let request =
            RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        self.runtime.block_on(self.client.remove(with_namespace!(request, "default")))?;
        Ok(())
    }

    /// Has the snapshotter delete what was removed, and waits for that.
    pub fn cleanup(&mut self) -> anyhow::Result<()> {
        let request = CleanupRequest { snapshotter: self.snapshotter.clone() };
        self.runtime.block_on(self.client.cleanup(with_namespace!(request, "default")))?;
        Ok(())
    }

    /// Mounts a read-only view of the snapshot `parent` at `target`.
    pub fn view(mut self, parent: &str, target: &Path) -> anyhow::Result<View> {
        let key = format!("view-{}", unique());
        let request = ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.clone(),
            parent: parent.to_owned(),
            labels: HashMap::new(),
        };
        let reply = self
            .runtime
            .block_on(self.client.view(with_namespace!(request, "default")))
            .with_context(|| format!("view {parent}"))?;
        let mut view = View { mounted: Vec::new(), key, snapshots: self };
        for part in reply.into_inner().mounts {
            view.mounted.push(mounts::mount(&part.r#type, &part.source, &part.options, target)?);
        }
        Ok(view)
    }
}

impl View {
    pub fn path(&self) -> &Path {
        self.mounted.last().map_or(Path::new("/nonexistent"), Mounted::path)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.mounted.clear();
        for _ in 0..REMOVALS {
            let Err(error) = self.snapshots.remove(&self.key) else { return };
            // A snapshotter that is gone has no snapshot left to remove; a busy one may have yet.
            println!("view {} not removed: {error:#}", self.key);
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
