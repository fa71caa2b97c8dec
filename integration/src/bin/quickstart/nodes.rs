//! Three nodes that want the same image at once, each on a host of its own: with overlayfs, and as a cluster.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use skimmer_integration::ctr::Pull;
use skimmer_integration::debian::{self, COMMAND};
use skimmer_integration::fleet::{Fleet, Machine, Setup, Spec};
use skimmer_integration::scenario::{self, Scenario};
use skimmer_integration::start::Way;
use skimmer_integration::{skimmerd, world};

pub const COUNT: usize = 3;

/// What came of it.
pub struct Together {
    pub way: Way,
    /// Until the last node's container printed its first line.
    pub last: Duration,
    /// Of layers, from the registry.
    pub origin: u64,
    /// Of layers, from node to node.
    pub swarm: u64,
}

/// Pulls and runs the image on all nodes at once, in each way; nodes and registry have links of the same speed.
pub fn compare(bits_per_second: Option<u64>) -> anyhow::Result<Vec<Together>> {
    let run = |way| {
        println!("… on {COUNT} nodes at once with {} …", way_name(way));
        scenario::run("quickstart-nodes", |scenario| measure(scenario, way, bits_per_second))
    };
    Ok(vec![run(Way::Overlayfs)?, run(Way::Skimmer)?])
}

pub fn way_name(way: Way) -> &'static str {
    way.snapshotter()
}

fn measure(
    scenario: &Scenario,
    way: Way,
    bits_per_second: Option<u64>,
) -> anyhow::Result<Together> {
    let image = debian::numpy(&scenario.path("blobs"))?;
    let skimmerd = skimmerd::Setup {
        min_layer_bytes: 1 << 20,
        background: Some(Duration::from_secs(60)),
        deadline: Duration::from_secs(300),
        ..skimmerd::Setup::default()
    };
    let setup = Setup { bits_per_second, skimmerd, ..Setup::default() };
    let mut fleet = Fleet::start(scenario, setup)?;
    for _ in 0..COUNT {
        fleet.add(&Spec { containerd: true, ..Spec::default() })?;
    }
    fleet.wait_attending()?;
    let reference = fleet.registry.add(&image)?;
    world::drop_caches()?;
    let start = Instant::now();
    let ended: Vec<anyhow::Result<Duration>> = std::thread::scope(|scope| {
        let reference = reference.as_str();
        let run = |machine| scope.spawn(move || pull_and_run(machine, reference, way, start));
        let jobs: Vec<_> = fleet.machines.iter().map(run).collect();
        let end = |job: std::thread::ScopedJoinHandle<'_, _>| job.join();
        let broken = |_| Err(anyhow::anyhow!("a node's thread ended early"));
        jobs.into_iter().map(|job| end(job).unwrap_or_else(broken)).collect()
    });
    let ended: Vec<Duration> = ended.into_iter().collect::<anyhow::Result<_>>()?;
    let received: Vec<u64> =
        fleet.machines.iter().map(Machine::from_peers).collect::<anyhow::Result<_>>()?;
    Ok(Together {
        way,
        last: ended.into_iter().max().context("there are no nodes")?,
        origin: fleet.registry.sent_of(&image).bytes,
        swarm: received.into_iter().sum(),
    })
}

/// How long after `start` the container printed its first line.
fn pull_and_run(
    machine: &Machine,
    reference: &str,
    way: Way,
    start: Instant,
) -> anyhow::Result<Duration> {
    let containerd = machine.containerd()?;
    containerd.pull(&Pull::new(reference, way.snapshotter()))?;
    let pulled = start.elapsed();
    let line = containerd.first_line(reference, way.snapshotter(), "first", &COMMAND)?;
    anyhow::ensure!(line.text == "1", "the container printed {:?} instead of 1", line.text);
    Ok(start.elapsed().min(pulled + line.after))
}
