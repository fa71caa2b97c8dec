//! Row by row, and in small swarms without a scheduler.

mod degraded;
mod histories;
mod neighbours;

use std::time::Duration;

use skimmer_proto::{Digest, Scope};

use super::check::Check;
use super::*;

const MS: Duration = Duration::from_millis(1);
const SHAPE: Shape = Shape { pieces: 100, piece_len: 1 << 20 };

fn peer(n: u8) -> Peer {
    Peer([n; 32])
}

fn task(n: u8) -> TaskId {
    TaskId::of(&Scope::Public, &Digest::of(&[n]))
}

fn set(range: std::ops::Range<u32>) -> PieceSet {
    std::iter::once(range).collect()
}

struct Bench {
    planner: Planner,
    check: Check,
    now: Now,
    /// All actions since last taken.
    log: Vec<Action>,
}

impl Bench {
    fn new() -> Self {
        let limits = Limits::default();
        let planner = Planner::new(peer(0), 7, limits.clone());
        Self { planner, check: Check::new(limits), now: Duration::from_secs(100), log: Vec::new() }
    }

    /// With a scheduler.
    fn led() -> Self {
        let mut bench = Self::new();
        bench.apply(Event::SchedulerUp);
        bench
    }

    fn apply(&mut self, event: Event) -> Vec<Action> {
        let actions = self.planner.apply(self.now, event.clone());
        self.check.step(self.now, &event, &actions).unwrap();
        self.log.extend(actions.clone());
        actions
    }

    fn want(&mut self, n: u8, pieces: std::ops::Range<u32>, class: Class) -> Vec<Action> {
        let (task, pieces) = (task(n), set(pieces));
        self.apply(Event::Want { task, shape: SHAPE, pieces, class, origin: true })
    }

    fn pass(&mut self, time: Duration) -> Vec<Action> {
        let end = self.now + time;
        let mut all = Vec::new();
        while let Some(due) = self.planner.next_wake(self.now).filter(|due| *due <= end) {
            self.now = due;
            all.extend(self.apply(Event::Tick));
        }
        self.now = end;
        all.extend(self.apply(Event::Tick));
        all
    }

    fn receive(&mut self, request: RequestId) -> Vec<Action> {
        let mut all = Vec::new();
        let Some(flight) = self.check.in_flight().get(&request).cloned() else { return all };
        for piece in flight.left.iter() {
            all.extend(self.apply(Event::Received { request, piece }));
            let pieces = std::iter::once(piece).collect();
            all.extend(self.apply(Event::Stored { task: flight.task, pieces }));
        }
        all.extend(self.apply(Event::Ended { request, outcome: Ok(()) }));
        all
    }
}

/// What was asked: of whom (0 is the origin), which pieces.
fn asked(actions: &[Action]) -> Vec<(u8, PieceSet)> {
    let ask = |action: &Action| match action {
        Action::Ask { peer, pieces, .. } => Some((peer.0[0], pieces.clone())),
        Action::Origin { pieces, .. } => Some((0, pieces.clone())),
        _ => None,
    };
    actions.iter().filter_map(ask).collect()
}

fn ids(actions: &[Action]) -> Vec<RequestId> {
    let id = |action: &Action| match action {
        Action::Ask { request, .. } | Action::Origin { request, .. } => Some(*request),
        _ => None,
    };
    actions.iter().filter_map(id).collect()
}

fn reports(actions: &[Action]) -> Vec<Report> {
    let report = |action: &Action| match action {
        Action::Report(report) => Some(report.clone()),
        _ => None,
    };
    actions.iter().filter_map(report).collect()
}

#[test]
fn leases_are_read_from_the_origin_and_assignments_from_their_parents() {
    let mut b = Bench::led();
    let actions = b.want(1, 0..100, Class::PullThrough);
    assert!(matches!(&reports(&actions)[..], [Report::Want { pieces, .. }] if pieces.len() == 100));
    assert_eq!(asked(&actions), [], "the scheduler decides");
    let actions = b.apply(Event::Leased { task: task(1), pieces: set(0..10) });
    assert_eq!(asked(&actions), [(0, set(0..4)), (0, set(4..8)), (0, set(8..10))]);
    let parent = Event::Assigned { task: task(1), parent: peer(3), pieces: set(20..30) };
    assert_eq!(asked(&b.apply(parent)), [(3, set(20..30))]);
}

