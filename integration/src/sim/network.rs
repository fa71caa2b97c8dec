//! The network, the nodes' transfers, and the clock.

mod transfers;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::time::Duration;

use skimmer_proto::PieceSet;
use skimmer_scheduler::check::Check;
use skimmer_scheduler::{Action, Class, Event, Fault, NodeId, NodeInfo, Scheduler};

use super::planner::{Planner, Simple, Step};
use super::random::Random;
use super::{Oddity, Outcome, Setup, time};

/// When the burst begins: everybody has joined and announced.
const BURST: Duration = Duration::from_secs(1);
/// How long after a node's death its stream ends and its children notice.
const LOSS: Duration = Duration::from_millis(1000);
/// How long a child waits for a piece in vain.
const STALL: Duration = Duration::from_secs(5);

enum What {
    /// An event reaches the scheduler.
    Report(Event),
    /// An action reaches a node.
    Told(u32, Action),
    Tick,
    /// A node begins, or dies.
    Begin(u32),
    Die(u32),
    /// A request reaches the parent (`None`: the origin), which answers when its upload is free.
    Request(u64),
    /// The parent has sent the last byte.
    Sent(Option<u32>, u64),
    /// The first byte reaches the child; the last one left the parent, or will, at the time.
    FirstByte(u64, Duration),
    Arrive(u64),
    /// The transfer failed, and the child knows.
    Fail(u64, Fault),
    /// The child loses patience.
    Patience(u64),
    /// A neighbour's news.
    Has(u32, u32, PieceSet),
    Reader(u32),
}

struct Due {
    at: Duration,
    number: u64,
    what: What,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

struct Transfer {
    child: u32,
    parent: Option<u32>,
    piece: u32,
}

struct Node {
    oddity: Oddity,
    zone: u32,
    rate: u64,
    alive: bool,
    dead: bool,
    have: PieceSet,
    planner: Simple,
    up: Uplink,
    down_free: Duration,
    done: Option<Duration>,
    followers: BTreeSet<u32>,
    following: Vec<u32>,
    leases: u32,
}

#[derive(Default)]
struct Uplink {
    queue: VecDeque<u64>,
    busy: Option<u64>,
}

struct World<'a> {
    setup: &'a Setup,
    random: Random,
    now: Duration,
    scheduler: Scheduler,
    check: Check,
    queue: BinaryHeap<Reverse<Due>>,
    count: u64,
    tick: Option<Duration>,
    nodes: Vec<Node>,
    origin: Uplink,
    transfers: BTreeMap<u64, Transfer>,
    next_transfer: u64,
    outcome: Outcome,
    trace: VecDeque<String>,
    unfinished: u32,
}

/// Runs a setup to its end. Fails if the scheduler breaks a promise, or leaves nodes without what they could have.
pub fn run(setup: &Setup) -> anyhow::Result<Outcome> {
    let mut world = World::new(setup);
    world.populate();
    let slowest = setup.oddities.iter().map(|oddity| match oddity {
        Oddity::Slow(part) => u32::try_from(*part).unwrap_or(u32::MAX),
        _ => 1,
    });
    let slowest = slowest.max().unwrap_or(1);
    let end = BURST + setup.ideal() * slowest * 8 + Duration::from_secs(900);
    while let Some(Reverse(due)) = world.queue.pop() {
        world.now = due.at;
        if due.at > end || world.unfinished == 0 && world.now > BURST {
            break;
        }
        if let Err(error) = world.step(due.what) {
            return Err(error.context(world.history()));
        }
    }
    if setup.checked && world.unfinished > 0 {
        let starving = world.check.starving();
        anyhow::ensure!(
            starving.is_empty() && world.check.coming() == 0,
            "seed {}: {} nodes aren't done, {} pieces starve ({:?} …), {} are on their way\n{}",
            setup.seed,
            world.unfinished,
            starving.len(),
            starving.first(),
            world.check.coming(),
            world.history()
        );
    }
    Ok(world.finish())
}

impl<'a> World<'a> {
    fn new(setup: &'a Setup) -> Self {
        let outcome = Outcome {
            makespan: Duration::ZERO,
            survivors: Duration::ZERO,
            done: Vec::new(),
            unfinished: 0,
            origin_pieces: 0,
            origin_arrived: 0,
            across: 0,
            peer_pieces: 0,
            node_events: 0,
            log: Vec::new(),
        };
        Self {
            setup,
            random: Random::new(setup.seed),
            now: Duration::ZERO,
            scheduler: Scheduler::new(setup.limits.clone()),
            check: Check::new(setup.limits.clone()),
            queue: BinaryHeap::new(),
            count: 0,
            tick: None,
            nodes: Vec::new(),
            origin: Uplink::default(),
            transfers: BTreeMap::new(),
            next_transfer: 0,
            outcome,
            trace: VecDeque::new(),
            unfinished: 0,
        }
    }

