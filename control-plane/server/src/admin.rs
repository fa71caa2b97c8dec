//! The administration service on a unix socket: what `skimmer cluster`, `token`, `node`, `task` and
//! `event` ask. Whoever may open the socket may do everything.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use skimmer_control_store as store;
use skimmer_manager::Manager;
use skimmer_proto::control::{self, admin_server};
use tonic::{Request, Response, Status};

use crate::clock::unix_now;
use crate::directory::Directory;
use crate::manager::status;
use crate::scheduler::{Detail, Hub, TaskRow};

/// Events that one answer lists.
const MAX_EVENTS: u32 = 1000;
const MAX_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

pub struct Service {
    pub manager: Arc<Manager>,
    pub directory: Arc<Directory>,
    /// `None`: this process doesn't schedule.
    pub hub: Option<Arc<Hub>>,
}

impl Service {
    fn hub(&self) -> Result<&Hub, Status> {
        self.hub.as_deref().ok_or_else(|| {
            Status::unavailable(
                "this process has only the role of a manager; ask a scheduler's socket",
            )
        })
    }

    /// The id of the cluster called `name`; `None` for an empty name.
    async fn cluster_id(&self, name: &str) -> Result<Option<String>, Status> {
        if name.is_empty() {
            return Ok(None);
        }
        Ok(Some(self.manager.cluster(name).await.map_err(status)?.id))
    }

    /// Names of clusters by their ids.
    async fn names(&self) -> Result<BTreeMap<String, String>, Status> {
        let clusters = self.manager.clusters().await.map_err(status)?;
        Ok(clusters.into_iter().map(|cluster| (cluster.id, cluster.name)).collect())
    }

    async fn describe(&self, cluster: store::Cluster) -> Result<control::Cluster, Status> {
        let nodes = self.manager.nodes(Some(&cluster.id)).await.map_err(status)?;
        let nodes = nodes.iter().filter(|node| node.revoked.is_none()).count();
        Ok(control::Cluster {
            name: cluster.name,
            id: cluster.id,
            repositories: cluster.repositories,
            nodes: u32::try_from(nodes).unwrap_or(u32::MAX),
        })
    }
}

#[tonic::async_trait]
impl admin_server::Admin for Service {
    async fn create_cluster(
        &self,
        request: Request<control::CreateClusterRequest>,
    ) -> Result<Response<control::Cluster>, Status> {
        let name = request.into_inner().name;
        let cluster = self.manager.create_cluster(&name, unix_now()).await.map_err(status)?;
        self.directory.refresh().await.map_err(status)?;
        Ok(Response::new(self.describe(cluster).await?))
    }

    async fn list_clusters(
        &self,
        _: Request<control::ListClustersRequest>,
    ) -> Result<Response<control::ListClustersResponse>, Status> {
        let mut clusters = Vec::new();
        for cluster in self.manager.clusters().await.map_err(status)? {
            clusters.push(self.describe(cluster).await?);
        }
        Ok(Response::new(control::ListClustersResponse { clusters }))
    }

    async fn set_policy(
        &self,
        request: Request<control::SetPolicyRequest>,
    ) -> Result<Response<control::Cluster>, Status> {
        let control::SetPolicyRequest { cluster, repositories } = request.into_inner();
        let set = self.manager.set_policy(&cluster, &repositories, unix_now());
        Ok(Response::new(self.describe(set.await.map_err(status)?).await?))
    }

    async fn create_token(
        &self,
        request: Request<control::CreateTokenRequest>,
    ) -> Result<Response<control::CreateTokenResponse>, Status> {
        let request = request.into_inner();
        let role = match request.role() {
            control::Role::Seed => store::Role::Seed,
            control::Role::Peer | control::Role::Unspecified => store::Role::Peer,
        };
        let ttl = Duration::from_secs(request.ttl_seconds);
        if ttl.is_zero() || ttl > MAX_TTL {
            return Err(Status::invalid_argument(
                "a token's life is between a second and ten years",
            ));
        }
        let uses = (request.uses > 0).then_some(request.uses);
        let made = self.manager.create_token(&request.cluster, role, ttl, uses, unix_now());
        let token = made.await.map_err(status)?.to_string();
        Ok(Response::new(control::CreateTokenResponse { token }))
    }

    async fn list_nodes(
        &self,
        request: Request<control::ListNodesRequest>,
    ) -> Result<Response<control::ListNodesResponse>, Status> {
        let cluster = self.cluster_id(&request.into_inner().cluster).await?;
        let names = self.names().await?;
        let connected = match &self.hub {
            Some(hub) => hub.peers().await,
            None => Default::default(),
        };
        let nodes = self.manager.nodes(cluster.as_deref()).await.map_err(status)?;
        let describe = |node: store::Node| control::Node {
            connected: node.peer.parse().is_ok_and(|peer| connected.contains(&peer)),
            peer: node.peer,
            cluster: names.get(&node.cluster).cloned().unwrap_or(node.cluster),
            name: node.name,
            zone: node.zone,
            role: match node.role {
                store::Role::Peer => control::Role::Peer,
                store::Role::Seed => control::Role::Seed,
            }
            .into(),
            revoked: node.revoked.is_some(),
            expires_unix: unsigned(node.expires),
        };
        let nodes = nodes.into_iter().map(describe).collect();
        Ok(Response::new(control::ListNodesResponse { nodes }))
    }

