//! Small swarms, event by event; every step is watched by the checker.

use std::time::Duration;

use proptest::prelude::{prop_assert, proptest};
use skimmer_proto::{Digest, Scope};

use super::*;
use crate::check::Check;
use crate::event::{Class, Fault, NodeInfo, Shape};

const SHAPE: Shape = Shape { pieces: 8, piece_len: 1 << 20 };
const MS: Duration = Duration::from_millis(1);

struct Bench {
    scheduler: Scheduler,
    check: Check,
    now: Now,
    /// What was given out and hasn't been reported on.
    open: Vec<Action>,
}

fn task(n: u8) -> TaskId {
    TaskId::of(&Scope::Public, &Digest::of(&[n]))
}

fn set(range: std::ops::Range<u32>) -> PieceSet {
    std::iter::once(range).collect()
}

impl Bench {
    /// A scheduler that has been up for long.
    fn settled() -> Self {
        Self::with(Limits { settle: Duration::ZERO, ..Limits::default() })
    }

    fn with(limits: Limits) -> Self {
        let (scheduler, check) = (Scheduler::new(limits.clone()), Check::new(limits));
        Self { scheduler, check, now: Duration::from_secs(1), open: Vec::new() }
    }

    fn apply(&mut self, event: Event) -> Vec<Action> {
        let actions = self.scheduler.apply(self.now, event.clone());
        self.check.step(self.now, &event, &actions).unwrap();
        self.open.extend(actions.clone());
        actions
    }

    /// Node `n`, on its stream `stream`.
    fn join_as(&mut self, stream: u64, n: u8, seed: bool) -> Vec<Action> {
        let info = NodeInfo { key: [n; 32], zone: "z".to_owned(), seed, upload: 0, download: 0 };
        self.apply(Event::Joined { node: NodeId(stream), info })
    }

    fn join(&mut self, n: u8) {
        self.join_as(n.into(), n, false);
        self.apply(Event::Announced { node: NodeId(n.into()) });
    }

    fn announce(&mut self, node: u64, n: u8, pieces: std::ops::Range<u32>) -> Vec<Action> {
        let (node, task, pieces) = (NodeId(node), task(n), set(pieces));
        self.apply(Event::Announce { node, task, shape: SHAPE, pieces })
    }

    fn want(&mut self, node: u64, n: u8) -> Vec<Action> {
        let (node, task, pieces, class) = (NodeId(node), task(n), set(0..8), Class::PullThrough);
        self.apply(Event::Want { node, task, shape: SHAPE, pieces, class, origin: true })
    }

    fn fail(&mut self, node: u64, n: u8, parent: Option<u64>, fault: Fault) -> Vec<Action> {
        let (node, task, parent) = (NodeId(node), task(n), parent.map(NodeId));
        self.apply(Event::Failed { node, task, pieces: set(0..8), parent, fault })
    }

    /// Time passes as the scheduler asks for it.
    fn pass(&mut self, time: Duration) -> Vec<Action> {
        let end = self.now + time;
        let mut all = Vec::new();
        while let Some(at) = self.scheduler.next_wake().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            all.extend(self.apply(Event::Tick));
        }
        self.now = end;
        all.extend(self.apply(Event::Tick));
        all
    }

    /// Everything that was given out arrives, one transfer every 10 ms, until nothing is left.
    fn finish(&mut self) {
        for _ in 0..10_000 {
            let Some(action) = (!self.open.is_empty()).then(|| self.open.remove(0)) else {
                if self.check.coming() == 0 && self.check.starving().is_empty() {
                    return;
                }
                self.pass(100 * MS);
                continue;
            };
            if let Action::Assign { node, task, pieces, .. }
            | Action::Lease { node, task, pieces, .. } = action
            {
                self.now += 10 * MS;
                self.apply(Event::Arrived { node, task, pieces });
            }
        }
        panic!("never at rest: {:?}", self.check.starving());
    }
}

fn leased(actions: &[Action]) -> u32 {
    let count = |action: &Action| match action {
        Action::Lease { pieces, .. } => pieces.len(),
        _ => 0,
    };
    actions.iter().map(count).sum()
}

/// From whom `node` is told to fetch.
fn parents(actions: &[Action], of: u64) -> Vec<u64> {
    let parent = |action: &Action| match action {
        Action::Assign { node, parent, .. } if node.0 == of => Some(parent.0),
        _ => None,
    };
    actions.iter().filter_map(parent).collect()
}

