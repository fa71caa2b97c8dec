//! A swarm that loses parts of itself: schedulers, nodes, seed peers, the origin, a zone.

use std::time::Duration;

use skimmer_integration::command::wait_for;
use skimmer_integration::fleet::{Fleet, Setup, Spec};
use skimmer_integration::image::Image;
use skimmer_integration::scenario::scenario;

use crate::swarm_burst::{BITS_PER_SECOND, LIMIT, MIB, check_egress, image_of, shaped};

/// Prints how much the registry sent, and why nodes went there.
fn explain(fleet: &Fleet<'_>, image: &Image, machines: &[usize]) -> anyhow::Result<()> {
    println!("{} of {}", fleet.registry.sent_of(image).bytes, image.compressed_bytes());
    for number in machines {
        let lines = fleet.machines[*number].metric_lines("skimmer_swarm_origin_bytes_total")?;
        println!("node {number} since its start: {lines:?}");
    }
    Ok(())
}

#[test]
fn downloads_finish_without_a_scheduler() {
    scenario("swarm-scheduler-gone", |scenario| {
        let mut fleet = Fleet::of(scenario, shaped(), 4)?;
        let (first, second, third) = (
            image_of(scenario, "faults/first", &[12 << 20])?,
            image_of(scenario, "faults/second", &[3 << 20])?,
            image_of(scenario, "faults/third", &[3 << 20])?,
        );
        let reference = fleet.registry.add(&first)?;
        let builds: Vec<_> = fleet.machines.iter().map(|m| m.build(&reference)).collect();
        fleet.machines[3].wait_present(&first.layers[0].blob.digest, 2 * MIB)?;
        fleet.control.kill()?;
        for build in builds {
            build?.wait(LIMIT)?;
        }
        fleet.check_blobs(&first, &[0, 1, 2, 3])?;
        explain(&fleet, &first, &[0, 1, 2, 3])?;
        // What others were getting, and didn't yet say so, when the scheduler went.
        check_egress(&fleet.registry, &first, first.compressed_bytes() / 4)?;

        // A new blob while there is none: nodes share it out among those that they know.
        let reference = fleet.registry.add(&second)?;
        let took = fleet.build_everywhere(&reference, LIMIT)?;
        println!("without a scheduler: {:.2} s", took.as_secs_f64());
        explain(&fleet, &second, &[0, 1, 2, 3])?;
        check_egress(&fleet.registry, &second, second.compressed_bytes())?;

        // It comes back and knows nothing but what nodes tell it.
        fleet.control.run()?;
        fleet.wait_attending()?;
        let reference = fleet.registry.add(&third)?;
        fleet.build_everywhere(&reference, LIMIT)?;
        check_egress(&fleet.registry, &third, third.compressed_bytes())
    });
}

#[test]
fn a_restarted_node_knows_its_neighbours() {
    scenario("swarm-book", |scenario| {
        let mut fleet = Fleet::of(scenario, shaped(), 3)?;
        let (first, second) = (
            image_of(scenario, "faults/met", &[3 << 20])?,
            image_of(scenario, "faults/again", &[6 << 20])?,
        );
        let reference = fleet.registry.add(&first)?;
        fleet.build_everywhere(&reference, LIMIT)?;
        let met = [fleet.machines[0].peer()?, fleet.machines[1].peer()?];
        let book = fleet.machines[2].skimmerd.root().join("identity/peers");
        wait_for("the neighbours are on disk", Duration::from_secs(10), || {
            let book = std::fs::read_to_string(&book).ok()?;
            met.iter().all(|peer| book.contains(peer)).then_some(())
        })?;
        fleet.control.kill()?;
        fleet.machines[2].skimmerd.kill()?;
        fleet.machines[2].skimmerd.run()?;
        // Two that have nobody but each other and the origin, and one that only its book can tell of them.
        let reference = fleet.registry.add(&second)?;
        for machine in &fleet.machines[..2] {
            machine.build(&reference)?.wait(LIMIT)?;
        }
        let before = fleet.registry.sent_of(&second).bytes;
        fleet.machines[2].build(&reference)?.wait(LIMIT)?;
        let read_again = fleet.registry.sent_of(&second).bytes - before;
        // A byte asks the origin whether it serves everybody.
        anyhow::ensure!(read_again < MIB, "{read_again} bytes came from the registry");
        fleet.check_blobs(&second, &[0, 1, 2])
    });
}

