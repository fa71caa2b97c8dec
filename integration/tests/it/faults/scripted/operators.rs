//! What is done to a node at work: another holder, less room, many snapshots, blobs for containerd.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::{self, wait_for};
use skimmer_integration::node;
use skimmer_integration::snapshots::Snapshots;

use super::{Fault, fault};
use crate::faults::load::COMMAND_LIMIT;
use crate::faults::{NODE, World, kills};

/// One after another.
pub const FAULTS: [Fault; 5] = [
    fault(
        "the holder is gone",
        |world| world.fleet.machines[NODE].skimmerd.kill_holder(),
        |world| kills::hold_again(&mut world.fleet.machines[NODE]),
    ),
    fault(
        "the cache may be small",
        |world| set_quota(world, SMALL_BYTES),
        |world| set_quota(world, 0),
    ),
    fault("a thousand snapshots come and go", make_snapshots, collect_snapshots),
    fault("an image's blobs are put into containerd", materialize_in_vain, materialize),
    fault("an image is pulled as a whole", pull_in_vain, pull),
];

/// Less than what the readers and the pulled images have of it.
const SMALL_BYTES: u64 = 16 << 20;
const SNAPSHOTS: usize = 1000;
/// The beginning of their names.
const MANY: &str = "many-";
/// How long it may take until containerd removes a snapshot.
const COLLECTING: Duration = Duration::from_secs(60);

fn set_quota(world: &mut World<'_>, bytes: u64) -> anyhow::Result<()> {
    let daemon = &mut world.fleet.machines[NODE].skimmerd;
    daemon.terminate()?;
    daemon.configure("quota_bytes", &bytes.to_string())?;
    run(world)
}

/// The daemon, until containerd has found it: a container is started next.
fn run(world: &mut World<'_>) -> anyhow::Result<()> {
    let machine = &mut world.fleet.machines[NODE];
    machine.skimmerd.run()?;
    node::wait_connected(&machine.containerd()?.address())
}

fn snapshots(world: &World<'_>) -> anyhow::Result<Snapshots> {
    Snapshots::connect(&world.fleet.machines[NODE].skimmerd.address(), "skimmer")
}

/// Each on layers that a reader uses.
fn make_snapshots(world: &mut World<'_>) -> anyhow::Result<()> {
    let mut snapshots = snapshots(world)?;
    let (all, reader) = (snapshots.list(&[])?, format!("/{}", world.load.reader()?));
    let own = all.iter().find(|info| info.name.ends_with(&reader));
    let parent = &own.context("a reader without a snapshot")?.parent;
    (0..SNAPSHOTS).try_for_each(|number| {
        snapshots.prepare(&format!("{MANY}{number}"), parent, HashMap::new()).map(drop)
    })
}

/// containerd, which knows none of them, removes them all after it has removed one that it knows, and has skimmerd clean up
/// after that.
fn collect_snapshots(world: &mut World<'_>) -> anyhow::Result<()> {
    let mut snapshots = snapshots(world)?;
    wait_for("containerd has removed them", COLLECTING, || {
        let left = snapshots.list(&[]).ok()?;
        (!left.iter().any(|info| info.name.starts_with(MANY))).then_some(())
    })
}

/// Of an image of which nothing is here.
fn materialize_in_vain(world: &mut World<'_>) -> anyhow::Result<()> {
    world.load.pull_whole_lazily()?;
    let reference = world.load.images().whole.reference.clone();
    give_up(world, &["materialize", &reference])
}

fn materialize(world: &mut World<'_>) -> anyhow::Result<()> {
    let (whole, machine) = (&world.load.images().whole, &world.fleet.machines[NODE]);
    machine.skimmerd.ask(&["materialize", &whole.reference])?;
    let archive = world.scenario.path("exported.tar").display().to_string();
    let mut export = machine.containerd()?.ctr()?;
    export.args(["image", "export", &archive, &whole.reference]);
    command::output_of(&mut export, COMMAND_LIMIT)?;
    let listed = command::run("tar", ["-tf", &archive])?;
    anyhow::ensure!(listed.contains(whole.blob.hex().as_str()), "the archive has {listed}");
    world.load.forget_whole()
}

fn pull_in_vain(world: &mut World<'_>) -> anyhow::Result<()> {
    let reference = world.load.images().whole.reference.clone();
    give_up(world, &["pull", "--full", &reference])
}

fn pull(world: &mut World<'_>) -> anyhow::Result<()> {
    let reference = &world.load.images().whole.reference;
    world.fleet.machines[NODE].skimmerd.ask(&["pull", "--full", reference])?;
    world.load.run_whole()?;
    world.load.forget_whole()
}

/// Begins to obey an order, and dies when something of the image has come.
fn give_up(world: &mut World<'_>, order: &[&str]) -> anyhow::Result<()> {
    let machine = &mut world.fleet.machines[NODE];
    let begun = machine.begin(order)?;
    machine.wait_present(&world.load.images().whole.blob, 1)?;
    machine.skimmerd.kill()?;
    begun.wait_failed(COMMAND_LIMIT).with_context(|| format!("{order:?}"))?;
    run(world)
}
