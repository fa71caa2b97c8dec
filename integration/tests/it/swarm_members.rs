//! Who is in: certificates that are renewed, nodes that are revoked, clusters that never meet.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use skimmer_identity::PeerId;
use skimmer_integration::command::wait_for;
use skimmer_integration::control;
use skimmer_integration::fleet::{CLUSTER, Fleet, Machine, Setup, Spec};
use skimmer_integration::member::Member;
use skimmer_integration::outsider::Outsider;
use skimmer_integration::scenario::scenario;
use skimmer_proto::Scope;

use crate::swarm_burst::{LEASE, LIMIT, check_egress, image_of, shaped};

/// When the certificate of each node ends, by peer id.
fn ends(fleet: &Fleet<'_>) -> anyhow::Result<Vec<(String, u64)>> {
    let listed = fleet.control.ask(&["node", "list"])?;
    let nodes = listed.as_array().context("no list of nodes")?;
    let end = |node: &serde_json::Value| {
        Some((node["peer"].as_str()?.to_owned(), node["expires_unix"].as_u64()?))
    };
    nodes.iter().map(end).collect::<Option<_>>().context("a node without a certificate")
}

#[test]
fn certificates_are_renewed_and_revoked_nodes_are_cut_off() {
    scenario("swarm-revoked", |scenario| {
        // Links end with their certificates: half of this is to be longer than the first pull.
        let lifetime = Duration::from_secs(20);
        let setup = Setup {
            control: control::Setup { certificate_lifetime: lifetime, ..control::Setup::default() },
            grace: Duration::ZERO,
            ..shaped()
        };
        let fleet = Fleet::of(scenario, setup, 4)?;
        let before = ends(&fleet)?;
        wait_for("all have certificates that outlive the first", LIMIT, || {
            let now = ends(&fleet).ok()?;
            let renewed = |(peer, end): &(String, u64)| {
                now.iter().any(|(other, later)| other == peer && *later >= end + lifetime.as_secs())
            };
            before.iter().all(renewed).then_some(())
        })?;
        let (first, second) = (
            image_of(scenario, "members/first", &[6 << 20])?,
            image_of(scenario, "members/second", &[4 << 20])?,
        );
        fleet.build_everywhere(&fleet.registry.add(&first)?, LIMIT)?;
        check_egress(&fleet.registry, &first, LEASE)?;

        let out = &fleet.machines[2];
        let id = out.peer()?;
        out.skimmerd.expect_log("no fresh membership");
        let others = || [0, 1, 3].into_iter().map(|number| &fleet.machines[number]);
        let is_known = |machine: &Machine| machine.linked().is_ok_and(|peers| peers.contains(&id));
        anyhow::ensure!(others().any(is_known), "it had no neighbours");
        fleet.control.ask(&["node", "revoke", &id, "--reason", "stolen"])?;
        let since = Instant::now();
        wait_for("its neighbours have dropped it", Duration::from_secs(30), || {
            (!others().any(is_known)).then_some(())
        })?;
        println!("out after {:.2} s", since.elapsed().as_secs_f64());
        wait_for("it learns that it is out", LIMIT, || {
            out.skimmerd.log().contains("no fresh membership").then_some(())
        })?;
        // It has the origin still; the others have each other.
        let received = out.from_peers()?;
        fleet.build_everywhere(&fleet.registry.add(&second)?, LIMIT)?;
        check_egress(&fleet.registry, &second, second.compressed_bytes() + LEASE)?;
        anyhow::ensure!(out.from_peers()? == received, "it was served");
        anyhow::ensure!(!others().any(is_known), "it is back");
        fleet.check_blobs(&second, &[0, 1, 2, 3])
    });
}

#[test]
fn two_clusters_never_meet() {
    scenario("swarm-clusters", |scenario| {
        let mut fleet = Fleet::start(scenario, shaped())?;
        fleet.control.create_cluster("other")?;
        for cluster in [CLUSTER, CLUSTER, "other", "other"] {
            fleet.add(&Spec { cluster, ..Spec::default() })?;
        }
        fleet.wait_attending()?;
        let image = image_of(scenario, "members/both", &[6 << 20])?;
        let reference = fleet.registry.add(&image)?;
        fleet.build_everywhere(&reference, LIMIT)?;
        // One copy for each.
        check_egress(&fleet.registry, &image, image.compressed_bytes() + LEASE)?;
        let ids: Vec<String> =
            fleet.machines.iter().map(Machine::peer).collect::<anyhow::Result<_>>()?;
        for (number, machine) in fleet.machines.iter().enumerate() {
            let linked = machine.linked()?;
            let other = &ids[number ^ 1];
            anyhow::ensure!(linked == [other.clone()], "{number} is linked with {linked:?}");
        }
        for pair in fleet.machines.chunks(2) {
            let received = pair[0].from_peers()? + pair[1].from_peers()?;
            anyhow::ensure!(received >= image.compressed_bytes(), "{received} bytes from peers");
        }

        // Who knows where to find a node of another cluster isn't let in either.
        let host = fleet.spare_host()?;
        let (manager, token) = (fleet.control.manager(), fleet.control.token("other", "peer")?);
        let address = |number: usize| fleet.machines[number].multiaddr();
        let targets = [(ids[0].clone(), address(0)), (ids[2].clone(), address(2))];
        let blob = &image.layers[0].blob;
        let (digest, len) = (blob.digest, blob.size);
        let outcomes = host.block_on(async move || {
            let member = Member::enrol(&manager, &token, "").await?;
            let outsider = Outsider::start(&member, "/ip4/0.0.0.0/tcp/4001", Vec::new()).await?;
            let mut outcomes = Vec::new();
            for (peer, address) in targets {
                let peer: PeerId = peer.parse()?;
                let connected = outsider.connect(&peer, &address).await.is_ok();
                let piece = outsider.first_piece(&peer, Scope::Public, digest, len).await;
                outcomes.push((connected, piece.is_ok_and(|piece| piece.is_some())));
            }
            Ok(outcomes)
        })?;
        anyhow::ensure!(outcomes == [(false, false), (true, true)], "{outcomes:?}");
        Ok(())
    });
}
