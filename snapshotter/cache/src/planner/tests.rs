//! Row by row; and the planner under observation, which the other tests use too.

mod histories;
mod link;

use std::ops::Range;

use super::check::Check;
use super::*;

const KIB: u64 = 1 << 10;
const MS: Duration = Duration::from_millis(1);

fn limits() -> Limits {
    Limits {
        sources: vec![Capacity::Ranges { connections: 5, reserved: 1 }],
        per_blob: 3,
        background: 2,
        run_bytes: [1024 * KIB, 1024 * KIB, 512 * KIB],
        wrong: 3,
        backoff: 100 * MS,
        backoff_max: 1000 * MS,
        deadline: 10_000 * MS,
    }
}

/// A planner under observation.
struct Bench {
    planner: Planner,
    check: Check,
    now: Now,
    needs: u64,
    /// Whether sources of pieces take what is asked for.
    taken: bool,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        let (planner, check) = (Planner::new(limits.clone()), Check::new(limits));
        Self { planner, check, now: Duration::ZERO, needs: 0, taken: true }
    }

    fn apply(&mut self, event: Event) -> Vec<Action> {
        let actions = self.planner.apply(self.now, event.clone());
        self.check.step(&event, &actions);
        actions
    }

    fn need(&mut self, blob: u64, pieces: Range<u32>, class: Class) -> (NeedId, Vec<Action>) {
        let need = NeedId(self.needs);
        self.needs += 1;
        let (blob, pieces) = (BlobId(blob), pieces.collect());
        (
            need,
            self.apply(Event::Need {
                need,
                blob,
                piece_len: 256 * KIB,
                pieces,
                class,
                taken: self.taken,
            }),
        )
    }

    fn fail(&mut self, run: u64, retryable: bool) -> Vec<Action> {
        self.apply(Event::Ended { run: RunId(run), outcome: Outcome::Failed { retryable } })
    }

    /// Everything the run carries arrives.
    fn finish(&mut self, run: u64) -> Vec<Action> {
        let run = RunId(run);
        let left = self.check.in_flight[&run].1.clone();
        let mut actions = Vec::new();
        for piece in left {
            actions.extend(self.apply(Event::Arrived { run, piece }));
        }
        actions.extend(self.apply(Event::Ended { run, outcome: Outcome::Done }));
        actions
    }
}

fn runs(actions: &[Action]) -> Vec<(u64, Range<u32>, Class)> {
    let run = |action: &Action| match action {
        Action::Fetch(run) => Some((run.blob.0, run.range(), run.class)),
        _ => None,
    };
    actions.iter().filter_map(run).collect()
}

#[test]
fn runs_are_cut_by_class_and_connections() {
    use Class::{Background, Fault, PullThrough};
    for (class, pieces, expected) in [
        (Fault, 2..9, vec![2..6, 6..9]),
        (PullThrough, 0..100, vec![0..4, 4..8, 8..12]),
        (Background, 0..100, vec![0..2, 2..4]),
    ] {
        let (_, actions) = Bench::new(limits()).need(1, pieces.clone(), class);
        let expected: Vec<_> = expected.into_iter().map(|run| (1, run, class)).collect();
        assert_eq!(runs(&actions), expected, "{class:?} {pieces:?}");
    }
}

#[test]
fn a_fault_gets_the_reserved_connection_and_nothing_else_does() {
    let mut bench = Bench::new(limits());
    assert_eq!(bench.need(1, 0..100, Class::PullThrough).1.len(), 3);
    assert_eq!(bench.need(2, 0..100, Class::PullThrough).1.len(), 1);
    assert_eq!(bench.need(3, 0..100, Class::PullThrough).1.len(), 0);
    let (_, actions) = bench.need(4, 7..8, Class::Fault);
    assert_eq!(runs(&actions), [(4, 7..8, Class::Fault)]);
    assert_eq!(bench.need(5, 7..8, Class::Fault).1.len(), 0);
    assert_eq!(runs(&bench.finish(0)), [(5, 7..8, Class::Fault)], "before any pull-through");
}

#[test]
fn background_yields_to_faults_and_its_pieces_are_upgraded() {
    let mut bench = Bench::new(limits());
    let (slow, actions) = bench.need(1, 0..100, Class::Background);
    assert_eq!(runs(&actions).len(), 2);
    let (fault, actions) = bench.need(1, 1..2, Class::Fault);
    assert_eq!(actions, [], "that piece is on its way");
    let actions = bench.finish(1);
    assert_eq!(runs(&actions), [], "the other run carries a fault now");
    let actions = bench.finish(0);
    assert!(actions.contains(&Action::Satisfied { need: fault }));
    assert_eq!(runs(&actions).len(), 2, "background goes on");
    assert!(bench.check.open.contains_key(&slow));
}

