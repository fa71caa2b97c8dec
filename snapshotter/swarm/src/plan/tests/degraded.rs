//! What a download does where those that it asks fail it.

use proptest::prelude::{any, prop_assert, proptest};

use super::histories::{random_step, step};
use super::*;

fn has(n: u8, pieces: std::ops::Range<u32>) -> Event {
    Event::Has { task: task(1), peer: peer(n), pieces: set(pieces), active: false }
}

fn probed(actions: &[Action]) -> Vec<u8> {
    let probe = |action: &Action| match action {
        Action::Probe { peer, .. } => Some(peer.0[0]),
        _ => None,
    };
    actions.iter().filter_map(probe).collect()
}

fn end(b: &mut Bench, requests: Vec<RequestId>, fault: Fault) -> Vec<Action> {
    let ended = |request| b.apply(Event::Ended { request, outcome: Err(fault) });
    requests.into_iter().flat_map(ended).collect()
}

/// A node that may not read the origin wants something that one peer says it has.
fn without_origin() -> (Bench, Vec<Action>) {
    let mut b = Bench::new();
    let (task, pieces, class) = (task(1), set(0..4), Class::PullThrough);
    b.apply(Event::PeerUp { peer: peer(3) });
    b.apply(Event::Want { task, shape: SHAPE, pieces, class, origin: false });
    let asks = b.apply(has(3, 0..100));
    assert_eq!(asked(&asks), [(3, set(0..4))]);
    (b, asks)
}

#[test]
fn what_a_peer_said_it_had_and_had_not_is_not_believed_for_a_while() {
    let (mut b, asks) = without_origin();
    end(&mut b, ids(&asks), Fault::Absent);
    assert_eq!(asked(&b.apply(has(3, 0..100))), [], "it says so again");
    b.pass(10_000 * MS);
    assert_eq!(asked(&b.apply(has(3, 0..100))), [(3, set(0..4))]);
}

#[test]
fn a_refusal_holds_for_a_while() {
    let (mut b, asks) = without_origin();
    end(&mut b, ids(&asks), Fault::Refused);
    assert_eq!(asked(&b.apply(has(3, 0..100))), []);
    assert_eq!(asked(&b.pass(31_000 * MS)), [(3, set(0..4))]);
}

#[test]
fn who_fails_at_once_is_not_asked_again_at_once() {
    let (mut b, asks) = without_origin();
    assert_eq!(asked(&end(&mut b, ids(&asks), Fault::Gone)), []);
    assert_eq!(asked(&b.pass(300 * MS)), [(3, set(0..4))]);
}

#[test]
fn a_reader_that_the_scheduler_leaves_alone_is_served_by_whoever_is_linked() {
    let mut b = Bench::led();
    b.apply(Event::PeerUp { peer: peer(3) });
    let at_once = b.want(1, 5..6, Class::Fault);
    assert!(probed(&at_once).is_empty(), "the scheduler has its say");
    let later = b.pass(600 * MS);
    assert_eq!((probed(&later), asked(&later)), (vec![3], vec![(0, set(5..6))]));
    end(&mut b, ids(&later), Fault::Gone);
    assert_eq!(asked(&b.apply(has(3, 0..100))), [(3, set(5..6))]);
}

#[test]
fn leases_of_an_origin_that_fails_make_a_node_look_around() {
    let mut b = Bench::led();
    b.apply(Event::PeerUp { peer: peer(3) });
    b.want(1, 0..4, Class::PullThrough);
    for failures in 0..2 {
        let lease = b.apply(Event::Leased { task: task(1), pieces: set(0..4) });
        let failed = end(&mut b, ids(&lease), Fault::Gone);
        assert_eq!(probed(&failed).len(), failures);
        b.now += Duration::from_secs(1);
    }
    assert_eq!(asked(&b.apply(has(3, 0..100))), [(3, set(0..4))]);
}