#[test]
fn the_scheduler_is_told_of_what_is_wanted_no_more_while_the_rest_is() {
    let mut b = Bench::led();
    b.want(1, 0..6, Class::Background);
    let assigned = Event::Assigned { task: task(1), parent: peer(3), pieces: set(0..6) };
    let request = ids(&b.apply(assigned))[0];
    // One has come and can't be written.
    b.apply(Event::Received { request, piece: 0 });
    let withdrawn = |pieces| Report::Withdraw { task: task(1), pieces };
    let actions = b.apply(Event::Unwant { task: task(1), pieces: set(0..2) });
    assert_eq!(reports(&actions), [withdrawn(Some(set(0..2)))]);
    // Wanted again, it is asked for again.
    let actions = b.want(1, 0..2, Class::Background);
    assert!(
        matches!(&reports(&actions)[..], [Report::Want { pieces, .. }] if *pieces == set(0..2))
    );
    let actions = b.apply(Event::Unwant { task: task(1), pieces: set(0..6) });
    assert_eq!(reports(&actions), [withdrawn(None)]);
}

#[test]
fn an_arrival_is_reported_at_once_and_what_follows_it_soon_in_one_message() {
    let mut b = Bench::led();
    b.want(1, 0..100, Class::PullThrough);
    let actions = b.apply(Event::Leased { task: task(1), pieces: set(0..4) });
    let request = ids(&actions)[0];
    let arrived = |pieces| Report::Arrived { task: task(1), pieces };
    let mut told = Vec::new();
    for piece in 0..4 {
        b.now += MS;
        b.apply(Event::Received { request, piece });
        told.push(reports(
            &b.apply(Event::Stored { task: task(1), pieces: set(piece..piece + 1) }),
        ));
    }
    assert_eq!(told, [vec![arrived(set(0..1))], vec![], vec![], vec![]]);
    b.now = b.planner.next_wake(b.now).unwrap();
    assert_eq!(reports(&b.apply(Event::Tick)), [arrived(set(1..4))]);
}

#[test]
fn a_fault_is_asked_of_a_known_holder_at_once_and_of_another_when_late() {
    let mut b = Bench::led();
    b.want(1, 0..100, Class::Background);
    for n in [3, 4] {
        let has = Event::Has { task: task(1), peer: peer(n), pieces: set(0..100), active: false };
        assert_eq!(asked(&b.apply(has)), [], "nobody waits");
    }
    let actions = b.want(1, 50..51, Class::Fault);
    assert_eq!(asked(&actions).len(), 1);
    assert_eq!(reports(&actions).len(), 1, "the scheduler hears of it too");
    let first = asked(&actions)[0].0;
    let late = b.pass(1500 * MS);
    assert_eq!(asked(&late), [(7 - first, set(50..51))], "the other one");
    let done = b.receive(ids(&late)[0]);
    assert!(done.contains(&Action::Abandon { request: ids(&actions)[0] }), "{done:?}");
}

#[test]
fn a_fault_that_nobody_can_serve_goes_to_the_origin_after_a_while() {
    let mut b = Bench::led();
    assert_eq!(asked(&b.want(1, 5..6, Class::Fault)), []);
    let why = |actions: &[Action]| match actions {
        [.., Action::Origin { why, .. }] => *why,
        other => panic!("{other:?}"),
    };
    assert_eq!(why(&b.pass(600 * MS)), Why::ReaderWaits);
    let mut b = Bench::new();
    assert_eq!(why(&b.want(1, 5..6, Class::Fault)), Why::Alone);
}

