//! `skimmer cluster|token|node|task|event`: the administrator's side of the control plane.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use skimmer_proto::control::admin_client::AdminClient;
use skimmer_proto::control::{
    self, CreateClusterRequest, CreateTokenRequest, ListClustersRequest, ListEventsRequest,
    ListNodesRequest, ListTasksRequest, RevokeNodeRequest, SetPolicyRequest, ShowTaskRequest,
};
use tonic::transport::Channel;

use crate::cli::control::{Cluster, Control, Event, Node, Role, Task, Token};
use crate::cli::{Global, Output};
use crate::daemon::{Unreachable, plain, unix_channel};
use crate::output::{bytes, json, short, table};

#[derive(Serialize)]
struct ClusterView {
    name: String,
    id: String,
    nodes: u32,
    repositories: Vec<String>,
}

#[derive(Serialize)]
struct NodeView {
    peer: String,
    cluster: String,
    name: String,
    zone: String,
    role: &'static str,
    connected: bool,
    revoked: bool,
    expires_unix: u64,
}

#[derive(Serialize)]
struct TaskView {
    id: String,
    cluster: String,
    digest: String,
    /// Empty: public.
    scope: String,
    len: u64,
    peers: u32,
    complete: u32,
    origin_bytes: u64,
    swarm_bytes: u64,
}

#[derive(Serialize)]
struct TaskDetailView {
    #[serde(flatten)]
    task: TaskView,
    pieces: u32,
    nodes: Vec<TaskNodeView>,
    decisions: Vec<DecisionView>,
}

#[derive(Serialize)]
struct TaskNodeView {
    peer: String,
    zone: String,
    seed: bool,
    have: u32,
    want: u32,
    leased: u32,
    assigned: u32,
}

#[derive(Serialize)]
struct DecisionView {
    at_ms: u64,
    node: String,
    what: String,
    reason: String,
}

#[derive(Serialize)]
struct EventView {
    unix: u64,
    cluster: String,
    what: String,
}

async fn connect(control: &Control) -> anyhow::Result<AdminClient<Channel>> {
    let address = &control.control_socket;
    let channel = unix_channel(address)
        .await
        .map_err(|error| anyhow::Error::from(error).context(Unreachable::control(address)))?;
    Ok(AdminClient::new(channel).max_decoding_message_size(64 << 20))
}

pub async fn cluster(global: &Global, control: &Control, command: Cluster) -> anyhow::Result<()> {
    let mut admin = connect(control).await?;
    let clusters = match command {
        Cluster::Create { name } => {
            let created = admin.create_cluster(CreateClusterRequest { name }).await;
            vec![created.map_err(plain)?.into_inner()]
        }
        Cluster::List => {
            let listed = admin.list_clusters(ListClustersRequest {}).await;
            listed.map_err(plain)?.into_inner().clusters
        }
        Cluster::Policy { cluster, repositories, none: _ } => {
            let set = admin.set_policy(SetPolicyRequest { cluster, repositories }).await;
            vec![set.map_err(plain)?.into_inner()]
        }
    };
    let clusters: Vec<ClusterView> = clusters.into_iter().map(ClusterView::from).collect();
    if global.output == Output::Json {
        return json(&clusters);
    }
    let row = |c: ClusterView| vec![c.name, c.id, c.nodes.to_string(), c.repositories.join(", ")];
    let rows: Vec<_> = clusters.into_iter().map(row).collect();
    table(&["NAME", "ID", "NODES", "REPOSITORIES"], &rows);
    Ok(())
}

pub async fn token(global: &Global, control: &Control, command: Token) -> anyhow::Result<()> {
    let Token::Create { cluster, role, ttl, uses, unlimited } = command;
    let role = match role {
        Role::Peer => control::Role::Peer,
        Role::Seed => control::Role::Seed,
    };
    let request = CreateTokenRequest {
        cluster,
        role: role.into(),
        ttl_seconds: ttl.as_secs(),
        uses: if unlimited { 0 } else { uses },
    };
    let created = connect(control).await?.create_token(request).await.map_err(plain)?;
    let token = created.into_inner().token;
    match global.output {
        Output::Json => json(&serde_json::json!({ "token": token })),
        Output::Text => {
            println!("{token}");
            Ok(())
        }
    }
}

