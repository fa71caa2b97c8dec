//! Faults while a node is at work: nobody finds other bytes or is told of an error, and nothing is lost or left behind.
//!
//! `SEED=n` repeats a list of kills; `SKIMMER_FAULT_KILLS` (200) says how many there are.

mod account;
mod images;
mod kills;
mod load;
mod reader;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use skimmer_integration::fleet::{Fleet, Setup, Spec};
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd;

use account::Account;
use images::Known;
use load::{Images, Load};

const MIB: usize = 1 << 20;
/// The seed peer, which has every image, and the node that things happen to.
const SEED_PEER: usize = 0;
const NODE: usize = 1;
/// Of every link: some things have to be under way when something happens.
const BITS_PER_SECOND: u64 = 100_000_000;
/// After so many kills everything has to get on.
const BATCH: usize = 20;

/// A cluster of a seed peer that has all images, and a node with a containerd, a holder and a load.
struct World<'a> {
    load: Load,
    fleet: Fleet<'a>,
    before: Account,
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario) -> anyhow::Result<Self> {
        let setup = Setup {
            bits_per_second: Some(BITS_PER_SECOND),
            skimmerd: skimmerd::Setup {
                background: Some(Duration::from_millis(200)),
                deadline: Duration::from_secs(120),
                holder: true,
                ..skimmerd::Setup::default()
            },
            ..Setup::default()
        };
        let mut fleet = Fleet::start(scenario, setup)?;
        fleet.add(&Spec { role: "seed", ..Spec::default() })?;
        fleet.add(&Spec { containerd: true, ..Spec::default() })?;
        fleet.wait_attending()?;
        let known =
            |name: &str, sizes: &[usize]| Known::new(scenario, &fleet, SEED_PEER, name, sizes);
        let small = [7001; 64];
        let images = Images {
            steady: [
                known("cached", &[&[4 * MIB, 3 * MIB + 1][..], &small].concat())?,
                known("direct", &[8 * MIB])?,
            ],
            pulled: known("pulled", &[&[3 * MIB, 4097][..], &small].concat())?,
            filled: known("filled", &[8 * MIB])?,
        };
        let mut load = Load::start(&fleet.machines[NODE], images, &scenario.path("said"))?;
        load.wait_progress()?;
        // What was lazy is complete by now: a daemon that starts has the kernel serve it as well.
        let node = &mut fleet.machines[NODE];
        node.skimmerd.kill()?;
        node.skimmerd.run()?;
        load.wait_progress()?;
        load.pause()?;
        let before = Account::of(&fleet.machines[NODE])?;
        load.resume();
        Ok(Self { load, fleet, before })
    }

    /// Everything gets on, nothing is lost, and nothing is left but what was there before.
    fn end(mut self) -> anyhow::Result<()> {
        self.load.wait_progress()?;
        self.load.pause()?;
        self.before.wait_balanced(&self.fleet.machines[NODE])?;
        println!("{:?}", self.load.progress());
        self.load.end()
    }
}

/// A number from the environment.
fn number(name: &str, otherwise: u64) -> anyhow::Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is a number")),
        Err(_) => Ok(otherwise),
    }
}

#[test]
fn kills_at_random_moments_cost_nothing() {
    scenario("fault-kills", |scenario| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let seed = number("SEED", now.as_secs() % 1_000_000)?;
        let count = number("SKIMMER_FAULT_KILLS", 200)?;
        println!("repeat with SEED={seed}");
        let mut world = World::new(scenario)?;
        world.fleet.machines[NODE].skimmerd.expect_log("the holder of descriptors is gone");
        let (start, mut done) = (Instant::now(), 0);
        for kill in kills::plan(seed, usize::try_from(count)?) {
            let Fleet { machines, control, .. } = &mut world.fleet;
            kills::carry_out(&kill, &mut machines[NODE], control)
                .and_then(|()| world.load.check())
                .with_context(|| format!("SEED={seed}, after {done} kills: {kill:?}"))?;
            let batches = done / BATCH;
            done += kill.count();
            if done / BATCH > batches {
                world
                    .load
                    .wait_progress()
                    .with_context(|| format!("SEED={seed}, after {done} kills"))?;
            }
        }
        println!("{done} kills in {:.0} s", start.elapsed().as_secs_f64());
        world.end().with_context(|| format!("SEED={seed}"))
    });
}
