//! `peers`: how this node stands in its swarm.

use serde::Serialize;
use skimmer_proto::node::PeersRequest;

use crate::cli::{Global, Output};
use crate::daemon::{connect, plain};
use crate::output::{bytes, json, table};

#[derive(Serialize)]
struct View {
    peer: String,
    cluster: String,
    scheduler: bool,
    peers: Vec<PeerView>,
}

#[derive(Serialize)]
struct PeerView {
    id: String,
    zone: String,
    role: String,
    addresses: Vec<String>,
    sent_bytes: u64,
    received_bytes: u64,
    round_trip_us: u64,
}

pub async fn peers(global: &Global) -> anyhow::Result<()> {
    let mut daemon = connect(&global.address).await?;
    let answer = daemon.peers(PeersRequest {}).await.map_err(plain)?.into_inner();
    let peers = answer.peers.into_iter().map(|peer| PeerView {
        id: peer.id,
        zone: peer.zone,
        role: peer.role,
        addresses: peer.addresses,
        sent_bytes: peer.sent_bytes,
        received_bytes: peer.received_bytes,
        round_trip_us: peer.round_trip_us,
    });
    let (peer, cluster, scheduler) = (answer.peer, answer.cluster, answer.scheduler);
    let view = View { peer, cluster, scheduler, peers: peers.collect() };
    if global.output == Output::Json {
        return json(&view);
    }
    if view.cluster.is_empty() {
        println!("This node is not a member of a cluster.");
        return Ok(());
    }
    let scheduler = if view.scheduler { "connected" } else { "away" };
    println!("{}  cluster {}  scheduler {scheduler}", view.peer, view.cluster);
    let rows: Vec<Vec<String>> = view.peers.iter().map(row).collect();
    table(&["PEER", "ROLE", "ZONE", "ADDRESS", "RECEIVED", "SENT", "ROUND TRIP"], &rows);
    Ok(())
}

fn row(peer: &PeerView) -> Vec<String> {
    let round_trip = match peer.round_trip_us {
        0 => "-".to_owned(),
        us => format!("{}.{} ms", us / 1000, us % 1000 / 100),
    };
    vec![
        peer.id.clone(),
        peer.role.clone(),
        peer.zone.clone(),
        peer.addresses.first().cloned().unwrap_or_default(),
        bytes(peer.received_bytes),
        bytes(peer.sent_bytes),
        round_trip,
    ]
}
