//! The network, the nodes' transfers, and the clock.

mod lines;
mod transfers;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::Duration;

use anyhow::Context as _;
use skimmer_proto::{PieceSet, TaskId};
use skimmer_scheduler::check::Check;
use skimmer_scheduler::{Action, Event, NodeInfo, Scheduler};
use skimmer_swarm::plan;

use self::lines::{Flows, Line, LineKey};
use super::node::{Node, addressee, heard, id, key, peer, task_id};
use super::random::Random;
use super::{Oddity, Outcome, Setup, time};

/// When the burst begins: everybody has joined and announced.
const BURST: Duration = Duration::from_secs(1);
/// How long after a node's death its stream ends and its children notice.
const LOSS: Duration = Duration::from_millis(1000);

/// Lines of history that are kept for when a promise is broken.
const TRACED: usize = 100;

/// Whose request, and its number there.
pub type RequestKey = (u32, plan::RequestId);

enum What {
    /// An event reaches the scheduler.
    Report(Event),
    /// An action reaches a node.
    Told(u32, Action),
    Tick,
    /// A node's planner looks at the time.
    Wake(u32),
    /// A node begins, or dies.
    Begin(u32),
    Die(u32),
    /// A request reaches the parent, which answers when its upload is free.
    Request(RequestKey),
    /// What was sent on a line has left it.
    Sent(LineKey),
    /// The first byte of a piece reaches the child; the last one left the parent, or will, at the time.
    FirstByte(RequestKey, u32, Duration),
    /// Some piece has gone through the shared links.
    Flows(u64),
    Arrive(RequestKey, u32),
    /// The child hears that nothing more comes, and why.
    End(RequestKey, Option<plan::Fault>),
    /// A node notices that a link is gone.
    Lost {
        node: u32,
        peer: u32,
    },
    /// A question what a node has, and the answer.
    Probe {
        child: u32,
        parent: u32,
        task: TaskId,
        have: PieceSet,
    },
    Has {
        node: u32,
        peer: u32,
        task: TaskId,
        pieces: PieceSet,
    },
    Reader(u32),
}

struct Due {
    at: Duration,
    number: u64,
    /// Apart, so that the queue moves little.
    what: Box<What>,
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

struct Request {
    /// `None`: the origin.
    parent: Option<u32>,
    task: usize,
    /// Pieces that the parent has yet to send.
    unsent: VecDeque<u32>,
    /// How many the child has yet to get.
    left: u32,
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
    requests: BTreeMap<RequestKey, Request>,
    lines: BTreeMap<LineKey, Line>,
    flows: Flows,
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
        if let Err(error) = world.step(*due.what) {
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
            requests: BTreeMap::new(),
            lines: BTreeMap::new(),
            flows: Flows::default(),
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
        self.queue.push(Reverse(Due { at, number: self.count, what: Box::new(what) }));
    }

