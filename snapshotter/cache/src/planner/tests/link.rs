//! Over a modelled link, in virtual time.

use std::collections::BTreeMap;

use super::*;

/// A link of `rate` bytes per ms that its runs share evenly, each after a round trip.
struct Link {
    rate: u64,
    round_trip: u64,
    /// Per run: when its first byte comes, and the bytes still owed.
    runs: BTreeMap<RunId, (u64, u64)>,
    carried: u64,
}

impl Link {
    /// Lets one millisecond pass; what arrived.
    fn step(&mut self, bench: &mut Bench) {
        let now = u64::try_from(bench.now.as_millis()).unwrap();
        let active = self.runs.values().filter(|(from, _)| *from <= now).count().max(1) as u64;
        let mut pieces = Vec::new();
        for (run, (from, owed)) in &mut self.runs {
            if *from <= now {
                let before = owed.div_ceil(256 * KIB);
                let share = (self.rate / active).min(*owed);
                *owed -= share;
                self.carried += share;
                pieces.push((*run, before - owed.div_ceil(256 * KIB), *owed == 0));
            }
        }
        bench.now += MS;
        for (run, arrived, done) in pieces {
            for _ in 0..arrived {
                let piece = *bench.check.in_flight[&run].1.first().expect("a piece is owed");
                let actions = bench.apply(Event::Arrived { run, piece });
                self.open(bench, &actions);
            }
            if done {
                self.runs.remove(&run);
                let actions = bench.apply(Event::Ended { run, outcome: Outcome::Done });
                self.open(bench, &actions);
            }
        }
    }

    fn open(&mut self, bench: &Bench, actions: &[Action]) {
        let now = u64::try_from(bench.now.as_millis()).unwrap();
        for action in actions {
            if let Action::Fetch(run) = action {
                let owed = u64::from(run.pieces.len()) * 256 * KIB;
                self.runs.insert(run.id, (now + self.round_trip, owed));
            }
        }
    }
}

#[test]
fn on_a_busy_link_faults_wait_for_a_bounded_time_and_each_byte_travels_once() {
    // 200 Mbit/s, 20 ms: a pull-through of 64 MiB and a background fill of 32 MiB, and a fault of
    // one piece in a third blob every 50 ms. Alone, a fault would take 20 + 10.5 ms; sharing the
    // link with four other runs, 20 + 52; and it may find the one before on the reserved connection.
    let mut bench = Bench::new(Limits { deadline: 600_000 * MS, ..limits() });
    let mut link = Link { rate: 25_000, round_trip: 20, runs: BTreeMap::new(), carried: 0 };
    for (blob, pieces, class) in [(1, 0..256, Class::PullThrough), (2, 0..128, Class::Background)] {
        let (_, actions) = bench.need(blob, pieces, class);
        link.open(&bench, &actions);
    }
    let (mut asked, mut worst) = (BTreeMap::new(), Duration::ZERO);
    let mut faults = 0;
    while !bench.check.open.is_empty() {
        assert!(bench.now < 60_000 * MS, "too slow: {:?} open", bench.check.open.len());
        if bench.now.as_millis().is_multiple_of(50) && faults < 40 {
            let (need, actions) = bench.need(3, faults * 3..faults * 3 + 1, Class::Fault);
            link.open(&bench, &actions);
            asked.insert(need, bench.now);
            faults += 1;
        }
        link.step(&mut bench);
        asked.retain(|need, at| {
            let done = bench.check.satisfied.contains(need);
            if done {
                worst = worst.max(bench.now - *at);
            }
            !done
        });
    }
    assert!(asked.is_empty() && bench.check.failed.is_empty());
    assert_eq!(link.carried, (256 + 128 + 40) * 256 * KIB, "each byte once");
    assert!(worst <= 100 * MS, "a fault waited {worst:?}");
    // The link is never idle for long: 106 MiB at 25 MB/s take 4.45 s.
    assert!(bench.now < 5_500 * MS, "{:?}", bench.now);
}