pub async fn node(global: &Global, control: &Control, command: Node) -> anyhow::Result<()> {
    let mut admin = connect(control).await?;
    let cluster = match command {
        Node::List { cluster } => cluster,
        Node::Revoke { peer, reason } => {
            admin.revoke_node(RevokeNodeRequest { peer, reason }).await.map_err(plain)?;
            return Ok(());
        }
    };
    let listed = admin.list_nodes(ListNodesRequest { cluster }).await.map_err(plain)?;
    let nodes: Vec<NodeView> = listed.into_inner().nodes.into_iter().map(NodeView::from).collect();
    if global.output == Output::Json {
        return json(&nodes);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let row = |node: NodeView| {
        let state = match (node.revoked, node.connected) {
            (true, _) => "revoked",
            (false, true) => "connected",
            (false, false) => "away",
        };
        let left = node.expires_unix.checked_sub(now).map(Duration::from_secs);
        let left = left.map_or("ended".into(), |left| humantime::format_duration(left).to_string());
        vec![node.name, node.cluster, node.zone, node.role.into(), state.into(), left, node.peer]
    };
    let rows: Vec<_> = nodes.into_iter().map(row).collect();
    table(&["NAME", "CLUSTER", "ZONE", "ROLE", "STATE", "CERTIFICATE", "PEER"], &rows);
    Ok(())
}

pub async fn task(global: &Global, control: &Control, command: Task) -> anyhow::Result<()> {
    let mut admin = connect(control).await?;
    match command {
        Task::List { cluster } => {
            let listed = admin.list_tasks(ListTasksRequest { cluster }).await.map_err(plain)?;
            let tasks = listed.into_inner().tasks.into_iter();
            let tasks: Vec<TaskView> = tasks.map(TaskView::from).collect();
            if global.output == Output::Json {
                return json(&tasks);
            }
            print_tasks(&tasks);
        }
        Task::Show { id } => {
            let shown = admin.show_task(ShowTaskRequest { id }).await.map_err(plain)?;
            let detail = TaskDetailView::from(shown.into_inner());
            if global.output == Output::Json {
                return json(&detail);
            }
            print_detail(&detail);
        }
    }
    Ok(())
}

pub async fn event(global: &Global, control: &Control, command: Event) -> anyhow::Result<()> {
    let Event::List { cluster } = command;
    let listed = connect(control).await?.list_events(ListEventsRequest { cluster }).await;
    let events: Vec<EventView> =
        listed.map_err(plain)?.into_inner().events.into_iter().map(EventView::from).collect();
    if global.output == Output::Json {
        return json(&events);
    }
    let time = |unix| humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(unix));
    let row = |event: EventView| vec![time(event.unix).to_string(), event.cluster, event.what];
    let rows: Vec<_> = events.into_iter().map(row).collect();
    table(&["TIME", "CLUSTER", "WHAT"], &rows);
    Ok(())
}

/// The first digits of a task id: enough for `skimmer task show`.
fn beginning(id: &str) -> String {
    id.chars().take(12).collect()
}

fn print_tasks(tasks: &[TaskView]) {
    let row = |task: &TaskView| {
        let scope = if task.scope.is_empty() { "public" } else { &task.scope };
        vec![
            beginning(&task.id),
            task.cluster.clone(),
            short(&task.digest),
            bytes(task.len),
            format!("{}/{}", task.complete, task.peers),
            bytes(task.origin_bytes),
            bytes(task.swarm_bytes),
            scope.to_owned(),
        ]
    };
    let rows: Vec<_> = tasks.iter().map(row).collect();
    table(&["TASK", "CLUSTER", "BLOB", "SIZE", "COMPLETE", "ORIGIN", "SWARM", "SCOPE"], &rows);
}

fn print_detail(detail: &TaskDetailView) {
    print_tasks(std::slice::from_ref(&detail.task));
    println!("\n{} pieces\n", detail.pieces);
    let row = |node: &TaskNodeView| {
        let seed = if node.seed { "seed" } else { "peer" };
        let numbers = [node.have, node.want, node.leased, node.assigned].map(|n| n.to_string());
        [&[node.peer.clone(), node.zone.clone(), seed.to_owned()], &numbers[..]].concat()
    };
    let rows: Vec<_> = detail.nodes.iter().map(row).collect();
    table(&["PEER", "ZONE", "ROLE", "HAS", "WANTS", "LEASED", "ASSIGNED"], &rows);
    println!();
    let row = |decision: &DecisionView| {
        let at = Duration::from_millis(decision.at_ms).as_secs_f64();
        let DecisionView { node, what, reason, .. } = decision;
        vec![format!("{at:.3} s"), node.clone(), what.clone(), reason.clone()]
    };
    let rows: Vec<_> = detail.decisions.iter().map(row).collect();
    table(&["AT", "NODE", "DECISION", "REASON"], &rows);
}

impl From<control::Cluster> for ClusterView {
    fn from(cluster: control::Cluster) -> Self {
        let control::Cluster { name, id, repositories, nodes } = cluster;
        Self { name, id, nodes, repositories }
    }
}

impl From<control::Node> for NodeView {
    fn from(node: control::Node) -> Self {
        Self {
            role: match node.role() {
                control::Role::Seed => "seed",
                control::Role::Peer | control::Role::Unspecified => "peer",
            },
            peer: node.peer,
            cluster: node.cluster,
            name: node.name,
            zone: node.zone,
            connected: node.connected,
            revoked: node.revoked,
            expires_unix: node.expires_unix,
        }
    }
}

impl From<control::TaskSummary> for TaskView {
    fn from(task: control::TaskSummary) -> Self {
        Self {
            id: task.id,
            cluster: task.cluster,
            digest: task.digest,
            scope: task.scope,
            len: task.len,
            peers: task.peers,
            complete: task.complete,
            origin_bytes: task.origin_bytes,
            swarm_bytes: task.swarm_bytes,
        }
    }
}

impl From<control::TaskDetail> for TaskDetailView {
    fn from(detail: control::TaskDetail) -> Self {
        let node = |peer: control::TaskPeer| TaskNodeView {
            peer: peer.peer,
            zone: peer.zone,
            seed: peer.seed,
            have: peer.have,
            want: peer.want,
            leased: peer.leased,
            assigned: peer.assigned,
        };
        let decision = |decision: control::Decision| DecisionView {
            at_ms: decision.at_ms,
            node: decision.node,
            what: decision.what,
            reason: decision.reason,
        };
        Self {
            task: detail.summary.unwrap_or_default().into(),
            pieces: detail.pieces,
            nodes: detail.peers.into_iter().map(node).collect(),
            decisions: detail.decisions.into_iter().map(decision).collect(),
        }
    }
}

impl From<control::Event> for EventView {
    fn from(event: control::Event) -> Self {
        Self { unix: event.unix, cluster: event.cluster, what: event.what }
    }
}
