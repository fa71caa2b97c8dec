//! Faults while a node is at work: nobody finds other bytes or is told of an error, and nothing is lost or left behind.
//!
//! `SEED=n` repeats a list of kills; `SKIMMER_FAULT_KILLS` (200) says how many there are, and `SKIMMER_SOAK` (20) for how
//! many seconds growth is looked for.

mod account;
mod bereaved;
mod images;
mod kills;
mod load;
mod reader;
mod scripted;
mod soak;

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use skimmer_integration::command;
use skimmer_integration::docker_config::{self, CredentialHelper};
use skimmer_integration::fleet::{Fleet, Setup, Spec};
use skimmer_integration::front::Front;
use skimmer_integration::mounts::{self, Mounted};
use skimmer_integration::names::Names;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd;

use account::Account;
use images::Known;
use load::{Images, Indexes, Load};
use scripted::{around, operators, registry};

use crate::full_disk::Ballast;

const MIB: usize = 1 << 20;
/// The seed peer, which has every image, and the node that things happen to.
const SEED_PEER: usize = 0;
const NODE: usize = 1;
/// The front's, to nodes.
const NAME: &str = "registry.test";
/// The node's name at the registry.
const USER: &str = "alice";
/// Of every link: some things have to be under way when something happens.
const BITS_PER_SECOND: u64 = 100_000_000;
/// Of the node's own disk, where it has one.
const DISK_BYTES: u64 = 192 << 20;
/// Too little for everything that the load wants.
const QUOTA_BYTES: u64 = 44 << 20;
/// After so many kills everything has to get on.
const BATCH: usize = 20;

/// A cluster of a seed peer that has all images, and a node with a containerd, a holder and a load.
struct World<'a> {
    load: Load,
    ballast: Option<Ballast>,
    front: Front,
    /// Of each machine.
    names: [Names; 2],
    /// docker's `config.json` of the node.
    credentials: PathBuf,
    /// What that may name.
    helper: CredentialHelper,
    fleet: Fleet<'a>,
    scenario: &'a Scenario,
    before: Account,
    _disk: Option<Mounted>,
}

/// What differs between the worlds of tests.
struct Plan {
    /// Of each node's cache.
    quota_bytes: u64,
    /// The node keeps everything on a disk of its own.
    disk: bool,
    indexes: Indexes,
    /// Whether the kernel may be asked to send again what a dead daemon left unanswered.
    resend: bool,
    /// Whether the node has CRI, with skimmerd's image service.
    cri: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self { quota_bytes: 0, disk: false, indexes: Indexes::Swarm, resend: true, cri: false }
    }
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario, plan: &Plan) -> anyhow::Result<Self> {
        let setup = Setup {
            bits_per_second: Some(BITS_PER_SECOND),
            skimmerd: skimmerd::Setup {
                background: Some(Duration::from_millis(200)),
                deadline: Duration::from_secs(120),
                helpers: Some(docker_config::helpers(scenario)),
                holder: true,
                quota_bytes: plan.quota_bytes,
                resend: plan.resend,
                ..skimmerd::Setup::default()
            },
            ..Setup::default()
        };
        let mut fleet = Fleet::start(scenario, setup)?;
        let (host, hosts) = (fleet.spare_host()?, scenario.hosts());
        let address = host.address();
        let front = Front::start(host, NAME, fleet.registry.address(), &hosts)?;
        let helper = CredentialHelper::new(scenario, USER)?;
        fleet.add(&Spec { role: "seed", ..Spec::default() })?;
        let disk = plan.disk.then(|| disk(scenario)).transpose()?;
        let credentials = scenario.path("config.json");
        let docker_config = Some(credentials.as_path());
        fleet.add(&Spec { containerd: true, cri: plan.cri, docker_config, ..Spec::default() })?;
        fleet.wait_attending()?;
        let names = |machine: usize| Names::start(&fleet.machines[machine].host, NAME, address);
        let names = [names(SEED_PEER)?, names(NODE)?];
        let (images, said) = (images(scenario, &fleet)?, scenario.path("said"));
        let mut load = Load::start(&fleet.machines[NODE], images, plan.indexes, &said)?;
        if plan.quota_bytes > 0 {
            // For a moment all images are in use: the fullest that the cache can be.
            fleet.machines[NODE].skimmerd.expect_log(OVER_QUOTA);
        }
        load.wait_progress()?;
        // What was lazy is complete by now: a daemon that starts has the kernel serve it as well.
        let node = &mut fleet.machines[NODE].skimmerd;
        node.kill()?;
        let standing = load.stands_still();
        node.run()?;
        standing?;
        load.wait_progress()?;
        load.pause()?;
        let before = Account::of(&fleet.machines[NODE])?;
        load.resume();
        Ok(Self {
            load,
            ballast: None,
            front,
            names,
            credentials,
            helper,
            fleet,
            scenario,
            before,
            _disk: disk,
        })
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

fn images(scenario: &Scenario, fleet: &Fleet<'_>) -> anyhow::Result<Images> {
    let known = |name: &str, sizes: &[usize]| Known::new(scenario, fleet, SEED_PEER, name, sizes);
    let small = [7001; 64];
    Ok(Images {
        steady: [
            known("cached", &[&[4 * MIB, 3 * MIB + 1][..], &small].concat())?,
            known("direct", &[8 * MIB])?,
        ],
        pulled: known("pulled", &[&[3 * MIB, 4097][..], &small].concat())?,
        filled: known("filled", &[8 * MIB])?,
        resting: known("resting", &[MIB])?,
        late: known("late", &[2 * MIB])?,
        whole: known("whole", &[8 * MIB])?,
    })
}

/// What the node keeps everything on.
fn disk(scenario: &Scenario) -> anyhow::Result<Mounted> {
    let file = scenario.path("disk");
    File::create(&file)?.set_len(DISK_BYTES)?;
    let path = file.to_str().context("path is not UTF-8")?;
    command::run("mkfs.ext4", ["-q", path])?;
    mounts::mount("ext4", path, &["loop".to_owned()], &scenario.path("n1/root"))
}

/// A number from the environment.
fn number(name: &str, otherwise: u64) -> anyhow::Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is a number")),
        Err(_) => Ok(otherwise),
    }
}