#[test]
fn what_is_taken_back_from_one_parent_is_asked_of_the_next_at_once() {
    let mut b = Bench::led();
    b.want(1, 0..8, Class::PullThrough);
    let assign = |n, pieces| Event::Assigned { task: task(1), parent: peer(n), pieces };
    let first = b.apply(assign(3, set(0..4)));
    let leased = b.apply(Event::Leased { task: task(1), pieces: set(4..8) });
    let cancelled = b.apply(Event::Cancelled { task: task(1), pieces: set(0..8) });
    for request in [ids(&first)[0], ids(&leased)[0]] {
        assert!(cancelled.contains(&Action::Abandon { request }), "{cancelled:?}");
    }
    assert_eq!(asked(&b.apply(assign(4, set(0..8)))), [(4, set(0..8))]);
}

#[test]
fn what_a_lost_parent_was_not_even_asked_for_goes_back_to_the_scheduler() {
    let mut b = Bench::led();
    b.want(1, 0..100, Class::PullThrough);
    b.apply(Event::Assigned { task: task(1), parent: peer(3), pieces: set(0..100) });
    let told = reports(&b.apply(Event::PeerLost { peer: peer(3) }));
    let back = told.iter().fold(PieceSet::new(), |mut back, report| {
        let Report::Failed { pieces, parent: Some(_), .. } = report else { panic!("{report:?}") };
        assert!(!back.intersects(pieces), "once");
        back.insert_all(pieces);
        back
    });
    assert_eq!(back, set(0..100));
}

#[test]
fn the_only_holder_stalls_and_the_origin_serves() {
    let mut b = Bench::new();
    b.apply(Event::PeerUp { peer: peer(3) });
    b.want(1, 0..100, Class::PullThrough);
    b.apply(has(3, 0..100));
    b.pass(15_000 * MS);
    let origin: u32 = asked(&b.log).iter().filter(|a| a.0 == 0).map(|a| a.1.len()).sum();
    assert!(origin > 0, "{:?}", asked(&b.log));
}

#[test]
fn what_a_hanging_origin_owes_is_asked_of_a_holder() {
    for led in [true, false] {
        let mut b = if led { Bench::led() } else { Bench::new() };
        b.want(1, 0..4, Class::PullThrough);
        b.apply(Event::Leased { task: task(1), pieces: set(0..4) });
        assert_eq!(asked(&b.log), [(0, set(0..4))]);
        assert_eq!(asked(&b.apply(has(3, 0..100))), []);
        assert_eq!(asked(&b.pass(15_000 * MS)), [(3, set(0..4))]);
    }
}

#[test]
fn a_lost_peer_is_tried_again_where_there_is_no_scheduler() {
    let mut b = Bench::new();
    b.apply(Event::PeerUp { peer: peer(3) });
    b.apply(Event::PeerLost { peer: peer(3) });
    b.want(1, 0..1, Class::PullThrough);
    assert!(probed(&b.pass(9_000 * MS)).is_empty());
    assert!(probed(&b.pass(2_000 * MS)).contains(&3));
}

/// What is held against the peer 3: its failures in a row, and until when it is put off.
fn held(b: &Bench) -> (u32, Now) {
    let link = &b.planner.links[&peer(3)];
    (link.strikes, link.not_before)
}

