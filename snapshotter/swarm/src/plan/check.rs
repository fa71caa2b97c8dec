//! The planner's invariants, stated over its events and actions alone: shares no code with it.
//! Tests and the simulation call it after every event.

use std::collections::{BTreeMap, BTreeSet};

use skimmer_proto::{PieceSet, TaskId};

use super::{Action, Event, Fault, Limits, Now, Peer, Report, RequestId, Why};

/// Watches a planner's history.
#[derive(Debug)]
pub struct Check {
    limits: Limits,
    scheduler: bool,
    /// Wanted and not received.
    wanted: BTreeMap<TaskId, PieceSet>,
    /// Not any more.
    unwanted: BTreeMap<TaskId, PieceSet>,
    /// On disk, and the scheduler doesn't know yet.
    stored: BTreeMap<TaskId, PieceSet>,
    /// What the scheduler takes to be wanted.
    told: BTreeMap<TaskId, PieceSet>,
    leased: BTreeMap<TaskId, PieceSet>,
    /// Until when.
    banned: BTreeMap<(TaskId, Peer), Now>,
    /// Who sent what isn't on disk yet.
    landed: BTreeMap<(TaskId, u32), Option<Peer>>,
    in_flight: BTreeMap<RequestId, Flight>,
    seen: BTreeSet<RequestId>,
    /// Requests to the origin by reason.
    pub origin: BTreeMap<Why, u32>,
}

#[derive(Clone, Debug)]
pub struct Flight {
    pub task: TaskId,
    /// `None`: the origin.
    pub peer: Option<Peer>,
    /// What it owes.
    pub left: PieceSet,
}

/// A step that broke an invariant.
#[derive(Debug, thiserror::Error)]
#[error("the download planner broke an invariant: {0}")]
pub struct Violation(String);

macro_rules! hold {
    ($condition:expr, $($words:tt)*) => {
        if !$condition {
            return Err(Violation(format!($($words)*)));
        }
    };
}