fn seeded(actions: &[Action]) -> Vec<u64> {
    let seed = |action: &Action| match action {
        Action::Seed { node, .. } => Some(node.0),
        _ => None,
    };
    actions.iter().filter_map(seed).collect()
}

#[test]
fn a_new_scheduler_leases_when_all_have_announced_or_after_a_time() {
    for announces in [true, false] {
        let limits = Limits::default();
        let (quiet, settle) = (limits.quiet, limits.settle);
        let mut b = Bench::with(limits);
        b.now = Duration::ZERO;
        assert_eq!(b.scheduler.next_wake(), None, "nobody is there");
        b.join(1);
        b.join_as(2, 2, false);
        assert_eq!(leased(&b.want(1, 1)), 0, "node 2 may have it");
        if announces {
            b.apply(Event::Announced { node: NodeId(2) });
        }
        let due = if announces { quiet } else { settle };
        assert_eq!(leased(&b.pass(due - MS)), 0);
        assert!(leased(&b.pass(2 * MS)) > 0);
    }
}

#[test]
fn what_is_announced_while_it_settles_is_not_leased() {
    let mut b = Bench::with(Limits::default());
    b.now = Duration::ZERO;
    b.join(1);
    b.join_as(2, 2, false);
    b.want(1, 1);
    let given = b.announce(2, 1, 0..8);
    assert_eq!(parents(&given, 1).first(), Some(&2), "assignments don't wait");
    b.finish();
    assert_eq!(b.scheduler.tasks()[0].from_origin, 0);
}

#[test]
fn a_seed_peer_is_told_once_of_what_nobody_has() {
    let mut b = Bench::settled();
    b.join(1);
    b.join(2);
    for n in [3, 4] {
        b.join_as(n.into(), n, true);
    }
    let told = b.want(1, 1);
    assert_eq!(seeded(&told).len(), 1);
    let first = seeded(&told)[0];
    assert_eq!(seeded(&b.want(2, 1)), [], "once");
    b.want(first, 1);
    assert_eq!(seeded(&b.want(1, 2)), [7 - first], "the less busy one");
    b.announce(2, 3, 0..8);
    assert_eq!(seeded(&b.want(1, 3)), [], "somebody has it whole");
    b.want(3, 4);
    assert_eq!(seeded(&b.want(1, 4)), [], "a seed peer wants it anyway");
    b.finish();
}

#[test]
fn tasks_share_their_nodes_and_are_forgotten_one_by_one() {
    let mut b = Bench::settled();
    for n in 1..=4 {
        b.join(n);
        b.announce(n.into(), n, 0..8);
    }
    for node in 1..=4_u64 {
        for n in (1..=4_u8).filter(|n| u64::from(*n) != node) {
            b.want(node, n);
        }
    }
    assert!(b.scheduler.tasks().iter().all(|task| task.wanting > 0));
    b.finish();
    for task in b.scheduler.tasks() {
        assert_eq!((task.complete, task.wanting, task.from_origin, task.from_peers), (4, 0, 0, 24));
    }
    for node in 1..=3 {
        b.apply(Event::Left { node: NodeId(node) });
    }
    assert_eq!(b.scheduler.tasks().len(), 4, "node 4 has them");
    b.apply(Event::Left { node: NodeId(4) });
    assert_eq!((b.scheduler.tasks().len(), b.scheduler.nodes()), (0, 0));
}

#[test]
fn what_a_node_reads_already_is_leased_to_nobody() {
    // A new scheduler, which grants nothing yet.
    let mut b = Bench::with(Limits::default());
    b.join(1);
    b.join(2);
    let (node, task, pieces) = (NodeId(1), task(1), set(0..4));
    let before = [b.want(1, 1), b.apply(Event::Reading { node, task, pieces }), b.want(2, 1)];
    assert_eq!(before.map(|actions| leased(&actions)), [0, 0, 0]);
    let granted = b.pass(Duration::from_secs(1));
    assert_eq!(leased(&granted), 4, "the others: {granted:?}");
    for action in granted {
        if let Action::Lease { pieces, .. } = action {
            assert!(!pieces.intersects(&set(0..4)), "{pieces:?}");
        }
    }
    b.apply(Event::Arrived { node, task, pieces: set(0..4) });
    b.finish();
}