#[test]
fn requests_to_a_peer_that_fail_together_are_one_failure() {
    let mut b = Bench::led();
    b.apply(Event::PeerUp { peer: peer(3) });
    let assign = |n| Event::Assigned { task: task(n), parent: peer(3), pieces: set(0..4) };
    (1..5).for_each(|n| _ = b.want(n, 0..4, Class::PullThrough));
    for (strikes, wait) in [(1, 10_000), (2, 20_000), (3, 40_000)] {
        let asked: Vec<_> = (1..5).flat_map(|n| ids(&b.apply(assign(n)))).collect();
        assert_eq!(asked.len(), 4);
        let until = b.now + wait * MS;
        for request in asked {
            end(&mut b, vec![request], Fault::Gone);
            assert_eq!(held(&b), (strikes, until));
            b.now += MS;
        }
        b.apply(Event::PeerLost { peer: peer(3) });
        assert_eq!(held(&b), (strikes, until), "the end of the link is why they failed");
        b.now += Duration::from_secs(1);
    }
    // All at once, by the end of the link alone.
    (1..5).for_each(|n| _ = b.apply(assign(n)));
    b.apply(Event::PeerLost { peer: peer(3) });
    assert_eq!(held(&b), (4, b.now + 80_000 * MS));
    // What it brings makes up for that.
    let request = ids(&b.apply(assign(1)))[0];
    b.apply(Event::Received { request, piece: 0 });
    assert_eq!(held(&b), (0, Now::ZERO));
    end(&mut b, vec![request], Fault::Gone);
    assert_eq!(held(&b), (1, b.now + 10_000 * MS));
}

#[test]
fn what_fails_after_the_penalty_counts_however_long_it_was_under_way() {
    let mut b = Bench::led();
    b.apply(Event::PeerUp { peer: peer(3) });
    let [first, second] = [1, 2].map(|n| {
        b.want(n, 0..4, Class::PullThrough);
        ids(&b.apply(Event::Assigned { task: task(n), parent: peer(3), pieces: set(0..4) }))
    });
    end(&mut b, first, Fault::Slow);
    let (strikes, until) = held(&b);
    assert_eq!(strikes, 1);
    b.now = until;
    end(&mut b, second, Fault::Slow);
    assert_eq!(held(&b), (2, until + 20_000 * MS));
}

#[test]
fn a_peer_that_cannot_be_reached_is_put_off_for_longer_each_time_that_it_is_tried() {
    let mut b = Bench::led();
    b.apply(Event::PeerUp { peer: peer(3) });
    for (strikes, wait) in [(1, 10_000), (2, 20_000), (3, 40_000)] {
        let until = b.now + wait * MS;
        // For several tasks.
        for _ in 0..3 {
            b.apply(Event::PeerLost { peer: peer(3) });
            assert_eq!(held(&b), (strikes, until));
            b.now += MS;
        }
        b.now = until;
    }
}

#[test]
fn reads_of_the_origin_that_fail_together_are_one_failure() {
    let mut b = Bench::led();
    b.want(1, 0..100, Class::PullThrough);
    for (failures, wait) in [(1, 250), (2, 500), (3, 1000)] {
        let leased = b.apply(Event::Leased { task: task(1), pieces: set(0..16) });
        assert_eq!(ids(&leased).len(), 4);
        let due = b.now + wait * MS;
        for request in ids(&leased) {
            end(&mut b, vec![request], Fault::Gone);
            assert_eq!((b.planner.origin_failures, b.planner.origin_not_before), (failures, due));
            b.now += MS;
        }
        b.now = due;
    }
}

/// A node whose scheduler has gone, linked with two others.
fn left_alone() -> Bench {
    let mut b = Bench::led();
    for n in [3, 4] {
        b.apply(Event::PeerUp { peer: peer(n) });
    }
    b.want(1, 0..100, Class::PullThrough);
    b
}

#[test]
fn without_a_scheduler_the_origin_waits_for_what_others_say_that_they_have() {
    let mut b = left_alone();
    let gone = b.apply(Event::SchedulerDown);
    assert_eq!((probed(&gone), asked(&gone)), (vec![3, 4], vec![]));
    assert_eq!(asked(&b.apply(has(3, 0..50))).iter().filter(|ask| ask.0 == 0).count(), 0);
    let answered = b.apply(has(4, 50..100));
    assert!(asked(&answered).iter().all(|ask| ask.0 != 0), "they have all of it");
    let mut b = left_alone();
    b.apply(Event::SchedulerDown);
    let later = b.pass(2_100 * MS);
    assert!(asked(&later).iter().any(|ask| ask.0 == 0), "who says nothing isn't waited for");
}