#[test]
fn a_wrong_piece_bans_its_sender_for_the_task() {
    let mut b = Bench::led();
    b.want(1, 0..4, Class::PullThrough);
    let assigned = Event::Assigned { task: task(1), parent: peer(3), pieces: set(0..4) };
    let request = ids(&b.apply(assigned.clone()))[0];
    b.apply(Event::Received { request, piece: 1 });
    let told = reports(&b.apply(Event::Wrong { task: task(1), piece: 1 }));
    let failed = |pieces| {
        let (task, parent, fault) = (task(1), Some(peer(3)), Fault::Corrupt);
        Report::Failed { task, pieces, parent, fault }
    };
    assert_eq!(told, [failed(set(1..2))]);
    let told = reports(&b.apply(Event::Ended { request, outcome: Err(Fault::Corrupt) }));
    assert_eq!(told, [failed([0, 2, 3].into_iter().collect())]);
    let fault = b.want(1, 1..2, Class::Fault);
    assert_eq!(asked(&fault), [], "it isn't asked again");
    let told = reports(&b.apply(assigned));
    assert!(matches!(told[..], [Report::Failed { fault: Fault::Refused, .. }]), "{told:?}");
    for n in 2..3 {
        b.want(n, 0..1, Class::PullThrough);
        let assigned = Event::Assigned { task: task(n), parent: peer(3), pieces: set(0..1) };
        let request = ids(&b.apply(assigned))[0];
        b.apply(Event::Ended { request, outcome: Err(Fault::Corrupt) });
    }
    b.want(4, 0..1, Class::PullThrough);
    let assigned = Event::Assigned { task: task(4), parent: peer(3), pieces: set(0..1) };
    assert_eq!(asked(&b.apply(assigned)), [], "nor for anything, after three");
}

#[test]
fn a_parent_much_slower_than_the_rest_is_reported_and_replaced() {
    let mut b = Bench::led();
    b.want(1, 0..100, Class::PullThrough);
    let quick = Event::Assigned { task: task(1), parent: peer(3), pieces: set(0..20) };
    let request = ids(&b.apply(quick))[0];
    let slow = Event::Assigned { task: task(1), parent: peer(4), pieces: set(20..40) };
    let slow = ids(&b.apply(slow))[0];
    for piece in 0..20 {
        b.pass(100 * MS);
        b.apply(Event::Received { request, piece });
    }
    let told = b.pass(1500 * MS);
    let (task, pieces) = (task(1), set(20..40));
    let failed = Report::Failed { task, pieces, parent: Some(peer(4)), fault: Fault::Slow };
    assert!(
        told.contains(&Action::Report(failed)) && told.contains(&Action::Abandon { request: slow })
    );
}

#[test]
fn without_a_scheduler_a_download_goes_on_with_known_peers() {
    let mut b = Bench::led();
    b.want(1, 0..40, Class::PullThrough);
    for n in [3, 4] {
        b.apply(Event::PeerUp { peer: peer(n) });
        b.apply(Event::Has { task: task(1), peer: peer(n), pieces: set(0..40), active: false });
    }
    assert_eq!(asked(&b.apply(Event::Tick)), []);
    let mut open = ids(&b.apply(Event::SchedulerDown));
    while let Some(request) = open.pop() {
        open.extend(ids(&b.receive(request)));
    }
    assert!(b.check.wanted(&task(1)).is_empty() && b.check.origin.is_empty());
}

