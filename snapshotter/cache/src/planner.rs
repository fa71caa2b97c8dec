//! The piece planner: which run of pieces is fetched next, from which source. Pure: events in,
//! actions out, time an argument. One planner serves the whole node, so that a reader's fault in
//! one blob goes before the background fill of another.
//!
//! Owns: the open needs, the runs in flight, each source's health per blob.
//! Does not own: which pieces are on disk (the caller asks only for absent ones), the transfers.
//!
//! Invariants (`check` in the tests restates them):
//! - A piece is in at most one run, whoever asks for it.
//! - A source of ranges never has more runs than its connections, and the reserved ones carry
//!   faults only; no background run starts there while a fault is in flight.
//! - A source of pieces is given everything of a class that waits, in one run, if it takes the blob,
//!   and hears of each piece that becomes more urgent meanwhile.
//! - A need ends exactly once: satisfied, failed or withdrawn.

mod event;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use skimmer_proto::PieceSet;

pub use self::event::{
    Action, BlobId, Capacity, Event, Limits, NeedId, Now, Outcome, Run, RunId, SourceId, Why,
};
use crate::source::Class;

/// See the module's documentation.
#[derive(Debug)]
pub struct Planner {
    limits: Limits,
    needs: BTreeMap<NeedId, Need>,
    deadlines: BTreeSet<(Now, NeedId)>,
    blobs: BTreeMap<BlobId, Blob>,
    flights: BTreeMap<RunId, Flight>,
    next_run: u64,
}

#[derive(Debug)]
struct Need {
    blob: BlobId,
    class: Class,
    pieces: Vec<u32>,
    left: usize,
    deadline: Now,
}

#[derive(Debug)]
struct Blob {
    piece_len: u64,
    /// Everything wanted or in flight.
    pieces: BTreeMap<u32, Piece>,
    /// What isn't in flight, most urgent first.
    waiting: BTreeSet<(Class, NeedId, u32)>,
    health: Vec<Health>,
    /// In flight, from sources of ranges.
    runs: usize,
    /// In flight, from sources of pieces.
    scattered: usize,
    /// Whether sources of pieces take it.
    taken: bool,
    last_arrival: Now,
}

#[derive(Debug, Default)]
struct Piece {
    needs: Vec<NeedId>,
    run: Option<RunId>,
    /// Wrong deliveries by source.
    wrong: BTreeMap<SourceId, u32>,
}

/// How a source does for one blob.
#[derive(Clone, Debug, Default)]
struct Health {
    failures: u32,
    not_before: Now,
    refused: bool,
}

#[derive(Debug)]
struct Flight {
    blob: BlobId,
    source: SourceId,
    begun: Now,
    /// The most urgent class that waits for it.
    class: Class,
    left: BTreeSet<u32>,
}

/// The order in which startable pieces are started: members in order of importance.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Priority {
    class: Class,
    /// Runs that its blob has already: blobs of one class share the connections evenly.
    busy: usize,
    need: NeedId,
    piece: u32,
}

impl Planner {
    pub const fn new(limits: Limits) -> Self {
        Self {
            limits,
            needs: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            blobs: BTreeMap::new(),
            flights: BTreeMap::new(),
            next_run: 0,
        }
    }