#[test]
fn at_rest_nothing_is_due() {
    let mut b = Bench::settled();
    b.join(1);
    b.join(2);
    assert_eq!(b.scheduler.next_wake(), None);
    b.want(1, 1);
    b.want(2, 1);
    assert!(b.scheduler.next_wake().is_some_and(|at| at > b.now), "transfers may be overdue");
    b.finish();
    b.pass(Duration::from_secs(5));
    assert_eq!(b.scheduler.next_wake(), None, "{:?}", b.scheduler);
}

#[test]
fn strikes_outlast_the_stream_for_a_time() {
    let mut b = Bench::settled();
    b.join(1);
    b.join(2);
    let mut stream = 10;
    for n in 1..=3 {
        b.apply(Event::Left { node: NodeId(2) });
        stream += 1;
        b.join_as(stream, 2, false);
        b.announce(stream, n, 0..8);
        assert!(!parents(&b.want(1, n), 1).is_empty(), "still trusted with task {n}");
        b.fail(1, n, Some(stream), Fault::Corrupt);
        b.apply(Event::Left { node: NodeId(stream) });
        stream += 1;
        b.join_as(stream, 2, false);
        assert_eq!(parents(&b.announce(stream, n, 0..8), 1), [], "not with that one again");
        b.apply(Event::Left { node: NodeId(stream) });
    }
    b.join_as(50, 2, false);
    b.want(1, 4);
    assert_eq!(parents(&b.announce(50, 4, 0..8), 1), [], "nor with anything, after three");
    b.apply(Event::Left { node: NodeId(50) });
    b.pass(Limits::default().memory);
    b.join_as(51, 2, false);
    assert!(b.scheduler.nodes.number(NodeId(51)).is_some_and(|number| {
        b.scheduler.nodes.get(number).is_some_and(|node| !node.conduct.quarantined)
    }));
}

#[test]
fn accusations_count_over_all_streams_of_the_accuser() {
    let limits = Limits { settle: Duration::ZERO, accusations: 2, ..Limits::default() };
    let mut b = Bench::with(limits);
    for n in 1..=4 {
        b.join(n);
        b.announce(n.into(), n, 0..8);
    }
    for (n, believed) in [(1, true), (2, true), (3, false)] {
        let accuser = 20 + u64::from(n);
        b.join_as(accuser, 9, false);
        b.want(accuser, n);
        // The checker believes every accuser.
        let event = Event::Failed {
            node: NodeId(accuser),
            task: task(n),
            pieces: set(0..8),
            parent: Some(NodeId(n.into())),
            fault: Fault::Corrupt,
        };
        b.scheduler.apply(b.now, event);
        let detail = b.scheduler.task_detail(&task(n)).unwrap();
        let accused = detail.peers.iter().find(|peer| peer.node == NodeId(n.into())).unwrap();
        assert_eq!(accused.quarantined, believed, "task {n}");
        b.scheduler.apply(b.now, Event::Left { node: NodeId(accuser) });
    }
}

#[test]
fn the_only_holder_is_asked_again_when_the_origin_fails() {
    let mut b = Bench::settled();
    b.join(1);
    b.join(2);
    b.announce(2, 1, 0..8);
    assert_eq!(parents(&b.want(1, 1), 1).first(), Some(&2));
    let after = b.fail(1, 1, Some(2), Fault::Gone);
    assert!(leased(&after) > 0, "{after:?}");
    b.fail(1, 1, None, Fault::Gone);
    let later = b.pass(Duration::from_secs(3));
    assert_eq!(parents(&later, 1).first(), Some(&2), "{later:?}");
}

#[test]
fn leases_that_fail_together_are_one_failure() {
    let mut b = Bench::settled();
    b.join(1);
    let given = b.want(1, 1);
    assert!(leased(&given) > 1, "{given:?}");
    for action in &given {
        let Action::Lease { pieces, .. } = action else { continue };
        for piece in pieces.iter() {
            let (node, task, pieces) = (NodeId(1), task(1), set(piece..piece + 1));
            b.apply(Event::Failed { node, task, pieces, parent: None, fault: Fault::Gone });
        }
    }
    assert_eq!(leased(&b.pass(499 * MS)), 0);
    assert!(leased(&b.pass(2 * MS)) > 0, "one failure is half a second");
}