#[test]
fn what_others_are_getting_from_the_origin_is_not_read_there_again() {
    let mut b = left_alone();
    let coming = Event::Coming { task: task(1), peer: peer(3), pieces: set(0..60) };
    b.apply(coming);
    b.apply(has(3, 60..100));
    b.apply(has(4, 60..100));
    b.apply(Event::SchedulerDown);
    b.apply(has(3, 60..100));
    b.apply(has(4, 60..100));
    let origin = |actions: &[Action]| asked(actions).into_iter().filter(|ask| ask.0 == 0).count();
    assert_eq!(origin(&b.pass(5_000 * MS)), 0);
    // It doesn't get on with it.
    assert!(origin(&b.pass(20_000 * MS)) > 0);
}

#[test]
fn a_node_says_what_it_is_getting_from_the_origin() {
    let mut b = Bench::led();
    b.want(1, 0..100, Class::PullThrough);
    let leased = b.apply(Event::Leased { task: task(1), pieces: set(0..30) });
    assert_eq!(b.planner.coming(&task(1)), set(0..30), "some of it waits for its turn");
    let request = ids(&leased)[0];
    b.apply(Event::Received { request, piece: 0 });
    assert_eq!(b.planner.coming(&task(1)), set(0..30), "on its way to disk");
    b.apply(Event::Stored { task: task(1), pieces: set(0..1) });
    assert_eq!(b.planner.coming(&task(1)), set(1..30));
}

#[test]
fn an_origin_that_is_back_is_tried_with_one_piece_and_lost_peers_are_asked_first() {
    let mut b = left_alone();
    b.apply(Event::SchedulerDown);
    for n in [3, 4] {
        b.apply(Event::PeerLost { peer: peer(n) });
    }
    let tried = b.check.in_flight().keys().copied().collect();
    end(&mut b, tried, Fault::Gone);
    let again = b.pass(2_000 * MS);
    let [(0, piece)] = &asked(&again)[..] else { panic!("{:?}", asked(&again)) };
    assert_eq!(piece.len(), 1);
    let (request, piece) = (ids(&again)[0], piece.first().unwrap());
    let back = b.apply(Event::Received { request, piece });
    assert_eq!((probed(&back), asked(&back)), (vec![3, 4], vec![]));
}

proptest! {
    #[test]
    fn after_any_history_one_good_holder_is_enough(
        steps in proptest::collection::vec(step(), 0..150), led in any::<bool>()
    ) {
        let mut b = Bench::new();
        for step in steps {
            random_step(&mut b, step);
        }
        // From here on every origin and every known peer fails, and one peer has all. A scheduler
        // leases what it can't assign, and is of no help.
        b.apply(if led { Event::SchedulerUp } else { Event::SchedulerDown });
        b.apply(Event::PeerUp { peer: peer(9) });
        let mut rounds = 0;
        while (1..3).any(|n| !b.check.wanted(&task(n)).is_empty()) {
            rounds += 1;
            prop_assert!(rounds < 5_000, "stuck: {:?}", b.planner);
            if led && rounds % 100 == 0 {
                for n in 1..3 {
                    b.apply(Event::Leased { task: task(n), pieces: b.check.wanted(&task(n)) });
                }
            }
            let log = std::mem::take(&mut b.log);
            for action in &log {
                if let Action::Probe { task, peer: Peer([9, ..]) } = action {
                    let (task, peer, pieces) = (*task, peer(9), set(0..100));
                    b.apply(Event::Has { task, peer, pieces, active: false });
                }
            }
            match b.check.in_flight().iter().next().map(|(id, flight)| (*id, flight.peer)) {
                Some((request, Some(Peer([9, ..])))) => _ = b.receive(request),
                Some((request, _)) => {
                    b.apply(Event::Ended { request, outcome: Err(Fault::Gone) });
                }
                None => _ = b.pass(100 * MS),
            }
        }
    }
}