#[test]
fn a_failed_run_is_tried_again_later_and_later() {
    let mut bench = Bench::new(limits());
    let (need, actions) = bench.need(1, 0..1, Class::Fault);
    assert_eq!(runs(&actions).len(), 1);
    for (run, wait) in [100, 200, 400, 800, 1000, 1000].into_iter().enumerate() {
        assert_eq!(bench.fail(run as u64, true), []);
        let due = bench.now + wait * MS;
        assert_eq!(bench.planner.next_wake(bench.now), Some(due));
        bench.now = due - MS;
        assert_eq!(bench.apply(Event::Tick), []);
        bench.now = due;
        assert_eq!(runs(&bench.apply(Event::Tick)), [(1, 0..1, Class::Fault)]);
    }
    bench.now = 10_000 * MS;
    let failed = Action::Failed { need, blob: BlobId(1), why: Why::Deadline };
    assert_eq!(bench.apply(Event::Tick), [failed]);
    assert_eq!(bench.planner.next_wake(bench.now), None);
}

#[test]
fn runs_that_fail_together_are_one_failure() {
    let mut bench = Bench::new(limits());
    bench.need(1, 0..1, Class::Fault);
    bench.need(1, 50..51, Class::Fault);
    for (first, wait) in [(0, 100), (2, 200), (4, 400)] {
        assert_eq!(bench.fail(first, true), []);
        let due = bench.now + wait * MS;
        bench.now += MS;
        assert_eq!(bench.fail(first + 1, true), []);
        assert_eq!(bench.planner.next_wake(bench.now), Some(due));
        bench.now = due;
        assert_eq!(runs(&bench.apply(Event::Tick)).len(), 2);
    }
}

#[test]
fn progress_keeps_a_pull_through_alive_but_not_a_fault() {
    let mut bench = Bench::new(limits());
    let (fault, _) = bench.need(1, 50..51, Class::Fault);
    let (pull, _) = bench.need(1, 0..3, Class::PullThrough);
    bench.now = 9_000 * MS;
    bench.apply(Event::Arrived { run: RunId(1), piece: 0 });
    bench.now = 10_000 * MS;
    assert!(matches!(bench.apply(Event::Tick)[..], [Action::Failed { need, .. }] if need == fault));
    assert_eq!(bench.planner.next_wake(bench.now), Some(19_000 * MS));
    bench.now = 19_000 * MS;
    assert!(matches!(bench.apply(Event::Tick)[..], [Action::Failed { need, .. }] if need == pull));
}

#[test]
fn a_refusal_fails_every_need_of_the_blob_and_is_not_remembered() {
    let mut bench = Bench::new(limits());
    bench.need(1, 0..100, Class::Background);
    bench.need(1, 200..201, Class::Fault);
    bench.need(2, 0..1, Class::Fault);
    assert_eq!(
        bench.fail(2, false).iter().filter(|a| matches!(a, Action::Failed { .. })).count(),
        2
    );
    assert!(bench.check.failed.values().all(|why| *why == Why::Refused));
    assert_eq!(bench.check.open.len(), 1, "the other blob has nothing to do with it");
    bench.now = 200 * MS;
    assert_eq!(runs(&bench.need(1, 300..301, Class::Fault).1).len(), 1);
}

#[test]
fn a_wrong_piece_is_fetched_again_a_bounded_number_of_times() {
    let mut bench = Bench::new(limits());
    let (good, _) = bench.need(1, 0..2, Class::Fault);
    let (bad, _) = bench.need(1, 1..2, Class::Fault);
    bench.apply(Event::Arrived { run: RunId(0), piece: 0 });
    for run in 0..2 {
        let actions = bench.apply(Event::Wrong { run: RunId(run), piece: 1 });
        assert_eq!(runs(&actions), [(1, 1..2, Class::Fault)]);
        bench.apply(Event::Ended { run: RunId(run), outcome: Outcome::Done });
    }
    let actions = bench.apply(Event::Wrong { run: RunId(2), piece: 1 });
    assert_eq!(actions.len(), 2);
    for need in [good, bad] {
        assert_eq!(bench.check.failed[&need], Why::Wrong { piece: 1 });
    }
}

#[test]
fn a_second_source_takes_over_from_one_that_refuses_lies_or_is_full() {
    let capacity = Capacity::Ranges { connections: 1, reserved: 0 };
    let limits = Limits { sources: vec![capacity; 2], wrong: 1, ..limits() };
    let source_of = |actions: &[Action]| match actions {
        [Action::Fetch(run)] => run.source.0,
        other => panic!("{other:?}"),
    };
    let mut bench = Bench::new(limits);
    assert_eq!(source_of(&bench.need(1, 0..1, Class::Fault).1), 0);
    assert_eq!(source_of(&bench.need(2, 0..1, Class::Fault).1), 1, "the first is full");
    bench.finish(1);
    assert_eq!(source_of(&bench.fail(0, false)), 1, "the first refused");
    bench.finish(2);
    assert_eq!(source_of(&bench.need(3, 0..1, Class::Fault).1), 0, "another blob, another answer");
    assert_eq!(source_of(&bench.apply(Event::Wrong { run: RunId(3), piece: 0 })), 1, "it lied");
}

