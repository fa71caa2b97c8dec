//! Faults of the registry and on the way to it, and before them that there is no other node to turn to.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use skimmer_integration::command::{PATIENCE, wait_for};
use skimmer_integration::crictl::Crictl;
use skimmer_integration::docker_config;
use skimmer_integration::front::Mood;
use skimmer_integration::names::Failure;

use super::{Fault, cable, fault, mood, outage, refusal};
use crate::faults::{NODE, SEED_PEER, USER, World};

/// One after another.
pub const FAULTS: [Fault; 17] = [
    fault("the other node is gone", |world| cable(world, SEED_PEER, false), |_| Ok(())),
    outage(
        "the registry is gone",
        |world| world.fleet.registry.stop(),
        |world| world.fleet.registry.resume(),
    ),
    outage(
        "the registry stands still",
        |world| world.fleet.registry.freeze(),
        |world| world.fleet.registry.thaw(),
    ),
    outage("its name is unknown", |world| forget_name(world, Failure::Unknown), know_name),
    outage("nobody knows any names", |world| forget_name(world, Failure::Server), know_name),
    refusal("too many requests", 429),
    refusal("an internal error", 500),
    refusal("unavailable", 503),
    refusal("credentials are wanted", 401),
    mood("tokens end", Mood::Expiring(Duration::from_secs(1))),
    mood("answers are cut off", Mood::Cutting(300_000)),
    mood("answers crawl", Mood::Crawling(100_000)),
    mood("answers are false", Mood::Falsifying),
    // From then on the registry wants one.
    outage("the password is another", want_password, |world| log_in(world, TOMORROW)),
    outage("the credential helper's is another", want_helpers_password, |world| {
        world.helper.hand_out(NEXT_WEEK)
    }),
    outage("the password of the last pull is another", want_pullers_password, pull_again),
    // Last: from then on there is no front, which knows no TLS, and no mood comes to anybody.
    outage("its certificate is another", renew_certificate, |world| {
        world.fleet.registry.trust(world.scenario)
    }),
];

/// Passwords.
pub const TODAY: &str = "of-today";
const TOMORROW: &str = "of-tomorrow";
const NEXT_WEEK: &str = "of-next-week";
const NEXT_MONTH: &str = "of-next-month";

fn forget_name(world: &mut World<'_>, why: Failure) -> anyhow::Result<()> {
    world.names[NODE].fail(why);
    Ok(())
}

fn know_name(world: &mut World<'_>) -> anyhow::Result<()> {
    let names = &world.names[NODE];
    wait_for("somebody asks for the registry", PATIENCE, || {
        (names.asked_in_vain() > 0).then_some(())
    })?;
    names.know();
    Ok(())
}

fn want_password(world: &mut World<'_>) -> anyhow::Result<()> {
    demand(world, TOMORROW);
    Ok(())
}

/// The node has its passwords from a credential helper, which gives the one that was right until now.
fn want_helpers_password(world: &mut World<'_>) -> anyhow::Result<()> {
    world.helper.hand_out(TOMORROW)?;
    world.helper.be_named(&world.credentials, &registries(world))?;
    demand(world, NEXT_WEEK);
    Ok(())
}

/// Whoever pulls has it, the node doesn't.
fn want_pullers_password(world: &mut World<'_>) -> anyhow::Result<()> {
    demand(world, NEXT_MONTH);
    Ok(())
}

/// As a kubelet does with new credentials: what is read lazily of the image is fetched with them, and nothing else. They
/// are for the registry that the pull names, so for the front.
fn pull_again(world: &mut World<'_>) -> anyhow::Result<()> {
    let (late, machine) = (&world.load.images().late, &world.fleet.machines[NODE]);
    let Some(crictl) = Crictl::new(&machine.containerd()?.address(), &machine.skimmerd.images())?
    else {
        return world.helper.hand_out(NEXT_MONTH);
    };
    let reference =
        late.reference.replacen(world.fleet.registry.address(), world.front.address(), 1);
    crictl.call(&["pull", "--creds", &format!("{USER}:{NEXT_MONTH}"), &reference])?;
    wait_for("the waiting reader has its bytes", PATIENCE, || {
        let layers = machine.skimmerd.layers(&late.reference).ok()?;
        layers.last()?["blob_bytes_present"].as_u64().filter(|present| *present > 0)
    })?;
    crictl.call(&["rmi", &reference])?;
    world.helper.hand_out(NEXT_MONTH)
}

/// Has the registry want this password from now on.
fn demand(world: &World<'_>, password: &str) {
    let wanted = STANDARD.encode(format!("{USER}:{password}"));
    world.front.set(Mood::Demanding(format!("Basic {wanted}")));
}

/// Gives the node this password.
pub fn log_in(world: &World<'_>, password: &str) -> anyhow::Result<()> {
    docker_config::log_in(&world.credentials, &registries(world), USER, password)
}

/// What the node knows the registry as: its own name, and its front's.
fn registries<'a>(world: &'a World<'_>) -> [&'a str; 2] {
    [world.fleet.registry.address(), world.front.address()]
}

/// First there is TLS at all.
fn renew_certificate(world: &mut World<'_>) -> anyhow::Result<()> {
    world.fleet.registry.renew_certificate()?;
    world.fleet.registry.trust(world.scenario)?;
    world.load.wait_progress()?;
    world.fleet.registry.renew_certificate()
}
