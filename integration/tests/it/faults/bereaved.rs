//! What nobody kept: its readers are told and named, and everything that begins after it has its files.

use std::collections::BTreeSet;

use anyhow::Context as _;
use skimmer_integration::command::{self, wait_for};
use skimmer_integration::node::wait_connected;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::MountMode;

use super::load::{COMMAND_LIMIT, Indexes};
use super::{NODE, Plan, WITHOUT_HOLDER, World};

/// What the daemon says of mounts and containers that nobody kept.
const LOST: [&str; 2] = ["nobody kept the mounts of its layers", "nobody kept a mount"];

#[test]
fn what_holder_and_daemon_lose_together_is_named_and_all_else_goes_on() {
    scenario("fault-both", |scenario| {
        let mut world = world(scenario)?;
        let daemon = &mut world.fleet.machines[NODE].skimmerd;
        daemon.kill()?;
        daemon.kill_holder()?;
        daemon.hold()?;
        daemon.run()?;
        let told = told(&mut world)?;
        wait_for("exactly those are named who were told", COMMAND_LIMIT, || {
            (named(&world).ok()? == told).then_some(())
        })
        .with_context(|| format!("{told:?} were told, named are {:?}", named(&world)))?;
        go_on(world, &told)
    });
}

/// Who drains a node knows what containers it has.
#[test]
fn readers_of_a_drained_node_are_told_and_all_else_goes_on() {
    scenario("fault-drained", |scenario| {
        let mut world = world(scenario)?;
        let daemon = &mut world.fleet.machines[NODE].skimmerd;
        daemon.terminate()?;
        command::output_of(daemon.command().args(["drain", "--unmount"]), COMMAND_LIMIT)?;
        daemon.run()?;
        let told = told(&mut world)?;
        go_on(world, &told)
    });
}

fn world(scenario: &Scenario) -> anyhow::Result<World<'_>> {
    let mut world = World::new(scenario, &Plan { indexes: Indexes::Node, ..Plan::default() })?;
    for part in LOST.into_iter().chain(WITHOUT_HOLDER) {
        world.fleet.machines[NODE].skimmerd.expect_log(part);
    }
    if MountMode::of_this_run() == MountMode::Kernel {
        // With nobody left to hear of it, what is missing would be read as zeros.
        world.load.pause()?;
    } else {
        world.load.wait_passing()?;
    }
    Ok(world)
}

/// The containers that read all along until their files went; those that come and go do that no more.
fn told(world: &mut World<'_>) -> anyhow::Result<BTreeSet<String>> {
    // Else it can't take away what comes and goes.
    wait_connected(&world.fleet.machines[NODE].containerd()?.address())?;
    let told = world.load.told()?;
    // Those that the kernel serves need nobody.
    let lost = if MountMode::of_this_run() == MountMode::Kernel { 0 } else { 2 };
    anyhow::ensure!(told.len() == lost, "{told:?} were told");
    world.load.pause_told()?;
    Ok(told)
}

fn go_on(mut world: World<'_>, told: &BTreeSet<String>) -> anyhow::Result<()> {
    world.load.replace(told)?;
    world.load.resume();
    // What was unmounted may have been evicted, and comes again.
    world.load.wait_progress()?;
    world.load.pause()?;
    world.before.accept_successors(&world.fleet.machines[NODE])?;
    world.load.resume();
    world.end()
}

/// The containers that the node says have lost files of the images that are read all along.
fn named(world: &World<'_>) -> anyhow::Result<BTreeSet<String>> {
    let mut named = BTreeSet::new();
    for known in &world.load.images().steady {
        let layers = world.fleet.machines[NODE].skimmerd.layers(&known.reference)?;
        let lost = layers.iter().filter_map(|layer| layer["lost"].as_array()).flatten();
        let names = lost.filter_map(|name| name.as_str()?.rsplit('/').next());
        named.extend(names.map(str::to_owned));
    }
    Ok(named)
}
