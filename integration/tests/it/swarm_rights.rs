//! Private images in the swarm: bytes go to those who may read them, by the control plane's word.

use anyhow::Context as _;
use skimmer_identity::PeerId;
use skimmer_integration::command::wait_for;
use skimmer_integration::docker_config;
use skimmer_integration::fleet::{CLUSTER, Fleet, Spec};
use skimmer_integration::member::Member;
use skimmer_integration::outsider::Outsider;
use skimmer_integration::registry::Auth;
use skimmer_integration::scenario::scenario;
use skimmer_proto::Scope;

use crate::swarm_burst::{LEASE, LIMIT, check_egress, image_of, shaped};

#[test]
fn private_images_go_to_those_who_may_read_them() {
    scenario("swarm-private", |scenario| {
        let auth = Auth::Users(&[("alice", "wonderland"), ("bob", "builder")]);
        let mut fleet =
            Fleet::start(scenario, skimmer_integration::fleet::Setup { auth, ..shaped() })?;
        let host = fleet.registry.address().to_owned();
        let users = [("alice", "wonderland"), ("bob", "builder"), ("mallory", "guesses")];
        for (user, password) in users {
            let config = scenario.path(&format!("{user}.json"));
            docker_config::log_in(&config, &[&host], user, password)?;
            fleet.add(&Spec { docker_config: Some(&config), ..Spec::default() })?;
        }
        fleet.wait_attending()?;
        let pattern = format!("{host}/team/*");
        fleet.control.ask(&["cluster", "policy", CLUSTER, "--repository", &pattern])?;
        let (image, closed) = (
            image_of(scenario, "team/app", &[6 << 20])?,
            image_of(scenario, "closed/app", &[2 << 20])?,
        );
        let (reference, closed_reference) =
            (fleet.registry.add(&image)?, fleet.registry.add(&closed)?);

        // Entitled by policy: one copy for both. Who has no password gets nothing from anybody.
        let [alice, bob, mallory] = &fleet.machines[..] else { anyhow::bail!("three nodes") };
        let builds = (alice.build(&reference)?, bob.build(&reference)?);
        builds.0.wait(LIMIT)?;
        builds.1.wait(LIMIT)?;
        check_egress(&fleet.registry, &image, LEASE)?;
        fleet.check_blobs(&image, &[0, 1])?;
        anyhow::ensure!(alice.from_peers()? + bob.from_peers()? >= image.compressed_bytes());
        mallory.build(&reference)?.wait_failed(LIMIT)?;
        anyhow::ensure!(mallory.from_peers()? == 0, "mallory was served");

        // Out of the policy: who may read it by the registry's word does, nobody else.
        for machine in [alice, bob] {
            machine.build(&closed_reference)?.wait(LIMIT)?;
        }
        fleet.check_blobs(&closed, &[0, 1])?;
        check_egress(&fleet.registry, &closed, closed.compressed_bytes())?;

        // A member that asks the node by itself: the scope, with and without the right to it.
        let spare = fleet.spare_host()?;
        let (manager, token) = (fleet.control.manager(), fleet.control.token(CLUSTER, "peer")?);
        let (peer, address): (PeerId, _) = (alice.peer()?.parse()?, alice.multiaddr());
        let team = (image.layers[0].blob.digest, image.layers[0].blob.size);
        let shut = (closed.layers[0].blob.digest, closed.layers[0].blob.size);
        let scope = |name: &str| Scope::Repository(format!("{host}/{name}"));
        let (open, private) = (scope("team/app"), scope("closed/app"));
        let got = spare.block_on(async move || {
            let member = Member::enrol(&manager, &token, "").await?;
            let outsider = Outsider::start(&member, "/ip4/0.0.0.0/tcp/4001", Vec::new()).await?;
            outsider.connect(&peer, &address).await?;
            let ask = async |scope: &Scope, (digest, len)| {
                let piece = outsider.first_piece(&peer, scope.clone(), digest, len).await;
                piece.is_ok_and(|piece| piece.is_some())
            };
            let mut got = vec![
                ask(&Scope::Public, team).await,
                ask(&open, team).await,
                ask(&private, shut).await,
            ];
            let Scope::Repository(name) = &open else { anyhow::bail!("a public scope") };
            let (registry, repository) = name.split_once('/').context("no registry")?;
            let grant = member.grant(registry, repository, "").await?;
            outsider.show_grant(&peer, grant).await?;
            // The right to one repository is none to another.
            got.extend([ask(&open, team).await, ask(&private, shut).await]);
            got.push(ask(&open, shut).await);
            Ok(got)
        })?;
        anyhow::ensure!(got == [false, false, false, true, false, false], "{got:?}");
        wait_for("the control plane knows of no secret", LIMIT, || {
            let log = fleet.control.log();
            (!log.contains("wonderland") && !log.contains("builder")).then_some(())
        })
    });
}