#[test]
fn a_node_works_without_any_control_plane() {
    scenario("swarm-no-control-plane", |scenario| {
        let mut fleet = Fleet::start(scenario, Setup::default())?;
        fleet.control.kill()?;
        let token = "sk1.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
        fleet.add(&Spec { token: Some(token), ..Spec::default() })?;
        fleet.machines[0].skimmerd.expect_log("no fresh membership");
        let image = image_of(scenario, "faults/alone", &[6 << 20])?;
        let reference = fleet.registry.add(&image)?;
        fleet.machines[0].build(&reference)?.wait(LIMIT)?;
        check_egress(&fleet.registry, &image, 0)?;
        fleet.check_blobs(&image, &[0])?;
        anyhow::ensure!(fleet.machines[0].skimmerd.ask(&["peers"])?["cluster"] == "");
        Ok(())
    });
}

#[test]
fn half_of_the_nodes_are_killed() {
    scenario("swarm-half", |scenario| {
        let mut fleet = Fleet::of(scenario, shaped(), 6)?;
        let image = image_of(scenario, "faults/half", &[10 << 20, 4 << 20])?;
        let reference = fleet.registry.add(&image)?;
        let mut builds: Vec<_> =
            fleet.machines.iter().map(|m| m.build(&reference)).collect::<anyhow::Result<_>>()?;
        fleet.machines[5].wait_present(&image.layers[0].blob.digest, 2 * MIB)?;
        for machine in &mut fleet.machines[..3] {
            machine.skimmerd.kill()?;
        }
        let survivors = builds.split_off(3);
        for build in survivors {
            build.wait(LIMIT)?;
        }
        explain(&fleet, &image, &[3, 4, 5])?;
        // What nobody but the dead had.
        check_egress(&fleet.registry, &image, image.compressed_bytes() / 4)?;
        fleet.check_blobs(&image, &[3, 4, 5])
    });
}

#[test]
fn a_seed_peer_is_killed() {
    scenario("swarm-seed-gone", |scenario| {
        let mut fleet = Fleet::start(scenario, shaped())?;
        let seed = fleet.add(&Spec { role: "seed", ..Spec::default() })?;
        for _ in 0..3 {
            fleet.add(&Spec::default())?;
        }
        fleet.wait_attending()?;
        let image = image_of(scenario, "faults/seed", &[12 << 20])?;
        let reference = fleet.registry.add(&image)?;
        let builds: Vec<_> = fleet.machines[1..]
            .iter()
            .map(|machine| machine.build(&reference))
            .collect::<anyhow::Result<_>>()?;
        // Nobody asked it for the image but the scheduler.
        fleet.machines[seed].wait_present(&image.layers[0].blob.digest, 3 * MIB)?;
        fleet.machines[seed].skimmerd.kill()?;
        for build in builds {
            build.wait(LIMIT)?;
        }
        explain(&fleet, &image, &[1, 2, 3])?;
        check_egress(&fleet.registry, &image, image.compressed_bytes() / 4)?;
        fleet.check_blobs(&image, &[1, 2, 3])
    });
}

#[test]
fn a_zone_is_cut_off_and_comes_back() {
    scenario("swarm-zone", |scenario| {
        let setup = Setup { bits_per_second: Some(BITS_PER_SECOND), zones: 2, ..Setup::default() };
        let mut fleet = Fleet::start(scenario, setup)?;
        for zone in [0, 0, 1, 1] {
            fleet.add(&Spec { zone, ..Spec::default() })?;
        }
        fleet.wait_attending()?;
        let image = image_of(scenario, "faults/zone", &[12 << 20])?;
        let reference = fleet.registry.add(&image)?;
        let mut builds: Vec<_> =
            fleet.machines.iter().map(|m| m.build(&reference)).collect::<anyhow::Result<_>>()?;
        fleet.machines[3].wait_present(&image.layers[0].blob.digest, 2 * MIB)?;
        fleet.set_zone(1, false)?;
        let cut_off = builds.split_off(2);
        for build in builds {
            build.wait(LIMIT)?;
        }
        fleet.check_blobs(&image, &[0, 1])?;
        fleet.set_zone(1, true)?;
        for build in cut_off {
            build.wait(LIMIT)?;
        }
        explain(&fleet, &image, &[0, 1, 2, 3])?;
        check_egress(&fleet.registry, &image, image.compressed_bytes() / 4)?;
        fleet.check_blobs(&image, &[2, 3])
    });
}