    pub fn apply(&mut self, now: Now, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Need { need, blob, piece_len, pieces, class, taken } => {
                self.blob(now, blob, piece_len).taken = taken;
                self.need(now, need, blob, pieces, class, &mut actions);
                self.forget_if_idle(blob);
            }
            Event::Taken { blob, taken } => {
                if let Some(blob) = self.blobs.get_mut(&blob) {
                    blob.taken = taken;
                }
            }
            Event::Withdrawn { need } => self.close(need, &mut actions),
            Event::Arrived { run, piece } => self.arrived(now, run, piece, &mut actions),
            Event::Wrong { run, piece } => self.wrong(run, piece, &mut actions),
            Event::Ended { run, outcome } => self.ended(now, run, outcome, &mut actions),
            Event::Tick => {}
        }
        self.expire(now, &mut actions);
        while let Some(run) = self.start(now) {
            actions.push(Action::Fetch(run));
        }
        actions
    }

    /// When [`Event::Tick`] is due, if nothing else happens.
    pub fn next_wake(&self, now: Now) -> Option<Now> {
        let blocked = self.blobs.values().filter(|blob| !blob.waiting.is_empty());
        let backoff = blocked
            .flat_map(|blob| &blob.health)
            .filter(|health| !health.refused && health.not_before > now)
            .map(|health| health.not_before)
            .min();
        let deadline = self.deadlines.first().map(|(at, _)| *at);
        backoff.into_iter().chain(deadline).min()
    }

    fn blob(&mut self, now: Now, id: BlobId, piece_len: u64) -> &mut Blob {
        let sources = self.limits.sources.len();
        self.blobs.entry(id).or_insert_with(|| Blob {
            piece_len,
            pieces: BTreeMap::new(),
            waiting: BTreeSet::new(),
            health: vec![Health::default(); sources],
            runs: 0,
            scattered: 0,
            taken: false,
            last_arrival: now,
        })
    }

    fn need(
        &mut self,
        now: Now,
        id: NeedId,
        blob_id: BlobId,
        pieces: Vec<u32>,
        class: Class,
        actions: &mut Vec<Action>,
    ) {
        let pieces: Vec<u32> = pieces.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
        let Some(blob) = self.blobs.get_mut(&blob_id).filter(|_| !pieces.is_empty()) else {
            actions.push(Action::Satisfied { need: id });
            return;
        };
        let mut urged: BTreeMap<RunId, PieceSet> = BTreeMap::new();
        for piece in &pieces {
            let wanted = blob.pieces.entry(*piece).or_default();
            let before = wanted.needs.iter().map(|need| self.needs[need].class).min();
            wanted.needs.push(id);
            let Some((run, flight)) =
                wanted.run.and_then(|run| Some((run, self.flights.get_mut(&run)?)))
            else {
                blob.waiting.insert((class, id, *piece));
                continue;
            };
            if !self.limits.is_scattered(flight.source) {
                flight.class = flight.class.min(class);
            } else if before.is_none_or(|before| class < before) {
                urged.entry(run).or_default().insert(*piece);
            }
        }
        let urge = |(run, pieces)| Action::Urge { run, pieces, class };
        actions.extend(urged.into_iter().map(urge));
        let deadline = now + self.limits.deadline;
        self.deadlines.insert((deadline, id));
        let left = pieces.len();
        self.needs.insert(id, Need { blob: blob_id, class, pieces, left, deadline });
    }

    /// Forgets a need. What is in flight for it goes on where it is a short range.
    fn close(&mut self, id: NeedId, actions: &mut Vec<Action>) {
        let Some(need) = self.needs.remove(&id) else { return };
        self.deadlines.remove(&(need.deadline, id));
        let Some(blob) = self.blobs.get_mut(&need.blob) else { return };
        let mut unwanted = BTreeSet::new();
        for piece in need.pieces {
            blob.waiting.remove(&(need.class, id, piece));
            if let Some(wanted) = blob.pieces.get_mut(&piece) {
                wanted.needs.retain(|other| *other != id);
                match wanted.run {
                    Some(run) if wanted.needs.is_empty() => _ = unwanted.insert(run),
                    None if wanted.needs.is_empty() => _ = blob.pieces.remove(&piece),
                    _ => {}
                }
            }
        }
        for run in unwanted {
            let Some(flight) = self.flights.get(&run) else { continue };
            let is_wanted = |piece| {
                blob.pieces.get(piece).is_some_and(|wanted: &Piece| !wanted.needs.is_empty())
            };
            if self.limits.is_scattered(flight.source) && !flight.left.iter().any(is_wanted) {
                actions.push(Action::Stop { run });
            }
        }
        self.forget_if_idle(need.blob);
    }

    fn fail(&mut self, need: NeedId, why: Why, actions: &mut Vec<Action>) {
        if let Some(blob) = self.needs.get(&need).map(|need| need.blob) {
            actions.push(Action::Failed { need, blob, why });
            self.close(need, actions);
        }
    }

    fn arrived(&mut self, now: Now, run: RunId, piece: u32, actions: &mut Vec<Action>) {
        let Some(flight) = self.flights.get_mut(&run) else { return };
        if !flight.left.remove(&piece) {
            return;
        }
        let Some(blob) = self.blobs.get_mut(&flight.blob) else { return };
        blob.last_arrival = now;
        if let Some(health) = blob.health.get_mut(flight.source.0) {
            health.failures = 0;
        }
        let needs = blob.pieces.remove(&piece).map(|piece| piece.needs).unwrap_or_default();
        for id in needs {
            let Some(need) = self.needs.get_mut(&id) else { continue };
            need.left -= 1;
            if need.left == 0 {
                self.close(id, actions);
                actions.push(Action::Satisfied { need: id });
            }
        }
    }

    fn wrong(&mut self, run: RunId, piece: u32, actions: &mut Vec<Action>) {
        let Some(flight) = self.flights.get_mut(&run) else { return };
        if !flight.left.remove(&piece) {
            return;
        }
        let (id, source) = (flight.blob, flight.source);
        let Some(blob) = self.blobs.get_mut(&id) else { return };
        let Some(wanted) = blob.pieces.get_mut(&piece) else { return };
        *wanted.wrong.entry(source).or_default() += 1;
        let limits = &self.limits;
        let hopeless = (0..limits.sources.len()).map(SourceId).all(|source| {
            wanted.wrong.get(&source).is_some_and(|times| *times >= limits.wrong)
                || (limits.is_scattered(source) && !blob.taken)
        });
        let needs = wanted.needs.clone();
        self.put_back(id, piece);
        if hopeless {
            for need in needs {
                self.fail(need, Why::Wrong { piece }, actions);
            }
        }
    }

    fn ended(&mut self, now: Now, run: RunId, outcome: Outcome, actions: &mut Vec<Action>) {
        let Some(flight) = self.flights.remove(&run) else { return };
        for piece in flight.left {
            self.put_back(flight.blob, piece);
        }
        let Some(blob) = self.blobs.get_mut(&flight.blob) else { return };
        if self.limits.is_scattered(flight.source) {
            blob.scattered -= 1;
        } else {
            blob.runs -= 1;
        }
        let health = &mut blob.health[flight.source.0];
        if let Outcome::Failed { retryable } = outcome {
            health.refused |= !retryable;
            // Runs that were under way together fail for one reason: only the first of them counts.
            if flight.begun >= health.not_before {
                let factor = 1_u32.checked_shl(health.failures).unwrap_or(u32::MAX);
                let wait = self.limits.backoff.saturating_mul(factor).min(self.limits.backoff_max);
                health.failures = (health.failures + 1).min(31);
                health.not_before = now + wait;
            }
        }
        let limits = &self.limits;
        let is_closed = |(source, health): (usize, &Health)| {
            health.refused || (limits.is_scattered(SourceId(source)) && !blob.taken)
        };
        if blob.health.iter().enumerate().all(is_closed) {
            // Whoever asks next is answered by a new attempt, not by this memory.
            blob.health = vec![Health::default(); self.limits.sources.len()];
            let needs = self.needs.iter().filter(|(_, need)| need.blob == flight.blob);
            for need in needs.map(|(id, _)| *id).collect::<Vec<_>>() {
                self.fail(need, Why::Refused, actions);
            }
        }
        self.forget_if_idle(flight.blob);
    }

    /// A piece that isn't in flight any more waits again, if anybody wants it.
    fn put_back(&mut self, id: BlobId, piece: u32) {
        let Some(blob) = self.blobs.get_mut(&id) else { return };
        let Some(wanted) = blob.pieces.get_mut(&piece) else { return };
        wanted.run = None;
        for need in &wanted.needs {
            if let Some(class) = self.needs.get(need).map(|need| need.class) {
                blob.waiting.insert((class, *need, piece));
            }
        }
        if wanted.needs.is_empty() {
            blob.pieces.remove(&piece);
        }
    }

    fn forget_if_idle(&mut self, id: BlobId) {
        if self.blobs.get(&id).is_some_and(Blob::is_idle) {
            self.blobs.remove(&id);
        }
    }

    fn expire(&mut self, now: Now, actions: &mut Vec<Action>) {
        while let Some((at, id)) = self.deadlines.first().copied()
            && at <= now
        {
            self.deadlines.remove(&(at, id));
            let Some(need) = self.needs.get_mut(&id) else { continue };
            let arrival = self.blobs.get(&need.blob).map_or(Duration::ZERO, |b| b.last_arrival);
            let later = arrival + self.limits.deadline;
            if need.class != Class::Fault && later > now {
                need.deadline = later;
                self.deadlines.insert((later, id));
            } else {
                self.fail(id, Why::Deadline, actions);
            }
        }
    }

    /// Starts the most urgent run that may start now.
    fn start(&mut self, now: Now) -> Option<Run> {
        let candidates = self.blobs.iter().filter_map(|(id, blob)| {
            let (class, need, piece, source) = self.first_startable(now, blob)?;
            Some((Priority { class, busy: blob.runs, need, piece }, *id, source))
        });
        let (Priority { class, piece: first, .. }, id, source) = candidates.min()?;
        let run = RunId(self.next_run);
        self.next_run += 1;
        let scattered = self.limits.is_scattered(source);
        let blob = self.blobs.get_mut(&id)?;
        let longest = (self.limits.run_bytes[class as usize] / blob.piece_len).max(1);
        let candidates: Vec<u32> = if scattered {
            let of_class = blob.waiting.iter().take_while(|(c, ..)| *c <= class);
            of_class.map(|(.., piece)| *piece).collect()
        } else {
            (u64::from(first)..u64::from(first) + longest)
                .filter_map(|piece| u32::try_from(piece).ok())
                .collect()
        };
        let mut pieces = PieceSet::new();
        for piece in candidates {
            let fit = blob.pieces.get_mut(&piece).filter(|wanted| {
                let urgent = wanted.needs.iter().any(|n| self.needs[n].class <= class);
                let tired = wanted.wrong.get(&source).is_some_and(|n| *n >= self.limits.wrong);
                wanted.run.is_none() && urgent && !tired
            });
            match fit {
                Some(wanted) => {
                    wanted.run = Some(run);
                    for need in &wanted.needs {
                        blob.waiting.remove(&(self.needs[need].class, *need, piece));
                    }
                    pieces.insert(piece);
                }
                None if scattered => {}
                None => break,
            }
        }
        blob.count(scattered);
        let left = pieces.iter().collect();
        self.flights.insert(run, Flight { blob: id, source, begun: now, class, left });
        Some(Run { id: run, blob: id, source, pieces, class })
    }

    /// The most urgent piece of a blob that may start, and from where.
    fn first_startable(&self, now: Now, blob: &Blob) -> Option<(Class, NeedId, u32, SourceId)> {
        let (most_urgent, ..) = blob.waiting.first()?;
        self.sources_for(now, blob, *most_urgent).next()?;
        blob.waiting.iter().find_map(|(class, need, piece)| {
            let wrong = &blob.pieces.get(piece)?.wrong;
            let source = self
                .sources_for(now, blob, *class)
                .find(|source| wrong.get(source).is_none_or(|n| *n < self.limits.wrong))?;
            Some((*class, *need, *piece, source))
        })
    }

    /// The sources that may start a run of `class` for `blob` now, best first.
    fn sources_for<'a>(
        &'a self,
        now: Now,
        blob: &'a Blob,
        class: Class,
    ) -> impl Iterator<Item = SourceId> + 'a {
        let ranges = || self.flights.values().filter(|f| !self.limits.is_scattered(f.source));
        let in_flight = move |class| ranges().filter(move |f| f.class == class).count();
        let allowed = match class {
            Class::Fault => true,
            Class::PullThrough => blob.runs < self.limits.per_blob,
            Class::Background => {
                blob.runs < self.limits.per_blob
                    && in_flight(Class::Background) < self.limits.background
                    && in_flight(Class::Fault) == 0
            }
        };
        let sources = self.limits.sources.iter().zip(&blob.health).enumerate();
        sources.filter_map(move |(source, (capacity, health))| {
            let free = match *capacity {
                Capacity::Pieces => blob.taken,
                Capacity::Ranges { connections, reserved } => {
                    let reserved = if class == Class::Fault { 0 } else { reserved };
                    let busy = self.flights.values().filter(|f| f.source.0 == source).count();
                    allowed && busy < connections.saturating_sub(reserved)
                }
            };
            let fit = !health.refused && health.not_before <= now;
            (free && fit).then_some(SourceId(source))
        })
    }
}

impl Blob {
    fn is_idle(&self) -> bool {
        self.pieces.is_empty() && self.runs == 0 && self.scattered == 0
    }

    const fn count(&mut self, scattered: bool) {
        if scattered {
            self.scattered += 1;
        } else {
            self.runs += 1;
        }
    }
}

impl Limits {
    fn is_scattered(&self, source: SourceId) -> bool {
        matches!(self.sources.get(source.0), Some(Capacity::Pieces))
    }
}

#[cfg(test)]
mod check;
#[cfg(test)]
mod tests;