/// What the daemon says when more is in use than the cache may have.
const OVER_QUOTA: &str = "cache is over its quota";

/// What the daemon says while its holder is dead: also why it serves a layer itself that the kernel would have served.
const WITHOUT_HOLDER: [&str; 3] = [
    "the holder of descriptors is gone",
    "a mount will not survive this process",
    "reach the holder of descriptors",
];

#[test]
fn kills_at_random_moments_cost_nothing() {
    scenario("fault-kills", |scenario| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let seed = number("SEED", now.as_secs() % 1_000_000)?;
        let count = number("SKIMMER_FAULT_KILLS", 200)?;
        println!("repeat with SEED={seed}");
        // Every other time a successor has nothing but the journal of requests to go by.
        let resend = seed % 2 == 0;
        let plan = Plan { quota_bytes: QUOTA_BYTES, resend, ..Plan::default() };
        let mut world = World::new(scenario, &plan)?;
        for part in WITHOUT_HOLDER {
            world.fleet.machines[NODE].skimmerd.expect_log(part);
        }
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

#[test]
fn faults_of_the_node_and_its_surroundings_cost_nothing() {
    let plan = Plan { disk: true, ..Plan::default() };
    scenario("fault-node", |scenario| suffer_all(scenario, &plan, &around::FAULTS, &[]));
}

#[test]
fn faults_of_the_registry_cost_nothing() {
    let plan = Plan { disk: true, indexes: Indexes::Node, cri: true, ..Plan::default() };
    scenario("fault-registry", |scenario| suffer_all(scenario, &plan, &registry::FAULTS, &[]));
}

#[test]
fn what_operators_do_costs_nothing() {
    let plan = Plan { indexes: Indexes::Node, ..Plan::default() };
    let said = [&WITHOUT_HOLDER[..], &[OVER_QUOTA]].concat();
    scenario("fault-operators", |scenario| suffer_all(scenario, &plan, &operators::FAULTS, &said));
}

/// `said`: what the node says of these alone.
fn suffer_all(
    scenario: &Scenario,
    plan: &Plan,
    faults: &[scripted::Fault],
    said: &[&str],
) -> anyhow::Result<()> {
    let mut world = World::new(scenario, plan)?;
    for part in scripted::SAID.iter().chain(said) {
        world.fleet.machines[NODE].skimmerd.expect_log(part);
    }
    registry::log_in(&world, registry::TODAY)?;
    for fault in faults {
        let start = Instant::now();
        scripted::suffer(fault, &mut world).context(fault.name)?;
        println!("{}: {:.1} s", fault.name, start.elapsed().as_secs_f64());
    }
    world.end()
}

#[test]
fn nothing_grows_under_load() {
    scenario("fault-soak", |scenario| {
        let time = Duration::from_secs(number("SKIMMER_SOAK", 20)?);
        let world = World::new(scenario, &Plan { quota_bytes: QUOTA_BYTES, ..Plan::default() })?;
        soak::soak(&world, time)?;
        world.end()
    });
}
