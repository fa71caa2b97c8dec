//! The planner's invariants, stated over its events and actions alone: shares no code with it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Action, BlobId, Event, Limits, NeedId, Outcome, Run, RunId, Why};
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
        }
    }

    pub fn step(&mut self, event: &Event, actions: &[Action]) {
        self.event(event);
        for action in actions {
            match action {
                Action::Fetch(run) => self.fetch(run),
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
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Need { need, blob, pieces, class, piece_len } => {
                self.open.insert(*need, (*blob, pieces.iter().copied().collect()));
                self.classes.insert(*need, *class);
                self.piece_lens.insert(*blob, *piece_len);
            }
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
        for piece in run.pieces.clone() {
            assert!(flying.clone().all(|(_, left)| !left.contains(&piece)), "{piece} twice");
            let wanted = self.open.iter().any(|(need, (blob, left))| {
                *blob == run.blob && left.contains(&piece) && self.classes[need] <= run.class
            });
            assert!(wanted, "nobody so urgent wants {piece} of {run:?}");
        }
        let len = self.piece_lens[&run.blob] * run.pieces.len() as u64;
        let longest = self.limits.run_bytes[run.class as usize];
        assert!(run.pieces.len() == 1 || len <= longest, "{run:?} is too long");
        let here = self.in_flight.values().filter(|(other, _)| other.source == run.source).count();
        let capacity = self.limits.sources[run.source.0];
        let usable = match run.class {
            Class::Fault => capacity.connections,
            _ => capacity.connections - capacity.reserved,
        };
        assert!(here < usable, "{run:?} over capacity");
        if run.class != Class::Fault {
            assert!(flying.count() < self.limits.per_blob, "{run:?} over the blob's share");
        }
        if run.class == Class::Background {
            let faults = self.in_flight.values().filter(|(other, _)| other.class == Class::Fault);
            assert_eq!(faults.count(), 0, "{run:?} beside a fault");
        }
        self.in_flight.insert(run.id, (run.clone(), run.pieces.clone().collect()));
    }
}