    async fn revoke_node(
        &self,
        request: Request<control::RevokeNodeRequest>,
    ) -> Result<Response<control::RevokeNodeResponse>, Status> {
        let control::RevokeNodeRequest { peer, reason } = request.into_inner();
        let reason = if reason.is_empty() { "by an administrator" } else { &reason };
        self.manager.revoke(&peer, reason, unix_now()).await.map_err(status)?;
        self.directory.refresh().await.map_err(status)?;
        Ok(Response::new(control::RevokeNodeResponse {}))
    }

    async fn list_tasks(
        &self,
        request: Request<control::ListTasksRequest>,
    ) -> Result<Response<control::ListTasksResponse>, Status> {
        let cluster = self.cluster_id(&request.into_inner().cluster).await?;
        let names = self.names().await?;
        let rows = self.hub()?.tasks(cluster.as_deref()).await;
        let tasks = rows.iter().map(|(id, row)| summary(id, row, &names)).collect();
        Ok(Response::new(control::ListTasksResponse { tasks }))
    }

    async fn show_task(
        &self,
        request: Request<control::ShowTaskRequest>,
    ) -> Result<Response<control::TaskDetail>, Status> {
        let wanted = request.into_inner().id;
        let names = self.names().await?;
        let mut rows = self.hub()?.tasks(None).await;
        rows.retain(|(_, row)| {
            let (id, digest) = (row.task.id.to_string(), row.task.blob.to_string());
            let hex = digest.trim_start_matches("sha256:");
            [&id, &digest, hex].iter().any(|name| name.starts_with(&wanted)) && !wanted.is_empty()
        });
        let (cluster, row) = match rows.as_slice() {
            [one] => one,
            [] => {
                return Err(Status::not_found(format!("no task has an id or digest {wanted:?}…")));
            }
            several => {
                return Err(Status::invalid_argument(format!(
                    "{} tasks have an id or digest {wanted:?}…: give more of the id",
                    several.len()
                )));
            }
        };
        let detail = self.hub()?.task(cluster, row.task.id).await;
        let detail = detail.ok_or_else(|| Status::not_found("the task has just ended"))?;
        Ok(Response::new(describe_task(cluster, detail, &names)))
    }

    async fn list_events(
        &self,
        request: Request<control::ListEventsRequest>,
    ) -> Result<Response<control::ListEventsResponse>, Status> {
        let cluster = self.cluster_id(&request.into_inner().cluster).await?;
        let names = self.names().await?;
        let events = self.manager.events(cluster.as_deref(), MAX_EVENTS).await.map_err(status)?;
        let describe = |event: store::Event| control::Event {
            unix: unsigned(event.at),
            cluster: names.get(&event.cluster).cloned().unwrap_or(event.cluster),
            what: event.what,
        };
        let events = events.into_iter().map(describe).collect();
        Ok(Response::new(control::ListEventsResponse { events }))
    }
}

fn unsigned(seconds: i64) -> u64 {
    u64::try_from(seconds).unwrap_or(0)
}

fn summary(cluster: &str, row: &TaskRow, names: &BTreeMap<String, String>) -> control::TaskSummary {
    control::TaskSummary {
        id: row.task.id.to_string(),
        cluster: names.get(cluster).cloned().unwrap_or_else(|| cluster.to_owned()),
        digest: row.task.blob.to_string(),
        scope: row.task.scope.name().to_owned(),
        len: row.task.len,
        peers: row.view.peers,
        complete: row.view.complete,
        origin_bytes: row.bytes(row.view.from_origin),
        swarm_bytes: row.bytes(row.view.from_peers),
    }
}

fn describe_task(
    cluster: &str,
    detail: Detail,
    names: &BTreeMap<String, String>,
) -> control::TaskDetail {
    let peers = detail.peers.into_iter().map(|peer| control::TaskPeer {
        peer: peer.peer.to_string(),
        zone: peer.zone,
        seed: peer.seed,
        have: peer.have,
        want: peer.want,
        leased: peer.leased,
        assigned: peer.assigned,
    });
    let decisions = detail.decisions.into_iter().map(|decision| control::Decision {
        at_ms: decision.at_ms,
        node: decision.node,
        what: decision.what,
        reason: decision.reason,
    });
    control::TaskDetail {
        summary: Some(summary(cluster, &detail.row, names)),
        pieces: detail.row.task.shape.pieces,
        peers: peers.collect(),
        decisions: decisions.collect(),
    }
}