#[test]
fn whom_the_origin_refused_gets_leases_again_when_it_says_that_it_may_read() {
    let mut b = Bench::settled();
    b.join(1);
    assert!(leased(&b.want(1, 1)) > 0);
    let mut wait = 500 * MS;
    for _ in 0..2 {
        let after = b.fail(1, 1, None, Fault::Refused);
        assert_eq!(leased(&after) + leased(&b.pass(wait - MS)), 0, "its word counts for nothing");
        assert_eq!(leased(&b.want(1, 1)), 0, "a refusal holds for a time");
        assert!(leased(&b.pass(500 * MS)) > 0, "and its new word from then on");
        wait *= 2;
    }
    b.fail(1, 1, None, Fault::Refused);
    assert_eq!(leased(&b.pass(Duration::from_secs(60))), 0, "it has said nothing new");
    assert!(leased(&b.want(1, 1)) > 0);
}

#[test]
fn pieces_that_were_withdrawn_are_assigned_again_when_they_are_wanted_again() {
    let mut b = Bench::settled();
    b.join(1);
    b.join(2);
    b.join(3);
    b.announce(2, 1, 0..4);
    b.want(1, 1);
    let withdrawn = Event::Withdraw { node: NodeId(1), task: task(1), pieces: Some(set(2..6)) };
    b.apply(withdrawn);
    let detail = b.scheduler.task_detail(&task(1)).unwrap();
    let child = detail.peers.iter().find(|peer| peer.node == NodeId(1)).unwrap();
    assert_eq!((child.want, child.have), (4, 0), "{child:?}");
    let given = |actions: &[Action], of: u64| -> PieceSet {
        let mut all = PieceSet::new();
        for action in actions {
            if let Action::Assign { node, pieces, .. } | Action::Lease { node, pieces, .. } = action
                && *node == NodeId(of)
            {
                all.insert_all(pieces);
            }
        }
        all
    };
    let want = |node, pieces| {
        let (node, class) = (NodeId(node), Class::Background);
        Event::Want { node, task: task(1), shape: SHAPE, pieces, class, origin: true }
    };
    let mut actions = b.apply(want(1, set(2..4)));
    actions.extend(b.pass(Duration::from_secs(3)));
    assert!(given(&actions, 1).contains_all(&set(2..4)), "{actions:?}");
    // What it was leased isn't kept from others.
    let mut actions = b.apply(want(3, set(4..6)));
    actions.extend(b.pass(Duration::from_secs(3)));
    assert!(given(&actions, 3).contains_all(&set(4..6)), "{actions:?}");
}

proptest! {
    /// Whatever fails, as long as it isn't for ever: everybody gets everything.
    #[test]
    fn transfers_that_fail_are_given_again(
        faults in proptest::collection::vec((0..4usize, 0..4_u32), 0..60)
    ) {
        let mut b = Bench::settled();
        for n in 1..=4 {
            b.join(n);
        }
        b.announce(4, 1, 0..8);
        for node in 1..=3 {
            b.want(node, 1);
        }
        let kinds = [Fault::Gone, Fault::Slow, Fault::Absent];
        for (kind, wait) in faults {
            let Some(action) = (!b.open.is_empty()).then(|| b.open.remove(0)) else {
                b.pass(500 * MS);
                continue;
            };
            let (node, parent, pieces) = match action {
                Action::Assign { node, parent, pieces, .. } => (node, Some(parent), pieces),
                Action::Lease { node, pieces, .. } => (node, None, pieces),
                _ => continue,
            };
            let fault = *kinds.get(kind).unwrap_or(&Fault::Gone);
            let fault = if parent.is_none() { Fault::Gone } else { fault };
            b.apply(Event::Failed { node, task: task(1), pieces, parent, fault });
            b.pass(100 * MS * wait);
        }
        // Cancelled transfers may be among those that are still open: their arrival does no harm.
        let mut rounds = 0;
        while b.scheduler.tasks().iter().any(|task| task.wanting > 0) {
            rounds += 1;
            prop_assert!(rounds < 5_000, "stuck: {:?}", b.scheduler.task_detail(&task(1)));
            match (!b.open.is_empty()).then(|| b.open.remove(0)) {
                Some(Action::Assign { node, pieces, .. } | Action::Lease { node, pieces, .. }) => {
                    b.apply(Event::Arrived { node, task: task(1), pieces });
                }
                Some(_) => {}
                None => _ = b.pass(500 * MS),
            }
        }
    }
}
