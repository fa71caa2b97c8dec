//! Random histories.

use proptest::prelude::{Just, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::*;

/// One step of a random history.
#[derive(Clone, Debug)]
enum Step {
    Need { blob: u64, first: u32, len: u32, class: usize },
    Withdraw(proptest::sample::Index),
    Arrive(proptest::sample::Index),
    Wrong(proptest::sample::Index),
    End(proptest::sample::Index, Outcome),
    Pass(u16),
    Taken(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let outcome = prop_oneof![
        2 => Just(Outcome::Done),
        2 => Just(Outcome::Failed { retryable: true }),
        1 => Just(Outcome::Failed { retryable: false }),
    ];
    let index = any::<proptest::sample::Index>;
    prop_oneof![
        4 => (0..3u64, 0..40u32, 1..12u32, 0..3usize)
            .prop_map(|(blob, first, len, class)| Step::Need { blob, first, len, class }),
        1 => index().prop_map(Step::Withdraw),
        8 => index().prop_map(Step::Arrive),
        1 => index().prop_map(Step::Wrong),
        3 => (index(), outcome).prop_map(|(index, outcome)| Step::End(index, outcome)),
        2 => (0..3000u16).prop_map(Step::Pass),
        1 => any::<bool>().prop_map(Step::Taken),
    ]
}

fn random_step(bench: &mut Bench, step: Step) {
    let some_run = |bench: &Bench, index: proptest::sample::Index| {
        let runs: Vec<_> = bench.check.in_flight.iter().collect();
        (!runs.is_empty()).then(|| {
            let (id, (_, left)) = runs[index.index(runs.len())];
            (*id, left.first().copied())
        })
    };
    match step {
        Step::Need { blob, first, len, class } => {
            // As the cache does: nobody asks for what has arrived, but arrivals may be forgotten.
            _ = bench.need(blob, first..first + len, Class::ALL[class]);
        }
        Step::Withdraw(index) => {
            let open: Vec<_> = bench.check.open.keys().copied().collect();
            if !open.is_empty() {
                bench.apply(Event::Withdrawn { need: open[index.index(open.len())] });
            }
        }
        Step::Arrive(index) => {
            if let Some((run, Some(piece))) = some_run(bench, index) {
                bench.apply(Event::Arrived { run, piece });
            }
        }
        Step::Wrong(index) => {
            if let Some((run, Some(piece))) = some_run(bench, index) {
                bench.apply(Event::Wrong { run, piece });
            }
        }
        Step::End(index, outcome) => {
            if let Some((run, _)) = some_run(bench, index) {
                bench.apply(Event::Ended { run, outcome });
            }
        }
        Step::Taken(taken) => {
            bench.taken = taken;
            for blob in (0..3).map(BlobId) {
                bench.apply(Event::Taken { blob, taken });
            }
        }
        Step::Pass(ms) => {
            bench.now += Duration::from_millis(ms.into());
            bench.apply(Event::Tick);
        }
    }
}

proptest! {
    #[test]
    fn every_history_keeps_the_invariants_and_ends(
        steps in proptest::collection::vec(step(), 0..200), sources in 0..4usize
    ) {
        let ranges = Capacity::Ranges { connections: 4, reserved: 1 };
        let pieces = (0..sources / 2).map(|_| Capacity::Pieces);
        let sources = pieces.chain(vec![ranges; sources % 2 + 1]).collect();
        let mut bench = Bench::new(Limits { sources, ..limits() });
        for step in steps {
            random_step(&mut bench, step);
        }
        // From here on the network is perfect: whatever is open is satisfied, by each missing
        // piece arriving once, and nothing is remembered.
        random_step(&mut bench, Step::Taken(true));
        let mut rounds = 0;
        let before = bench.check.failed.clone();
        while !bench.check.open.is_empty() || !bench.check.in_flight.is_empty() {
            rounds += 1;
            prop_assert!(rounds < 2000, "stuck with {:?}", bench.check.open);
            if let Some(run) = bench.check.in_flight.keys().next().copied() {
                bench.finish(run.0);
            } else {
                let due = bench.planner.next_wake(bench.now);
                bench.now = due.expect("something is due");
                bench.apply(Event::Tick);
            }
        }
        let late = bench.check.failed.iter();
        let late = late.filter(|(need, why)| !before.contains_key(need) && **why != Why::Deadline).count();
        prop_assert_eq!(late, 0);
        prop_assert!(bench.planner.blobs.is_empty() && bench.planner.needs.is_empty());
        prop_assert!(bench.planner.deadlines.is_empty());
    }
}
