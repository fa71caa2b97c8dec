//! The piece planner: which run of pieces is fetched next, from which source. Pure: events in,
//! actions out, time an argument. One planner serves the whole node, so that a reader's fault in
//! one blob goes before the background fill of another.
//!
//! Owns: the open needs, the runs in flight, each source's health per blob.
//! Does not own: which pieces are on disk (the caller asks only for absent ones), the transfers.
//!
//! Invariants (`check` in the tests restates them):
//! - A piece is in at most one run, whoever asks for it.
//! - A source never has more runs than its connections, and the reserved ones carry faults only.
//! - No background run starts while a fault is in flight.
//! - A need ends exactly once: satisfied, failed or withdrawn.

mod event;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

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
    runs: usize,
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
            Event::Need { need, blob, piece_len, pieces, class } => {
                self.need(now, need, (blob, piece_len), pieces, class, &mut actions);
            }
            Event::Withdrawn { need } => self.close(need),
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

    fn need(
        &mut self,
        now: Now,
        id: NeedId,
        (blob_id, piece_len): (BlobId, u64),
        pieces: Vec<u32>,
        class: Class,
        actions: &mut Vec<Action>,
    ) {
        let pieces: Vec<u32> = pieces.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
        if pieces.is_empty() {
            actions.push(Action::Satisfied { need: id });
            return;
        }
        let sources = self.limits.sources.len();
        let blob = self.blobs.entry(blob_id).or_insert_with(|| Blob {
            piece_len,
            pieces: BTreeMap::new(),
            waiting: BTreeSet::new(),
            health: vec![Health::default(); sources],
            runs: 0,
            last_arrival: now,
        });
        for piece in &pieces {
            let wanted = blob.pieces.entry(*piece).or_default();
            wanted.needs.push(id);
            match wanted.run.and_then(|run| self.flights.get_mut(&run)) {
                Some(flight) => flight.class = flight.class.min(class),
                None => _ = blob.waiting.insert((class, id, *piece)),
            }
        }
        let deadline = now + self.limits.deadline;
        self.deadlines.insert((deadline, id));
        let left = pieces.len();
        self.needs.insert(id, Need { blob: blob_id, class, pieces, left, deadline });
    }

    /// Forgets a need; what is in flight for it goes on.
    fn close(&mut self, id: NeedId) {
        let Some(need) = self.needs.remove(&id) else { return };
        self.deadlines.remove(&(need.deadline, id));
        let Some(blob) = self.blobs.get_mut(&need.blob) else { return };
        for piece in need.pieces {
            blob.waiting.remove(&(need.class, id, piece));
            if let Some(wanted) = blob.pieces.get_mut(&piece) {
                wanted.needs.retain(|other| *other != id);
                if wanted.needs.is_empty() && wanted.run.is_none() {
                    blob.pieces.remove(&piece);
                }
            }
        }
        self.forget_if_idle(need.blob);
    }

    fn fail(&mut self, need: NeedId, why: Why, actions: &mut Vec<Action>) {
        if let Some(blob) = self.needs.get(&need).map(|need| need.blob) {
            self.close(need);
            actions.push(Action::Failed { need, blob, why });
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
                self.close(id);
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
        let hopeless = (0..self.limits.sources.len()).all(|source| {
            wanted.wrong.get(&SourceId(source)).is_some_and(|times| *times >= self.limits.wrong)
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
        blob.runs -= 1;
        let health = &mut blob.health[flight.source.0];
        if let Outcome::Failed { retryable } = outcome {
            let factor = 1_u32.checked_shl(health.failures).unwrap_or(u32::MAX);
            let wait = self.limits.backoff.saturating_mul(factor).min(self.limits.backoff_max);
            health.failures = (health.failures + 1).min(31);
            health.not_before = now + wait;
            health.refused |= !retryable;
        }
        if blob.health.iter().all(|health| health.refused) {
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
        if self.blobs.get(&id).is_some_and(|blob| blob.pieces.is_empty() && blob.runs == 0) {
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
        let blob = self.blobs.get_mut(&id)?;
        let longest = (self.limits.run_bytes[class as usize] / blob.piece_len).max(1);
        let mut end = first;
        for _ in 0..longest {
            let Some(wanted) = blob.pieces.get_mut(&end) else { break };
            let urgent = wanted.needs.iter().any(|n| self.needs[n].class <= class);
            let tired = wanted.wrong.get(&source).is_some_and(|n| *n >= self.limits.wrong);
            if wanted.run.is_some() || !urgent || tired {
                break;
            }
            wanted.run = Some(run);
            for need in &wanted.needs {
                blob.waiting.remove(&(self.needs[need].class, *need, end));
            }
            end += 1;
        }
        blob.runs += 1;
        let left = (first..end).collect();
        self.flights.insert(run, Flight { blob: id, source, class, left });
        Some(Run { id: run, blob: id, source, pieces: first..end, class })
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
        let in_flight = |class| self.flights.values().filter(move |f| f.class == class).count();
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
            let reserved = if class == Class::Fault { 0 } else { capacity.reserved };
            let busy = self.flights.values().filter(|f| f.source.0 == source).count();
            let free = busy < capacity.connections.saturating_sub(reserved);
            let fit = !health.refused && health.not_before <= now;
            (allowed && free && fit).then_some(SourceId(source))
        })
    }
}

#[cfg(test)]
mod check;
#[cfg(test)]
mod tests;
