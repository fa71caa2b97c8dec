//! Faults with names, one after another: each comes, stays for a while under load, and goes.
//!
//! Tested without load: names that don't resolve, certificates and credential helpers (`network`), another program
//! (`systemd`), and data files that rot, of which readers get the wrong bytes until it is found (`disk`).

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use skimmer_integration::command::failure_of;
use skimmer_integration::front::Mood;

use super::load::COMMAND_LIMIT;
use super::{NODE, SEED_PEER, World};
use crate::disk::spoil;
use crate::full_disk::Ballast;
use crate::lost_store::{cut, files};

/// How long each of them stays.
const STAY: Duration = Duration::from_secs(3);

/// The node's name at the registry.
const USER: &str = "alice";

/// What the node says of them, besides what it gives as reasons.
pub const SAID: [&str; 7] = [
    "the metadata could not be read",
    "the database of snapshots is damaged",
    "checkpoint not written",
    "No space left on device",
    "cached bytes had changed on disk",
    "the bytes received have the digest",
    "doesn't match its digest, every time it was fetched",
];

/// Something that goes wrong.
pub struct Fault {
    pub name: &'static str,
    what: What,
}

enum What {
    /// How it begins, and how it is set right.
    Steps(Step, Step),
    /// The registry is in this mood.
    Mood(Mood),
}

type Step = fn(&mut World<'_>) -> anyhow::Result<()>;

const fn fault(name: &'static str, begin: Step, end: Step) -> Fault {
    Fault { name, what: What::Steps(begin, end) }
}

const fn mood(name: &'static str, mood: Mood) -> Fault {
    Fault { name, what: What::Mood(mood) }
}

/// Of the node and what is around it.
pub const AROUND: [Fault; 9] = [
    fault("the network is gone", leave_alone, |world| cable(world, NODE, true)),
    fault(
        "the control plane is gone",
        |world| world.fleet.control.kill(),
        |world| world.fleet.control.run(),
    ),
    fault(
        "containerd is gone",
        |world| world.fleet.machines[NODE].containerd_mut()?.kill(),
        |world| world.fleet.machines[NODE].containerd_mut()?.run(),
    ),
    fault(
        "the daemon is gone",
        |world| world.fleet.machines[NODE].skimmerd.kill(),
        |world| world.fleet.machines[NODE].skimmerd.run(),
    ),
    fault(
        "the daemon is stopped",
        |world| world.fleet.machines[NODE].skimmerd.terminate(),
        |world| world.fleet.machines[NODE].skimmerd.run(),
    ),
    fault("the metadata is lost", lose_metadata, |world| world.fleet.machines[NODE].skimmerd.run()),
    fault("the metadata is cut", cut_metadata, |world| world.fleet.machines[NODE].skimmerd.run()),
    // Before the next one, which has such blobs evicted.
    fault("cached blobs rot", spoil_blobs, find_spoilt_blobs),
    fault("the disk is full", fill_disk, |world| {
        world.ballast = None;
        Ok(())
    }),
];

/// Of the registry, and before it that there is no other node to turn to.
pub const OF_THE_REGISTRY: [Fault; 12] = [
    fault("the other node is gone", |world| cable(world, SEED_PEER, false), |_| Ok(())),
    fault(
        "the registry is gone",
        |world| world.fleet.registry.stop(),
        |world| world.fleet.registry.resume(),
    ),
    fault(
        "the registry stands still",
        |world| world.fleet.registry.freeze(),
        |world| world.fleet.registry.thaw(),
    ),
    mood("too many requests", Mood::Refusing(429)),
    mood("an internal error", Mood::Refusing(500)),
    mood("unavailable", Mood::Refusing(503)),
    mood("credentials are wanted", Mood::Refusing(401)),
    mood("tokens end", Mood::Expiring(Duration::from_secs(1))),
    mood("answers are cut off", Mood::Cutting(300_000)),
    mood("answers crawl", Mood::Crawling(100_000)),
    mood("answers are false", Mood::Falsifying),
    // From then on the registry wants it.
    fault("the password is another", want_password, |world| log_in(world, "of-tomorrow")),
];

/// Has it come and go; then everything gets on.
pub fn suffer(fault: &Fault, world: &mut World<'_>) -> anyhow::Result<()> {
    match &fault.what {
        What::Steps(begin, _) => begin(world)?,
        What::Mood(mood) => world.front.set(mood.clone()),
    }
    thread::sleep(STAY);
    world.load.check()?;
    match &fault.what {
        What::Steps(_, end) => end(world)?,
        What::Mood(_) => world.front.set(Mood::Passing),
    }
    world.load.wait_progress()
}

fn cable(world: &mut World<'_>, machine: usize, plugged: bool) -> anyhow::Result<()> {
    world.fleet.machines[machine].host.set_link(plugged)
}

/// Without registry, control plane and other nodes, and with a daemon that has just started, what is here starts.
fn leave_alone(world: &mut World<'_>) -> anyhow::Result<()> {
    cable(world, NODE, false)?;
    let daemon = &mut world.fleet.machines[NODE].skimmerd;
    daemon.kill()?;
    daemon.run()?;
    world.load.run_what_is_here()
}

fn cut_metadata(world: &mut World<'_>) -> anyhow::Result<()> {
    let daemon = &mut world.fleet.machines[NODE].skimmerd;
    daemon.kill()?;
    for file in files(&daemon.root().join("store-v1"))? {
        cut(&file, 50)?;
    }
    Ok(())
}

fn lose_metadata(world: &mut World<'_>) -> anyhow::Result<()> {
    let daemon = &mut world.fleet.machines[NODE].skimmerd;
    daemon.kill()?;
    fs::remove_dir_all(daemon.root().join("store-v1")).context("lose the metadata")
}

fn fill_disk(world: &mut World<'_>) -> anyhow::Result<()> {
    world.ballast = Some(Ballast::fill(&world.fleet.machines[NODE].skimmerd.root())?);
    Ok(())
}

fn spoil_blobs(world: &mut World<'_>) -> anyhow::Result<()> {
    let blobs = world.fleet.machines[NODE].skimmerd.root().join("cache/blobs-v1");
    for blob in world.load.steady_blobs() {
        spoil(&blobs.join(blob.hex()).join("data")).context("spoil a blob")?;
    }
    Ok(())
}

fn find_spoilt_blobs(world: &mut World<'_>) -> anyhow::Result<()> {
    let mut verify = world.fleet.machines[NODE].skimmerd.skimmer(&["cache", "verify"])?;
    let said = failure_of(&mut verify, COMMAND_LIMIT)?;
    for blob in world.load.steady_blobs() {
        anyhow::ensure!(said.contains(&blob.to_string()), "{blob} is not in {said}");
    }
    Ok(())
}

fn want_password(world: &mut World<'_>) -> anyhow::Result<()> {
    let wanted = STANDARD.encode(format!("{USER}:of-tomorrow"));
    world.front.set(Mood::Demanding(format!("Basic {wanted}")));
    Ok(())
}

/// Gives the node this password, for the registry and for its front.
pub fn log_in(world: &mut World<'_>, password: &str) -> anyhow::Result<()> {
    let entry = json!({ "auth": STANDARD.encode(format!("{USER}:{password}")) });
    let auths = json!({ world.fleet.registry.address(): entry, world.front.address(): entry });
    // As people do: nobody ever finds half a file.
    let new = world.credentials.with_extension("new");
    fs::write(&new, json!({ "auths": auths }).to_string())?;
    fs::rename(&new, &world.credentials).context("replace docker's config.json")
}