    fn populate(&mut self) {
        let setup = self.setup;
        let span = setup.ideal();
        for number in 0..setup.nodes + setup.joining {
            let index = usize::try_from(number).unwrap_or(usize::MAX);
            let oddity = setup.oddities.get(index).copied().unwrap_or(Oddity::None);
            let complete = oddity == Oddity::Complete;
            self.nodes.push(Node::new(number, oddity, setup));
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
        let zone = format!("z{}", node.zone);
        let info = NodeInfo { key: key(number), zone, seed, upload: rate, download: rate };
        Event::Joined { node: id(number), info }
    }

    fn step(&mut self, what: What) -> anyhow::Result<()> {
        match what {
            What::Report(event) => self.reported(event)?,
            What::Tick => {
                // One that came before it has made it needless otherwise.
                if self.tick == Some(self.now) {
                    self.tick = None;
                    self.decide(Event::Tick)?;
                }
            }
            What::Told(node, action) => {
                if let Some(event) = heard(action) {
                    self.plan(node, event)?;
                }
            }
            What::Wake(node) => {
                if self.nodes[node as usize].tick == Some(self.now) {
                    self.nodes[node as usize].tick = None;
                    self.plan(node, plan::Event::Tick)?;
                }
            }
            What::Begin(node) => self.begin(node)?,
            What::Die(node) => self.die(node),
            What::Request(key) => self.request(key)?,
            What::Sent(line) => self.sent(line),
            What::FirstByte(key, piece, last) => self.first_byte(key, piece, last),
            What::Flows(generation) => {
                if self.flows.generation == generation {
                    self.flows_end();
                }
            }
            What::Arrive(key, piece) => {
                self.take_in(key.0, true);
                self.arrive(key, piece)?;
            }
            What::End(key, fault) => self.end(key, fault)?,
            What::Lost { node, peer: lost } => {
                self.nodes[node as usize].links.remove(&lost);
                self.plan(node, plan::Event::PeerLost { peer: peer(lost) })?;
            }
            What::Probe { .. } => self.probe(what)?,
            What::Has { node, peer: of, task, pieces } => {
                let peer = peer(of);
                self.plan(node, plan::Event::Has { task, peer, pieces, active: false })?;
            }
            What::Reader(node) => self.reader(node)?,
        }
        Ok(())
    }

    /// One event through a node's planner.
    fn plan(&mut self, number: u32, event: plan::Event) -> anyhow::Result<()> {
        let (now, node) = (self.now, &mut self.nodes[number as usize]);
        if !node.alive {
            return Ok(());
        }
        let text = self.traced().then(|| format!("{event:?}"));
        let node = &mut self.nodes[number as usize];
        let actions = node.apply(now, event).with_context(|| format!("node {number}"))?;
        if let Some(text) = text.filter(|_| !actions.is_empty()) {
            self.remember(format!("{now:?} node {number} {text}\n  -> {actions:?}"));
        }
        for action in actions {
            self.perform(number, action);
        }
        let node = &mut self.nodes[number as usize];
        if let Some(wake) = node.next_wake(now).map(|wake| wake.max(now))
            && node.tick.is_none_or(|tick| wake < tick)
        {
            node.tick = Some(wake);
            self.at(wake, What::Wake(number));
        }
        Ok(())
    }

    fn traced(&self) -> bool {
        self.setup.checked && self.setup.nodes <= 32
    }

    fn remember(&mut self, line: String) {
        self.trace.push_back(line);
        if self.trace.len() > TRACED {
            self.trace.pop_front();
        }
    }

    /// What reaches the scheduler; it hears nothing of parents that have left.
    fn reported(&mut self, event: Event) -> anyhow::Result<()> {
        match &event {
            Event::Failed { parent: Some(parent), .. } => {
                let parent = u32::try_from(parent.0)?;
                if self.nodes[parent as usize].gone {
                    return Ok(());
                }
            }
            Event::Left { node } => {
                let node = u32::try_from(node.0)?;
                self.nodes[node as usize].gone = true;
            }
            _ => {}
        }
        self.decide(event)
    }

    /// One event through the scheduler.
    fn decide(&mut self, event: Event) -> anyhow::Result<()> {
        let copy = self.setup.checked.then(|| event.clone());
        if self.setup.recorded {
            self.outcome.log.push((self.now, event.clone()));
        }
        let actions = self.scheduler.apply(self.now, event);
        if let Some(event) = copy {
            if self.traced() && !(actions.is_empty() && event == Event::Tick) {
                self.remember(format!("{:?} {event:?}\n  -> {actions:?}", self.now));
            }
            self.check.step(self.now, &event, &actions)?;
        }
        for action in actions {
            let number = addressee(&action)?;
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

    fn begin(&mut self, number: u32) -> anyhow::Result<()> {
        let setup = self.setup;
        let node = &mut self.nodes[number as usize];
        if node.dead {
            return Ok(());
        }
        node.alive = true;
        let liar = node.oddity == Oddity::Liar;
        for task in 0..setup.tasks {
            let have = &self.nodes[number as usize].have[task];
            let said = if liar { setup.all() } else { have.clone() };
            if !said.is_empty() {
                let (node, task, shape) = (id(number), task_id(task), setup.shape);
                self.report(Event::Announce { node, task, shape, pieces: said });
            }
        }
        self.report(Event::Announced { node: id(number) });
        if liar {
            self.unfinished -= 1;
            self.nodes[number as usize].done = Some(Duration::ZERO);
        }
        self.plan(number, plan::Event::SchedulerUp)?;
        self.pull(number)
    }

    fn want(
        &mut self,
        number: u32,
        task: usize,
        pieces: PieceSet,
        class: plan::Class,
    ) -> anyhow::Result<()> {
        let shape = self.setup.shape;
        let shape = plan::Shape { pieces: shape.pieces, piece_len: shape.piece_len };
        let task = task_id(task);
        self.plan(number, plan::Event::Want { task, shape, pieces, class, origin: true })
    }

    fn reader(&mut self, number: u32) -> anyhow::Result<()> {
        let node = &self.nodes[number as usize];
        if !node.alive || node.oddity == Oddity::Liar {
            return Ok(());
        }
        let pieces = u64::from(self.setup.shape.pieces);
        let piece = u32::try_from(self.random.below(pieces)).unwrap_or(0);
        if self.nodes[number as usize].have[0].contains(piece) {
            return Ok(());
        }
        self.want(number, 0, std::iter::once(piece).collect(), plan::Class::Fault)
    }

    fn die(&mut self, number: u32) {
        let node = &mut self.nodes[number as usize];
        node.dead = true;
        if node.done.take().is_none() {
            self.unfinished -= 1;
        }
        node.alive = false;
        let links = std::mem::take(&mut node.links);
        self.requests.retain(|(child, _), _| *child != number);
        for node in links {
            self.at(self.now + LOSS, What::Lost { node, peer: number });
        }
        self.at(self.now + LOSS, What::Report(Event::Left { node: id(number) }));
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
