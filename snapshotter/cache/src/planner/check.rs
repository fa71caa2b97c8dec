//! The planner's invariants, stated over its events and actions alone: shares no code with it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Action, BlobId, Capacity, Event, Limits, NeedId, Outcome, Run, RunId, Why};
use crate::source::Class;

/// Watches a history and panics at the first step that breaks an invariant.
#[derive(Debug)]
pub struct Check {
    limits: Limits,
    pub in_flight: BTreeMap<RunId, (Run, BTreeSet<u32>)>,
    /// What each open need still lacks.
    pub open: BTreeMap<NeedId, (BlobId, BTreeSet<u32>)>,
    pub satisfied: BTreeSet<NeedId>,
    pub failed: BTreeMap<NeedId, Why>,
    classes: BTreeMap<NeedId, Class>,
    piece_lens: BTreeMap<BlobId, u64>,
    taken: BTreeMap<BlobId, bool>,
    /// What runs of sources of pieces have been told of urgency.
    urged: BTreeMap<(RunId, u32), Class>,
}

impl Check {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            in_flight: BTreeMap::new(),
            open: BTreeMap::new(),
            satisfied: BTreeSet::new(),
            failed: BTreeMap::new(),
            classes: BTreeMap::new(),
            piece_lens: BTreeMap::new(),
            taken: BTreeMap::new(),
            urged: BTreeMap::new(),
        }
    }

    pub fn step(&mut self, event: &Event, actions: &[Action]) {
        self.event(event);
        for action in actions {
            match action {
                Action::Fetch(run) => self.fetch(run),
                Action::Urge { run, pieces, class } => {
                    let (flying, left) = &self.in_flight[run];
                    assert!(self.is_scattered(flying), "{run:?} orders its own work");
                    for piece in pieces.iter() {
                        assert!(left.contains(&piece), "{piece} isn't in {run:?}");
                        assert!(self.class_wanted(flying.blob, piece) == Some(*class));
                        self.urged.insert((*run, piece), *class);
                    }
                }
                Action::Stop { run } => {
                    let (flying, left) = &self.in_flight[run];
                    assert!(self.is_scattered(flying));
                    assert!(left.iter().all(|p| self.class_wanted(flying.blob, *p).is_none()));
                }
                Action::Satisfied { need } => {
                    let (_, left) = self.open.remove(need).expect("satisfied once");
                    assert!(left.is_empty(), "{need:?} still lacks {left:?}");
                    self.satisfied.insert(*need);
                }
                Action::Failed { need, blob, why } => {
                    let (of, left) = self.open.remove(need).expect("failed once");
                    assert!(of == *blob && !left.is_empty());
                    self.failed.insert(*need, *why);
                }
            }
        }
        assert!(self.open.values().all(|(_, left)| !left.is_empty()), "an answer is owed");
        for (run, left) in self.in_flight.values().filter(|(run, _)| self.is_scattered(run)) {
            for piece in left {
                let wanted = self.class_wanted(run.blob, *piece);
                let told = self.urged.get(&(run.id, *piece)).copied().unwrap_or(run.class);
                assert!(wanted.is_none_or(|class| told <= class), "{run:?} isn't told of {piece}");
            }
        }
    }

    fn is_scattered(&self, run: &Run) -> bool {
        matches!(self.limits.sources[run.source.0], Capacity::Pieces)
    }

    /// The most urgent class that waits for a piece.
    fn class_wanted(&self, blob: BlobId, piece: u32) -> Option<Class> {
        let wanting = self.open.iter().filter(|(_, (b, left))| *b == blob && left.contains(&piece));
        wanting.map(|(need, _)| self.classes[need]).min()
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Need { need, blob, pieces, class, piece_len, taken } => {
                self.taken.insert(*blob, *taken);
                self.open.insert(*need, (*blob, pieces.iter().copied().collect()));
                self.classes.insert(*need, *class);
                self.piece_lens.insert(*blob, *piece_len);
            }
            Event::Taken { blob, taken } => _ = self.taken.insert(*blob, *taken),
            Event::Withdrawn { need } => _ = self.open.remove(need),
            Event::Arrived { run, piece } => {
                let Some((run, left)) = self.in_flight.get_mut(run) else { return };
                assert!(left.remove(piece));
                for (blob, left) in self.open.values_mut() {
                    if *blob == run.blob {
                        left.remove(piece);
                    }
                }
            }
            Event::Wrong { run, piece } => {
                if let Some((_, left)) = self.in_flight.get_mut(run) {
                    left.remove(piece);
                }
            }
            Event::Ended { run, outcome: Outcome::Done | Outcome::Failed { .. } } => {
                self.in_flight.remove(run);
            }
            Event::Tick => {}
        }
    }

    fn fetch(&mut self, run: &Run) {
        assert!(!run.pieces.is_empty());
        let flying = self.in_flight.values().filter(|(other, _)| other.blob == run.blob);
        for piece in run.pieces.iter() {
            assert!(flying.clone().all(|(_, left)| !left.contains(&piece)), "{piece} twice");
            let wanted = self.open.iter().any(|(need, (blob, left))| {
                *blob == run.blob && left.contains(&piece) && self.classes[need] <= run.class
            });
            assert!(wanted, "nobody so urgent wants {piece} of {run:?}");
        }
        match self.limits.sources[run.source.0] {
            Capacity::Pieces => assert!(self.taken[&run.blob], "{run:?} of a blob not taken"),
            Capacity::Ranges { connections, reserved } => {
                self.fetch_range(run, connections, reserved);
            }
        }
        self.in_flight.insert(run.id, (run.clone(), run.pieces.iter().collect()));
    }

    fn fetch_range(&self, run: &Run, connections: usize, reserved: usize) {
        assert_eq!(run.pieces.runs().collect::<Vec<_>>(), [run.range()]);
        let len = self.piece_lens[&run.blob] * u64::from(run.pieces.len());
        let longest = self.limits.run_bytes[run.class as usize];
        assert!(run.pieces.len() == 1 || len <= longest, "{run:?} is too long");
        let ranges = || self.in_flight.values().filter(|(other, _)| !self.is_scattered(other));
        let here = ranges().filter(|(other, _)| other.source == run.source).count();
        let usable = match run.class {
            Class::Fault => connections,
            _ => connections - reserved,
        };
        assert!(here < usable, "{run:?} over capacity");
        if run.class != Class::Fault {
            let of_blob = ranges().filter(|(other, _)| other.blob == run.blob).count();
            assert!(of_blob < self.limits.per_blob, "{run:?} over the blob's share");
        }
        if run.class == Class::Background {
            let faults = ranges().filter(|(other, _)| other.class == Class::Fault);
            assert_eq!(faults.count(), 0, "{run:?} beside a fault");
        }
    }
}