    fn history(&self) -> String {
        let lines: Vec<&str> = self.trace.iter().map(String::as_str).collect();
        format!("replay with SEED={}; the latest events:\n{}", self.setup.seed, lines.join("\n"))
    }

    fn at(&mut self, at: Duration, what: What) {
        self.count += 1;
        self.queue.push(Reverse(Due { at, number: self.count, what }));
    }

    /// From a node to the scheduler.
    fn report(&mut self, event: Event) {
        self.outcome.node_events += 1;
        self.at(self.now + self.setup.control, What::Report(event));
    }

    fn populate(&mut self) {
        let setup = self.setup;
        let span = setup.ideal();
        for number in 0..setup.nodes + setup.joining {
            let index = usize::try_from(number).unwrap_or(usize::MAX);
            let oddity = setup.oddities.get(index).copied().unwrap_or(Oddity::None);
            let rate = if let Oddity::Slow(part) = oddity { setup.rate / part } else { setup.rate };
            let complete = oddity == Oddity::Complete;
            let have = if complete { setup.all() } else { PieceSet::new() };
            self.nodes.push(Node {
                oddity,
                zone: number % setup.zones.max(1),
                rate,
                alive: false,
                dead: false,
                planner: Simple::new(setup.all().difference(&have), number),
                have,
                up: Uplink::default(),
                down_free: Duration::ZERO,
                done: complete.then_some(Duration::ZERO),
                followers: BTreeSet::new(),
                following: Vec::new(),
                leases: 0,
            });
            let joins = number >= setup.nodes;
            let begin = if joins {
                BURST + nanos(self.random.below(as_nanos(span)))
            } else {
                BURST + nanos(self.random.below(as_nanos(setup.spread).max(1)))
            };
            if joins {
                self.at(begin, What::Report(self.greeting(number)));
            } else {
                let greeting = self.greeting(number);
                self.at(Duration::ZERO, What::Report(greeting));
            }
            self.at(begin, What::Begin(number));
            self.unfinished += u32::from(!complete);
        }
        let mut order: Vec<u32> = (0..setup.nodes).collect();
        for last in (1..order.len()).rev() {
            let other = usize::try_from(self.random.below(last as u64 + 1)).unwrap_or(0);
            order.swap(last, other);
        }
        let dying: Vec<u32> =
            order.iter().copied().take(usize::try_from(setup.dying).unwrap_or(0)).collect();
        for number in dying {
            let at = BURST + nanos(self.random.below(as_nanos(span)));
            self.at(at, What::Die(number));
        }
        if setup.readers {
            for number in order {
                let at = BURST + nanos(self.random.below(as_nanos(span)));
                self.at(at, What::Reader(number));
            }
        }
    }

    fn greeting(&self, number: u32) -> Event {
        let node = &self.nodes[number as usize];
        let rate = if self.setup.declared { node.rate } else { 0 };
        let seed = node.oddity == Oddity::Seed;
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        let zone = format!("z{}", node.zone);
        let info = NodeInfo { key, zone, seed, upload: rate, download: rate };
        Event::Joined { node: NodeId(u64::from(number)), info }
    }

    fn step(&mut self, what: What) -> anyhow::Result<()> {
        match what {
            What::Report(event) => self.decide(event)?,
            What::Tick => {
                // One that came before it has made it needless otherwise.
                if self.tick == Some(self.now) {
                    self.tick = None;
                    self.decide(Event::Tick)?;
                }
            }
            What::Told(node, action) => self.told(node, &action),
            What::Begin(node) => self.begin(node),
            What::Die(node) => self.die(node),
            What::Request(id) => self.request(id),
            What::Sent(parent, id) => self.sent(parent, id),
            What::FirstByte(id, last) => self.first_byte(id, last),
            What::Arrive(id) => self.arrive(id),
            What::Fail(id, fault) => self.fail(id, fault),
            What::Patience(id) => {
                if self.transfers.contains_key(&id) {
                    self.fail(id, Fault::Slow);
                }
            }
            What::Has(node, from, pieces) => {
                if self.nodes[node as usize].alive {
                    let steps = self.nodes[node as usize]
                        .planner
                        .peer_has(NodeId(u64::from(from)), &pieces);
                    self.take(node, steps);
                }
            }
            What::Reader(node) => self.reader(node),
        }
        Ok(())
    }

    /// One event through the scheduler.
    fn decide(&mut self, event: Event) -> anyhow::Result<()> {
        let copy = self.setup.checked.then(|| event.clone());
        if self.setup.recorded {
            self.outcome.log.push((self.now, event.clone()));
        }
        let actions = self.scheduler.apply(self.now, event);
        if let Some(event) = copy {
            if self.setup.nodes <= 32 && !(actions.is_empty() && event == Event::Tick) {
                self.trace.push_back(format!("{:?} {event:?}\n  -> {actions:?}", self.now));
                if self.trace.len() > 60 {
                    self.trace.pop_front();
                }
            }
            self.check.step(self.now, &event, &actions)?;
        }
        for action in actions {
            let (Action::Assign { node, .. }
            | Action::Lease { node, .. }
            | Action::Neighbours { node, .. }
            | Action::Cancel { node, .. }
            | Action::Seed { node, .. }) = &action;
            let number = u32::try_from(node.0)?;
            self.at(self.now + self.setup.control, What::Told(number, action));
        }
        if let Some(wake) = self.scheduler.next_wake()
            && self.tick.is_none_or(|tick| wake < tick)
        {
            let wake = wake.max(self.now);
            self.tick = Some(wake);
            self.at(wake, What::Tick);
        }
        Ok(())
    }