#[test]
fn without_a_scheduler_each_stripe_has_one_owner() {
    // Four nodes know each other and begin at once; have-maps are looked at every 500 ms.
    let limits = Limits::default();
    let peers: Vec<_> = (1..=4).map(peer).collect();
    let mut nodes: Vec<_> = peers
        .iter()
        .map(|me| (Planner::new(*me, 1, limits.clone()), Check::new(limits.clone())))
        .collect();
    let mut have = vec![PieceSet::new(); 4];
    let mut origin = vec![0; 100];
    let mut queue = std::collections::VecDeque::new();
    for n in 0..4 {
        let others = peers.iter().filter(|other| **other != peers[n]);
        queue.extend(others.map(|peer| (n, Event::PeerUp { peer: *peer })));
        let (pieces, class) = (set(0..100), Class::PullThrough);
        queue.push_back((
            n,
            Event::Want { task: task(1), shape: SHAPE, pieces, class, origin: true },
        ));
    }
    let mut now = Duration::from_secs(1);
    for _ in 0..400 {
        while let Some((n, event)) = queue.pop_front() {
            let (planner, check) = &mut nodes[n];
            let actions = planner.apply(now, event.clone());
            check.step(now, &event, &actions).unwrap();
            for action in actions {
                let (request, pieces) = match action {
                    Action::Probe { task, peer } => {
                        let other = peers.iter().position(|p| *p == peer).unwrap();
                        let pieces = have[other].clone();
                        queue.push_back((n, Event::Has { task, peer, pieces, active: true }));
                        continue;
                    }
                    Action::Origin { request, pieces, .. } => {
                        pieces.iter().for_each(|piece| origin[piece as usize] += 1);
                        (request, pieces)
                    }
                    Action::Ask { request, peer, pieces, .. } => {
                        let other = peers.iter().position(|p| *p == peer).unwrap();
                        assert!(have[other].contains_all(&pieces));
                        (request, pieces)
                    }
                    _ => continue,
                };
                have[n].insert_all(&pieces);
                queue.extend(pieces.iter().map(|piece| (n, Event::Received { request, piece })));
                queue.push_back((n, Event::Stored { task: task(1), pieces }));
            }
        }
        now += 50 * MS;
        queue.extend((0..4).map(|n| (n, Event::Tick)));
    }
    assert!(have.iter().all(|have| have.len() == 100), "{have:?}");
    assert_eq!(origin, vec![1; 100], "each piece once");
}

#[test]
fn a_new_scheduler_is_told_everything() {
    let mut b = Bench::led();
    b.want(1, 0..10, Class::PullThrough);
    b.apply(Event::Leased { task: task(1), pieces: set(0..2) });
    b.apply(Event::SchedulerDown);
    let told = reports(&b.apply(Event::SchedulerUp));
    let [Report::Want { pieces, .. }, Report::Reading { pieces: reading, .. }] = &told[..] else {
        panic!("{told:?}");
    };
    assert_eq!((pieces, reading), (&set(0..10), &set(0..10)), "the rest, meanwhile, by itself");
}

#[test]
fn an_origin_that_refuses_is_given_back_and_hopeless_alone() {
    let mut b = Bench::led();
    b.want(1, 0..10, Class::PullThrough);
    let request = ids(&b.apply(Event::Leased { task: task(1), pieces: set(0..10) }))[0];
    let told = reports(&b.apply(Event::Ended { request, outcome: Err(Fault::Refused) }));
    assert!(matches!(told[..], [Report::Failed { parent: None, fault: Fault::Refused, .. }]));
    for request in b.check.in_flight().keys().copied().collect::<Vec<_>>() {
        b.apply(Event::Ended { request, outcome: Err(Fault::Refused) });
    }
    assert!(b.pass(6000 * MS).contains(&Action::Hopeless { task: task(1) }));
    b.apply(Event::Unwant { task: task(1), pieces: set(0..10) });
    assert!(!b.planner.is_downloading(&task(1)));
}

#[test]
fn after_a_refusal_the_scheduler_hears_that_this_node_may_read_again() {
    let mut b = Bench::led();
    b.want(1, 0..10, Class::PullThrough);
    let request = ids(&b.apply(Event::Leased { task: task(1), pieces: set(0..10) }))[0];
    b.apply(Event::Ended { request, outcome: Err(Fault::Refused) });
    let told = reports(&b.want(1, 4..12, Class::PullThrough));
    let [Report::Want { pieces, origin: true, .. }] = &told[..] else { panic!("{told:?}") };
    assert_eq!(pieces, &set(4..12));
    assert_eq!(reports(&b.want(1, 4..12, Class::PullThrough)), [], "once");
}

#[test]
fn a_node_that_may_not_read_any_more_gives_leases_back() {
    let mut b = Bench::led();
    b.want(1, 0..2, Class::PullThrough);
    let (task, pieces, class) = (task(1), set(2..4), Class::PullThrough);
    b.apply(Event::Want { task, shape: SHAPE, pieces, class, origin: false });
    let told = reports(&b.apply(Event::Leased { task, pieces: set(0..4) }));
    assert!(matches!(told[..], [Report::Failed { fault: Fault::Refused, .. }]), "{told:?}");
}
