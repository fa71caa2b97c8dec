//! Faults of the node: its disk, its programs, and what is around them.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use skimmer_integration::command::failure_of;
use skimmer_proto::Digest;

use super::{Fault, cable, fault};
use crate::disk::spoil;
use crate::faults::load::COMMAND_LIMIT;
use crate::faults::{NODE, World};
use crate::full_disk::Ballast;
use crate::lost_store::{age, cut, files};

/// One after another.
pub const FAULTS: [Fault; 12] = [
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
    fault("the daemon is gone", |world| world.fleet.machines[NODE].skimmerd.kill(), run_daemon),
    fault(
        "the daemon is stopped",
        |world| world.fleet.machines[NODE].skimmerd.terminate(),
        run_daemon,
    ),
    fault("the daemon's program is another", replace_program, |_| Ok(())),
    fault("the metadata is lost", lose_metadata, run_daemon),
    fault("the metadata is cut", cut_metadata, run_daemon),
    fault("the metadata is an earlier version's", age_metadata, run_daemon),
    // Before the last one, which has such blobs evicted.
    fault("cached blobs rot", spoil_blobs, |world| find_spoilt(world, &steady_blobs(world))),
    fault("cached files rot", spoil_files, find_spoilt_files),
    fault("the disk is full", fill_disk, |world| {
        world.ballast = None;
        Ok(())
    }),
];

fn run_daemon(world: &mut World<'_>) -> anyhow::Result<()> {
    world.fleet.machines[NODE].skimmerd.run()
}

/// Without registry, control plane and other nodes, and with a daemon that has just started, what is here starts.
fn leave_alone(world: &mut World<'_>) -> anyhow::Result<()> {
    cable(world, NODE, false)?;
    let daemon = &mut world.fleet.machines[NODE].skimmerd;
    daemon.kill()?;
    daemon.run()?;
    world.load.run_what_is_here()
}

/// As packages are upgraded: the file first, then a restart. The second time it is replaced while it runs.
fn replace_program(world: &mut World<'_>) -> anyhow::Result<()> {
    let daemon = &mut world.fleet.machines[NODE].skimmerd;
    for _ in 0..2 {
        daemon.replace_program()?;
        daemon.terminate()?;
        daemon.run()?;
    }
    Ok(())
}

fn lose_metadata(world: &mut World<'_>) -> anyhow::Result<()> {
    fs::remove_dir_all(dead_store(world)?).context("lose the metadata")
}

fn cut_metadata(world: &mut World<'_>) -> anyhow::Result<()> {
    files(&dead_store(world)?)?.iter().try_for_each(|file| cut(file, 50))
}

fn age_metadata(world: &mut World<'_>) -> anyhow::Result<()> {
    age(&dead_store(world)?)
}

/// The metadata of a daemon that is killed first.
fn dead_store(world: &mut World<'_>) -> anyhow::Result<PathBuf> {
    let daemon = &mut world.fleet.machines[NODE].skimmerd;
    daemon.kill()?;
    Ok(daemon.root().join("store-v1"))
}

fn fill_disk(world: &mut World<'_>) -> anyhow::Result<()> {
    world.ballast = Some(Ballast::fill(&world.fleet.machines[NODE].skimmerd.root())?);
    Ok(())
}

/// Of the files that are read all along.
fn steady_blobs(world: &World<'_>) -> [Digest; 2] {
    world.load.images().steady.each_ref().map(|known| known.blob)
}

fn spoil_blobs(world: &mut World<'_>) -> anyhow::Result<()> {
    steady_blobs(world).iter().try_for_each(|blob| spoil(&cached(world, "blobs-v1", blob)))
}

/// The files of an image that nobody reads meanwhile.
fn spoil_files(world: &mut World<'_>) -> anyhow::Result<()> {
    spoil(&cached(world, "layers-v1", &world.load.images().resting.blob))
}

fn find_spoilt_files(world: &mut World<'_>) -> anyhow::Result<()> {
    find_spoilt(world, &[world.load.images().resting.blob])?;
    world.load.run_what_rests()
}

/// Where the cache has the bytes of a blob, or those of its layer's files.
fn cached(world: &World<'_>, part: &str, blob: &Digest) -> PathBuf {
    let root = world.fleet.machines[NODE].skimmerd.root();
    root.join("cache").join(part).join(blob.hex()).join("data")
}

fn find_spoilt(world: &World<'_>, blobs: &[Digest]) -> anyhow::Result<()> {
    let mut verify = world.fleet.machines[NODE].skimmerd.skimmer(&["cache", "verify"])?;
    let said = failure_of(&mut verify, COMMAND_LIMIT)?;
    for blob in blobs {
        anyhow::ensure!(said.contains(&blob.to_string()), "{blob} is not in {said}");
    }
    Ok(())
}