impl Check {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            scheduler: false,
            wanted: BTreeMap::new(),
            unwanted: BTreeMap::new(),
            stored: BTreeMap::new(),
            told: BTreeMap::new(),
            leased: BTreeMap::new(),
            banned: BTreeMap::new(),
            landed: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            seen: BTreeSet::new(),
            origin: BTreeMap::new(),
        }
    }

    /// What the planner was told, and what it answered.
    pub fn step(&mut self, now: Now, event: &Event, actions: &[Action]) -> Result<(), Violation> {
        self.event(now, event);
        for action in actions {
            self.action(now, action)?;
        }
        self.state()
    }

    pub const fn in_flight(&self) -> &BTreeMap<RequestId, Flight> {
        &self.in_flight
    }

    /// What `task` still lacks.
    pub fn wanted(&self, task: &TaskId) -> PieceSet {
        self.wanted.get(task).cloned().unwrap_or_default()
    }

    fn event(&mut self, now: Now, event: &Event) {
        if let Event::Want { task, pieces, .. } | Event::Unwant { task, pieces } = event {
            self.landed.retain(|(other, piece), _| other != task || !pieces.contains(*piece));
        }
        match event {
            Event::Want { task, pieces, shape, .. } => {
                let exist = pieces.iter().filter(|piece| *piece < shape.pieces);
                let exist: PieceSet = exist.collect();
                self.unwanted.entry(*task).or_default().remove_all(&exist);
                self.stored.entry(*task).or_default().remove_all(&exist);
                self.wanted.entry(*task).or_default().insert_all(&exist);
            }
            Event::Unwant { task, pieces } => {
                self.wanted.entry(*task).or_default().remove_all(pieces);
                self.unwanted.entry(*task).or_default().insert_all(pieces);
            }
            Event::Stored { task, pieces } => {
                self.wanted.entry(*task).or_default().remove_all(pieces);
                self.stored.entry(*task).or_default().insert_all(pieces);
                for piece in pieces.iter() {
                    self.landed.remove(&(*task, piece));
                }
            }
            Event::Leased { task, pieces } => {
                self.leased.entry(*task).or_default().insert_all(pieces);
            }
            Event::Assigned { task, pieces, .. } | Event::Cancelled { task, pieces } => {
                self.leased.entry(*task).or_default().remove_all(pieces);
            }
            Event::Received { request, piece } => {
                let Some(flight) = self.in_flight.get(request).cloned() else { return };
                self.wanted.entry(flight.task).or_default().remove(*piece);
                self.landed.insert((flight.task, *piece), flight.peer);
                for other in self.in_flight.values_mut().filter(|f| f.task == flight.task) {
                    other.left.remove(*piece);
                }
            }
            Event::Wrong { task, piece } => {
                if let Some(Some(peer)) = self.landed.remove(&(*task, *piece)) {
                    self.banned.insert((*task, peer), Now::MAX);
                }
            }
            Event::Ended { request, outcome } => {
                let until = match outcome {
                    Err(Fault::Corrupt) => Now::MAX,
                    Err(Fault::Refused) => now + self.limits.refusal,
                    _ => now,
                };
                if let Some(Flight { task, peer: Some(peer), .. }) = self.in_flight.remove(request)
                {
                    let banned = self.banned.entry((task, peer)).or_default();
                    *banned = until.max(*banned);
                }
            }
            Event::SchedulerUp => {
                self.scheduler = true;
                self.leased.clear();
                self.told.clear();
            }
            Event::SchedulerDown => {
                self.scheduler = false;
                self.told.clear();
            }
            Event::Neighbours { .. }
            | Event::Queued { .. }
            | Event::Has { .. }
            | Event::Coming { .. }
            | Event::Met { .. }
            | Event::PeerUp { .. }
            | Event::PeerLost { .. }
            | Event::Tick => {}
        }
        if let Event::Unwant { task, pieces } | Event::Stored { task, pieces } = event {
            for flight in self.in_flight.values_mut().filter(|flight| flight.task == *task) {
                flight.left.remove_all(pieces);
            }
        }
    }

    fn action(&mut self, now: Now, action: &Action) -> Result<(), Violation> {
        match action {
            Action::Ask { request, task, peer, pieces, .. } => {
                let banned = self.banned.get(&(*task, *peer)).is_some_and(|until| *until > now);
                hold!(!banned, "{peer:?} is asked again after wrong bytes or a refusal");
                self.request(*request, *task, Some(*peer), pieces)?;
            }
            Action::Origin { request, task, pieces, why, .. } => {
                hold!(pieces.runs().count() == 1, "{pieces:?} of the origin isn't one run");
                let leased = self.leased.get(task).is_some_and(|l| l.contains_all(pieces));
                hold!(leased || *why != Why::Leased, "{pieces:?} isn't leased");
                *self.origin.entry(*why).or_default() += 1;
                self.request(*request, *task, None, pieces)?;
            }
            Action::Abandon { request } => _ = self.in_flight.remove(request),
            Action::Report(report) => {
                hold!(self.scheduler, "{report:?} without a scheduler");
                match report {
                    Report::Want { task, pieces, .. } => {
                        let wanted = self.wanted(task).contains_all(pieces);
                        hold!(wanted, "reports {pieces:?} as wanted");
                        self.told.entry(*task).or_default().insert_all(pieces);
                    }
                    Report::Arrived { task, pieces } => {
                        self.told.entry(*task).or_default().remove_all(pieces);
                        self.stored.entry(*task).or_default().remove_all(pieces);
                    }
                    Report::Withdraw { task, pieces: Some(pieces) } => {
                        let wanted = self.wanted(task).intersection(pieces);
                        hold!(wanted.is_empty(), "withdraws {wanted:?}, which is wanted");
                        self.told.entry(*task).or_default().remove_all(pieces);
                    }
                    Report::Withdraw { task, pieces: None } => {
                        let wanted = self.wanted(task);
                        hold!(wanted.is_empty(), "withdraws everything, and wants {wanted:?}");
                        self.told.remove(task);
                    }
                    Report::Reading { .. } | Report::Failed { .. } => {}
                }
            }
            Action::Probe { .. } | Action::Hopeless { .. } => {}
        }
        Ok(())
    }

    fn request(
        &mut self,
        id: RequestId,
        task: TaskId,
        peer: Option<Peer>,
        pieces: &PieceSet,
    ) -> Result<(), Violation> {
        hold!(!pieces.is_empty() && self.seen.insert(id), "{id:?} is empty or used twice");
        let wanted = self.wanted(&task).contains_all(pieces);
        hold!(wanted, "asks for {pieces:?}, of which something isn't wanted");
        let flight = Flight { task, peer, left: pieces.clone() };
        self.in_flight.insert(id, flight);
        for piece in pieces.iter() {
            let carriers: Vec<_> = self
                .in_flight
                .values()
                .filter(|flight| flight.task == task && flight.left.contains(piece))
                .map(|flight| flight.peer)
                .collect();
            let twice = carriers.len() == 2 && carriers[0] != carriers[1];
            hold!(carriers.len() == 1 || twice, "piece {piece} is asked of {carriers:?}");
        }
        Ok(())
    }

    fn state(&self) -> Result<(), Violation> {
        let mut unanswered: BTreeMap<Peer, u32> = BTreeMap::new();
        let mut origin = 0;
        for flight in self.in_flight.values() {
            match flight.peer {
                Some(peer) => *unanswered.entry(peer).or_default() += flight.left.len(),
                None if flight.left.is_empty() => {}
                None => origin += 1,
            }
        }
        for (task, told) in &self.told {
            let unwanted = self.unwanted.get(task).cloned().unwrap_or_default();
            let stored = self.stored.get(task).cloned().unwrap_or_default();
            let owed = told.intersection(&unwanted).difference(&stored);
            hold!(owed.is_empty(), "the scheduler takes {owed:?} to be wanted still");
        }
        hold!(origin <= self.limits.origin_requests + 2, "{origin} requests to the origin");
        for (peer, pieces) in unanswered {
            let most = self.limits.assigned_pieces;
            hold!(pieces <= most, "{peer:?} owes {pieces} pieces, more than {most}");
        }
        Ok(())
    }
}