    fn begin(&mut self, number: u32) {
        let (task, shape) = (self.setup.task(), self.setup.shape);
        let all = self.setup.all();
        let node = &mut self.nodes[number as usize];
        if node.dead {
            return;
        }
        node.alive = true;
        let id = NodeId(u64::from(number));
        let said = if node.oddity == Oddity::Liar { all.clone() } else { node.have.clone() };
        let missing = all.difference(&node.have);
        let (liar, complete) = (node.oddity == Oddity::Liar, missing.is_empty());
        if !said.is_empty() {
            self.report(Event::Announce { node: id, task, shape, pieces: said });
        }
        self.report(Event::Announced { node: id });
        if !complete && !liar {
            let class = Class::PullThrough;
            self.report(Event::Want {
                node: id,
                task,
                shape,
                pieces: missing,
                class,
                origin: true,
            });
        }
        if liar {
            self.unfinished -= 1;
            self.nodes[number as usize].done = Some(Duration::ZERO);
        }
    }

    fn reader(&mut self, number: u32) {
        let node = &self.nodes[number as usize];
        if !node.alive || node.oddity == Oddity::Liar {
            return;
        }
        let (task, shape) = (self.setup.task(), self.setup.shape);
        let piece = u32::try_from(self.random.below(u64::from(shape.pieces))).unwrap_or(0);
        if !self.nodes[number as usize].have.contains(piece) {
            let pieces = std::iter::once(piece).collect();
            let (node, class) = (NodeId(u64::from(number)), Class::Fault);
            self.report(Event::Want { node, task, shape, pieces, class, origin: true });
        }
    }

    fn die(&mut self, number: u32) {
        let node = &mut self.nodes[number as usize];
        node.dead = true;
        if node.done.take().is_none() {
            self.unfinished -= 1;
        }
        node.alive = false;
        node.up = Uplink::default();
        let lost: Vec<(u64, bool)> = self
            .transfers
            .iter()
            .filter(|(_, t)| t.child == number || t.parent == Some(number))
            .map(|(id, t)| (*id, t.child == number))
            .collect();
        for (id, own) in lost {
            if own {
                self.transfers.remove(&id);
            } else {
                self.at(self.now + LOSS, What::Fail(id, Fault::Gone));
            }
        }
        self.at(self.now + LOSS, What::Report(Event::Left { node: NodeId(u64::from(number)) }));
    }

    fn told(&mut self, number: u32, action: &Action) {
        if self.nodes[number as usize].alive {
            let steps = self.nodes[number as usize].planner.told(action);
            self.take(number, steps);
        }
    }

    fn take(&mut self, number: u32, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::Fetch { from, pieces } => {
                    let parent = from.and_then(|id| u32::try_from(id.0).ok());
                    pieces.iter().for_each(|piece| self.fetch(number, parent, piece));
                }
                Step::Drop { pieces } => {
                    let gone: Vec<u64> = self
                        .transfers
                        .iter()
                        .filter(|(_, t)| t.child == number && pieces.contains(t.piece))
                        .map(|(id, _)| *id)
                        .collect();
                    for id in gone {
                        self.transfers.remove(&id);
                    }
                }
                Step::Follow { peers } => self.follow(number, &peers),
            }
        }
    }

    fn follow(&mut self, number: u32, peers: &[NodeId]) {
        for old in std::mem::take(&mut self.nodes[number as usize].following) {
            self.nodes[old as usize].followers.remove(&number);
        }
        for peer in peers.iter().filter_map(|id| u32::try_from(id.0).ok()) {
            self.nodes[number as usize].following.push(peer);
            self.nodes[peer as usize].followers.insert(number);
            let have = self.nodes[peer as usize].have.clone();
            self.at(self.now + self.setup.latency * 2, What::Has(number, peer, have));
        }
    }

    fn finish(self) -> Outcome {
        let mut done: Vec<Duration> = self.nodes.iter().filter_map(|node| node.done).collect();
        done.sort_unstable();
        let makespan = done.last().copied().unwrap_or_default();
        let first = self.nodes.iter().take(usize::try_from(self.setup.nodes).unwrap_or(0));
        let survivors = first.filter_map(|node| node.done).max().unwrap_or_default();
        Outcome { makespan, survivors, done, unfinished: self.unfinished, ..self.outcome }
    }
}

fn as_nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

const fn nanos(nanos: u64) -> Duration {
    Duration::from_nanos(nanos)
}
