//! The real scheduler and the nodes' real download planners over a modelled network, in virtual time.
//!
//! Links carry pieces one after the other, or share themselves out among all transfers ([`Sharing`]); messages take their
//! latency. One seed is one history. After every event [`skimmer_scheduler::check`] looks at what the scheduler answered,
//! and [`skimmer_swarm::plan::check`] at what the planner did.

mod network;
mod node;
pub mod random;

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use skimmer_proto::PieceSet;
use skimmer_scheduler::{Event, Limits, Now, Scheduler, Shape};
use skimmer_swarm::plan;

pub use network::run;

/// What is simulated: `nodes` nodes want blobs that only the origin has.
#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    pub nodes: u32,
    /// Blobs, and how many of them a node pulls at once.
    pub tasks: usize,
    pub at_once: usize,
    /// Of each blob.
    pub shape: Shape,
    pub sharing: Sharing,
    pub zones: u32,
    /// Of every link in each direction, the origin's included, in bytes per second.
    pub rate: u64,
    /// Nodes tell their rate to the scheduler.
    pub declared: bool,
    /// One way, between nodes and to the origin.
    pub latency: Duration,
    /// From a node's first request to another until that has it: the link is made first.
    pub connect: Duration,
    /// One way, between a node and the scheduler.
    pub control: Duration,
    /// The nodes begin within so long of each other.
    pub spread: Duration,
    /// Nodes that die while the burst lasts, and nodes that come in the meantime.
    pub dying: u32,
    pub joining: u32,
    /// Of the nodes, those from number 0 on behave so.
    pub oddities: Vec<Oddity>,
    /// Nodes want single pieces for readers, now and then.
    pub readers: bool,
    /// The scheduler is watched.
    pub checked: bool,
    /// What the scheduler is told is kept.
    pub recorded: bool,
    /// The scheduler's, and each node's planner's.
    pub limits: Limits,
    pub planner: plan::Limits,
}

/// How transfers share a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// A piece has the link for itself, and the next one waits.
    InTurn,
    /// As over TCP: each gets its max-min fair share.
    Fair,
}

/// How a node can behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Oddity {
    /// As it should.
    None,
    /// Its links have this part of the others' rate.
    Slow(u64),
    /// It says that it has what it hasn't.
    Liar,
    /// It sends wrong bytes.
    Corrupt,
    /// It answers nobody.
    Stalling,
    /// The origin refuses it.
    Refused,
    /// The origin breaks off every other transfer of it.
    Unlucky,
    /// It has everything from the start.
    Complete,
    /// A seed peer.
    Seed,
}

/// How it went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// From the burst's begin until the last of the nodes that live has everything.
    pub makespan: Duration,
    /// The same, of the nodes that were there from the beginning.
    pub survivors: Duration,
    /// When each node was done, in order; nodes that died are left out.
    pub done: Vec<Duration>,
    /// Nodes that live and didn't get everything.
    pub unfinished: u32,
    /// Pieces that the origin sent.
    pub origin_pieces: u64,
    /// Of those, the ones that somebody took in.
    pub origin_arrived: u64,
    /// Pieces that went from one zone into another, the origin's not counted.
    pub across: u64,
    pub peer_pieces: u64,
    /// Events that nodes sent to the scheduler.
    pub node_events: u64,
    /// All that it was told, if recorded.
    pub log: Vec<(Now, Event)>,
}

impl Setup {
    /// Equal links of 100 Mbit/s, pieces of 1 MiB, one zone, nothing goes wrong.
    pub fn new(nodes: u32, pieces: u32) -> Self {
        Self {
            seed: 1,
            nodes,
            tasks: 1,
            at_once: 3,
            sharing: Sharing::InTurn,
            shape: Shape { pieces, piece_len: 1 << 20 },
            zones: 1,
            rate: 12_500_000,
            declared: true,
            latency: Duration::from_micros(250),
            connect: Duration::from_micros(1750),
            control: Duration::from_millis(1),
            spread: Duration::from_millis(20),
            dying: 0,
            joining: 0,
            oddities: Vec::new(),
            readers: false,
            checked: true,
            recorded: false,
            limits: Limits::default(),
            planner: plan::Limits::default(),
        }
    }

    /// How long one piece takes on one link.
    pub fn piece_time(&self) -> Duration {
        time(self.shape.piece_len, self.rate)
    }

    /// The least makespan that is possible: (F/u)(1 + ⌊log₂N⌋/M).
    pub fn ideal(&self) -> Duration {
        self.piece_time() * (self.pieces() + self.nodes.max(1).ilog2())
    }

    /// Of all blobs.
    fn pieces(&self) -> u32 {
        self.shape.pieces * u32::try_from(self.tasks).unwrap_or(u32::MAX)
    }

    fn all(&self) -> PieceSet {
        PieceSet::all(self.shape.pieces)
    }
}

impl Outcome {
    /// The makespan in parts of the least possible.
    pub fn ratio(&self, setup: &Setup) -> f64 {
        self.makespan.as_secs_f64() / setup.ideal().as_secs_f64()
    }

    /// The same for the nodes that were there from the beginning.
    pub fn survivors_ratio(&self, setup: &Setup) -> f64 {
        self.survivors.as_secs_f64() / setup.ideal().as_secs_f64()
    }

    /// What the origin sent, in blobs.
    pub fn egress(&self, setup: &Setup) -> f64 {
        self.origin_pieces as f64 / f64::from(setup.pieces())
    }

    /// What went between zones, in blobs.
    pub fn copies_across(&self, setup: &Setup) -> f64 {
        self.across as f64 / f64::from(setup.pieces())
    }
}

/// The processor time that a scheduler takes for what another was told.
pub fn replay(limits: &Limits, log: Vec<(Now, Event)>) -> anyhow::Result<Duration> {
    let mut scheduler = Scheduler::new(limits.clone());
    let start = processor_time()?;
    for (now, event) in log {
        std::hint::black_box(scheduler.apply(now, event));
    }
    Ok(processor_time()?.saturating_sub(start))
}

/// Of this thread.
fn processor_time() -> anyhow::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// How long `bytes` take at `rate` bytes per second.
fn time(bytes: u64, rate: u64) -> Duration {
    Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate.max(1))
}
