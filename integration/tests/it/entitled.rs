//! Private images between nodes: only those whom the registry would serve get them from others.

use std::path::PathBuf;
use std::time::Duration;

use skimmer_integration::command::{self, wait_for};
use skimmer_integration::control::{self, Control, holds};
use skimmer_integration::docker_config;
use skimmer_integration::issuer::Account;
use skimmer_integration::registry::{Auth, Registry};
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{Join, Setup, Skimmerd};

use crate::fixtures::small;

const ALICE: Account = Account { user: "alice", password: "wonderland", may_pull: true };
const BOB: Account = Account { user: "bob", password: "builder", may_pull: false };

/// For what happens meanwhile, on a busy machine.
const NOTICE: Duration = Duration::from_secs(60);

/// A node on loopback that knows the registry as `account`.
fn node(
    scenario: &Scenario,
    name: &str,
    control: &Control,
    registry: &Registry,
    account: &Account,
) -> anyhow::Result<Skimmerd> {
    let config = scenario.path(&format!("{name}.json"));
    docker_config::log_in(&config, &[registry.address()], account.user, account.password)?;
    let join = Join {
        control_plane: control.manager(),
        token: control.token("prod", "peer")?,
        zone: String::new(),
        listen: "/ip4/127.0.0.1/tcp/0".to_owned(),
        grace: Duration::from_secs(3600),
    };
    let setup = Setup { docker_config: Some(config), cluster: Some(join), ..Setup::default() };
    let nowhere = PathBuf::from("/nonexistent");
    let daemon = Skimmerd::start(scenario, name, &nowhere, &setup)?;
    wait_for(&format!("{name} attends"), NOTICE, || daemon.is_attending().then_some(()))?;
    Ok(daemon)
}

#[test]
fn the_registrys_own_users_decide_who_gets_a_private_image() {
    let basic = Auth::Basic { user: ALICE.user, password: ALICE.password };
    for (name, auth) in [("basic", basic), ("token", Auth::Accounts(vec![ALICE, BOB]))] {
        scenario(&format!("swarm-rights-{name}"), |scenario| {
            let registry = Registry::start_with(scenario, "registry", &auth, None)?;
            let image = small(scenario, "team/app")?;
            let reference = registry.add(&image)?;
            let plain_http = vec![registry.address().to_owned()];
            let setup = control::Setup { plain_http, ..control::Setup::default() };
            let control = Control::start_with(scenario, "control", &setup, None)?;
            control.create_cluster("prod")?;
            let first = node(scenario, "n0", &control, &registry, &ALICE)?;
            let second = node(scenario, "n1", &control, &registry, &ALICE)?;
            let other = node(scenario, "n2", &control, &registry, &BOB)?;

            first.ask(&["index", "build", &reference])?;
            let (sent, whole) = (registry.sent_of(&image).bytes, image.compressed_bytes());
            anyhow::ensure!(sent >= whole, "the first node read it from the registry: {sent}");
            let scope = format!("{}/team/app", registry.address());
            wait_for("the image is offered under its repository", NOTICE, || {
                let tasks = control.ask(&["task", "list"]).ok()?;
                let tasks = tasks.as_array()?;
                let of = |digest: String| {
                    tasks.iter().any(|t| t["digest"] == digest && t["scope"] == scope)
                };
                image.layers.iter().all(|l| of(l.blob.digest.to_string())).then_some(())
            })?;
            second.ask(&["index", "build", &reference])?;
            let again = registry.sent_of(&image).bytes - sent;
            anyhow::ensure!(again <= 64, "{again} bytes were read from the registry again");

            let digest = format!("{}/team/app@{}", registry.address(), image.manifest.digest);
            for wanted in [&reference, &digest] {
                let mut call = other.skimmer(&["index", "build", wanted])?;
                let refusal = command::failure_of(&mut call, command::PATIENCE)?;
                anyhow::ensure!(refusal.contains("team/app"), "{refusal}");
            }
            for layer in &image.layers {
                let blob = other.root().join("cache/blobs-v1").join(layer.blob.digest.hex());
                anyhow::ensure!(!blob.exists(), "a node without rights has {}", blob.display());
            }
            for account in [ALICE, BOB] {
                let header = account.authorization();
                for secret in [account.password, header.trim_start_matches("Basic ")] {
                    for log in [control.log(), first.log(), second.log(), other.log()] {
                        anyhow::ensure!(!log.contains(secret), "{secret} is in a log");
                    }
                    anyhow::ensure!(!holds(&control.store(), secret)?, "{secret} is in the store");
                }
            }
            Ok(())
        });
    }
}
