//! Whatever happens, in whatever order, the invariants hold and every download ends.

use proptest::prelude::{Strategy, any, prop_assert, prop_oneof, proptest};

use super::*;

/// One step of a random history.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Want { task: u8, first: u32, len: u32, class: usize },
    Unwant { task: u8, first: u32, len: u32 },
    Assign { task: u8, peer: u8, first: u32, len: u32 },
    Lease { task: u8, first: u32, len: u32 },
    Neighbours { task: u8, peers: Vec<u8> },
    Cancel { task: u8, first: u32, len: u32 },
    Has { task: u8, peer: u8, first: u32, len: u32, active: bool },
    Receive(proptest::sample::Index, bool),
    Wrong { task: u8, piece: u32 },
    End(proptest::sample::Index, usize),
    Peer(u8, bool),
    Scheduler(bool),
    Pass(u16),
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    let (task, first, len, one) = (1..3u8, 0..95u32, 1..40u32, 1..5u8);
    let span = (task.clone(), first.clone(), len.clone());
    let peers = proptest::collection::vec(one.clone(), 0..4);
    let index = any::<proptest::sample::Index>;
    prop_oneof![
        4 => (span.clone(), 0..3usize)
            .prop_map(|((task, first, len), class)| Step::Want { task, first, len, class }),
        1 => span.clone().prop_map(|(task, first, len)| Step::Unwant { task, first, len }),
        3 => (span.clone(), one.clone())
            .prop_map(|((task, first, len), peer)| Step::Assign { task, peer, first, len }),
        2 => span.clone().prop_map(|(task, first, len)| Step::Lease { task, first, len }),
        1 => (task.clone(), peers).prop_map(|(task, peers)| Step::Neighbours { task, peers }),
        1 => span.clone().prop_map(|(task, first, len)| Step::Cancel { task, first, len }),
        2 => (span, one.clone(), any::<bool>()).prop_map(|((task, first, len), peer, active)| {
            Step::Has { task, peer, first, len, active }
        }),
        9 => (index(), any::<bool>()).prop_map(|(index, stored)| Step::Receive(index, stored)),
        1 => (task, first).prop_map(|(task, piece)| Step::Wrong { task, piece }),
        2 => (index(), 0..6usize).prop_map(|(index, how)| Step::End(index, how)),
        1 => (one, any::<bool>()).prop_map(|(peer, up)| Step::Peer(peer, up)),
        1 => any::<bool>().prop_map(Step::Scheduler),
        2 => (0..4000u16).prop_map(Step::Pass),
    ]
}

pub(super) fn random_step(b: &mut Bench, step: Step) {
    let span = |first: u32, len: u32| set(first..(first + len).min(SHAPE.pieces));
    let some = |b: &Bench, index: proptest::sample::Index| {
        let open: Vec<_> = b.check.in_flight().iter().collect();
        let (id, flight) = open.get(index.index(open.len().max(1)))?;
        Some((**id, flight.task, flight.left.first()?))
    };
    let event = match step {
        Step::Want { task: n, first, len, class } => {
            // As the cache does: nobody asks for what is on its way to disk.
            let (pieces, class) = (span(first, len), Class::ALL[class]);
            Event::Want { task: task(n), shape: SHAPE, pieces, class, origin: true }
        }
        Step::Unwant { task: n, first, len } => {
            Event::Unwant { task: task(n), pieces: span(first, len) }
        }
        Step::Assign { task: n, peer: p, first, len } => {
            Event::Assigned { task: task(n), parent: peer(p), pieces: span(first, len) }
        }
        Step::Lease { task: n, first, len } => {
            Event::Leased { task: task(n), pieces: span(first, len) }
        }
        Step::Neighbours { task: n, peers } => {
            let peers = peers.into_iter().map(|n| (peer(n), set(0..50))).collect();
            Event::Neighbours { task: task(n), peers }
        }
        Step::Cancel { task: n, first, len } => {
            Event::Cancelled { task: task(n), pieces: span(first, len) }
        }
        Step::Has { task: n, peer: p, first, len, active } => {
            Event::Has { task: task(n), peer: peer(p), pieces: span(first, len), active }
        }
        Step::Receive(index, stored) => {
            let Some((request, task, piece)) = some(b, index) else { return };
            b.apply(Event::Received { request, piece });
            if !stored {
                return;
            }
            Event::Stored { task, pieces: std::iter::once(piece).collect() }
        }
        Step::Wrong { task: n, piece } => Event::Wrong { task: task(n), piece },
        Step::End(index, how) => {
            let Some((request, ..)) = some(b, index) else { return };
            let faults = [Fault::Gone, Fault::Slow, Fault::Absent, Fault::Corrupt, Fault::Refused];
            Event::Ended { request, outcome: faults.get(how).map_or(Ok(()), |f| Err(*f)) }
        }
        Step::Peer(n, true) => Event::PeerUp { peer: peer(n) },
        Step::Peer(n, false) => Event::PeerLost { peer: peer(n) },
        Step::Scheduler(true) => Event::SchedulerUp,
        Step::Scheduler(false) => Event::SchedulerDown,
        Step::Pass(ms) => {
            b.pass(Duration::from_millis(ms.into()));
            return;
        }
    };
    b.apply(event);
}

proptest! {
    #[test]
    fn every_history_keeps_the_invariants_and_ends(
        steps in proptest::collection::vec(step(), 0..150)
    ) {
        let mut b = Bench::new();
        for step in steps {
            random_step(&mut b, step);
        }
        // From here on the origin serves, and there is no scheduler: whatever is wanted comes.
        b.apply(Event::SchedulerDown);
        for n in 1..3 {
            let (task, pieces) = (task(n), set(0..1));
            let want = Event::Want { task, shape: SHAPE, pieces, class: Class::Background, origin: true };
            b.apply(want);
        }
        let mut rounds = 0;
        while (1..3).any(|n| !b.check.wanted(&task(n)).is_empty()) {
            rounds += 1;
            prop_assert!(rounds < 3000, "stuck: {:?}", b.planner);
            match b.check.in_flight().keys().next().copied() {
                Some(request) => _ = b.receive(request),
                None => _ = b.pass(100 * MS),
            }
        }
        for n in 1..3 {
            b.apply(Event::Stored { task: task(n), pieces: set(0..100) });
            prop_assert!(!b.planner.is_downloading(&task(n)));
        }
        prop_assert!(b.planner.downloads.is_empty() && b.planner.requests.is_empty());
        prop_assert!(b.planner.links.values().all(|link| link.unanswered == 0));
    }
}