#[test]
fn blobs_of_one_class_share_the_connections() {
    let mut bench = Bench::new(Limits { per_blob: 10, ..limits() });
    bench.need(1, 0..100, Class::PullThrough);
    bench.need(2, 0..100, Class::PullThrough);
    let next: Vec<_> = (0..2).flat_map(|run| runs(&bench.finish(run))).map(|r| r.0).collect();
    assert_eq!(next, [2, 2]);
}

#[test]
fn what_is_withdrawn_is_not_started_but_what_flies_is_kept() {
    let mut bench = Bench::new(limits());
    let (need, actions) = bench.need(1, 0..100, Class::Background);
    assert_eq!(actions.len(), 2);
    assert_eq!(bench.apply(Event::Withdrawn { need }), []);
    assert_eq!(runs(&bench.need(1, 0..5, Class::Fault).1), [(1, 4..5, Class::Fault)]);
    bench.finish(0);
    let actions = bench.finish(1);
    assert_eq!(actions, []);
    assert!(matches!(bench.finish(2)[..], [Action::Satisfied { .. }]));
    assert!(bench.planner.blobs.is_empty() && bench.planner.flights.is_empty());
}

/// A source of pieces before one of ranges.
fn with_pieces() -> Limits {
    let ranges = Capacity::Ranges { connections: 5, reserved: 1 };
    Limits { sources: vec![Capacity::Pieces, ranges], ..limits() }
}

#[test]
fn a_source_of_pieces_gets_everything_at_once_and_hears_of_urgency() {
    let mut bench = Bench::new(with_pieces());
    let (_, actions) = bench.need(1, 0..1000, Class::PullThrough);
    let [Action::Fetch(run)] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!((run.source, run.pieces.len()), (SourceId(0), 1000));
    let (fault, actions) = bench.need(1, 998..1002, Class::Fault);
    let urge = Action::Urge {
        run: RunId(0),
        pieces: std::iter::once(998..1000).collect(),
        class: Class::Fault,
    };
    assert_eq!(actions[0], urge);
    assert_eq!(runs(&actions), [(1, 1000..1002, Class::Fault)], "the rest is a run of its own");
    bench.need(1, 999..1000, Class::Background);
    bench.apply(Event::Arrived { run: RunId(0), piece: 998 });
    bench.apply(Event::Arrived { run: RunId(0), piece: 999 });
    let done = bench.finish(1);
    assert!(done.contains(&Action::Satisfied { need: fault }), "{done:?}");
}

#[test]
fn a_run_of_pieces_is_stopped_when_nobody_waits_for_the_rest() {
    let mut bench = Bench::new(with_pieces());
    let (first, _) = bench.need(1, 0..10, Class::PullThrough);
    let (second, actions) = bench.need(1, 5..6, Class::PullThrough);
    assert_eq!(actions, []);
    assert_eq!(bench.apply(Event::Withdrawn { need: first }), []);
    assert_eq!(bench.apply(Event::Withdrawn { need: second }), [Action::Stop { run: RunId(0) }]);
    let (_, actions) = bench.need(1, 0..1, Class::Fault);
    assert_eq!(runs(&actions), [], "it may still come");
    let actions = bench.apply(Event::Ended { run: RunId(0), outcome: Outcome::Done });
    assert_eq!(runs(&actions), [(1, 0..1, Class::Fault)]);
}

#[test]
fn the_source_of_ranges_serves_what_the_source_of_pieces_does_not() {
    let source_of = |actions: &[Action]| match actions {
        [Action::Fetch(run), ..] => run.source.0,
        other => panic!("{other:?}"),
    };
    let mut bench = Bench::new(Limits { wrong: 1, ..with_pieces() });
    assert_eq!(source_of(&bench.need(1, 0..1, Class::Fault).1), 0);
    assert_eq!(source_of(&bench.fail(0, true)), 1, "it failed");
    bench.finish(1);
    assert_eq!(source_of(&bench.need(2, 0..1, Class::Fault).1), 0);
    assert_eq!(source_of(&bench.apply(Event::Wrong { run: RunId(2), piece: 0 })), 1, "it lied");
    bench.taken = false;
    assert_eq!(source_of(&bench.need(3, 0..1, Class::Fault).1), 1, "it doesn't take the blob");
    let refused = bench.fail(4, false);
    assert!(matches!(refused[..], [Action::Failed { why: Why::Refused, .. }]), "{refused:?}");
}
