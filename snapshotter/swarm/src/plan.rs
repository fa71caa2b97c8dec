//! The download planner of one node: which piece is asked of whom, and when. Pure: events in,
//! actions out, time an argument, ties broken by a seed.
//!
//! The scheduler's word goes first: pieces are fetched from the parents and by the leases that it
//! gave. The node chooses by itself, rarest piece first, where the scheduler says so (large swarms),
//! is gone, or says nothing; a reader's fault is asked of any known holder at once; and whoever is
//! linked is asked for what the origin fails to give.
//!
//! Owns: downloads, requests in flight, what is known of peers and their have-maps.
//! Does not own: connections, bytes, the right to read (the caller's), who is leased what.
//!
//! Invariants (`check` restates them without sharing code):
//! - A piece is in at most two requests, the second only because the first is late.
//! - The origin is read without a lease only for a reason that says so.
//! - No peer has more unanswered pieces than its bound, and none that is banned is asked.
//! - Reports go out only while there is a scheduler; a new one is told everything that is wanted.
//! - What the scheduler was told to be wanted arrives, or it is told that it isn't any more.

pub mod check;
mod choose;
mod download;
mod event;
mod links;
mod report;
mod watch;

use std::collections::{BTreeMap, BTreeSet};

pub use skimmer_cache::Class;
use skimmer_proto::{PieceSet, TaskId};

pub use self::event::{Action, Event, Fault, Limits, Now, Peer, Report, RequestId, Shape, Why};

use self::download::Download;
use self::links::{Link, Times};

/// See the module's documentation.
#[derive(Debug)]
pub struct Planner {
    me: Peer,
    seed: u64,
    limits: Limits,
    scheduler: bool,
    downloads: BTreeMap<TaskId, Download>,
    requests: BTreeMap<RequestId, Request>,
    links: BTreeMap<Peer, Link>,
    next_request: u64,
    /// How long pieces took lately, from their peer being free for them.
    bulk: Times,
    faults: Times,
    /// When the latest piece came, from wherever.
    last_received: Now,
    origin_failures: u32,
    origin_not_before: Now,
    /// Who isn't asked for a task, and until when, whatever becomes of its download.
    bans: BTreeMap<TaskId, BTreeMap<Peer, Now>>,
    /// Who isn't asked for anything again.
    quarantined: BTreeSet<Peer>,
}

/// Wrong pieces after which a peer isn't asked for anything again.
const WRONG_PIECES: u32 = 3;

/// Tasks whose bans are remembered.
const BANS: usize = 4096;

/// Peers that are remembered after their link is gone, if they have done nothing wrong.
const LINKS: usize = 4096;

#[derive(Debug)]
struct Request {
    task: TaskId,
    /// `None`: the origin.
    peer: Option<Peer>,
    /// Not received yet.
    left: PieceSet,
    class: Class,
    asked: Now,
}

impl Planner {
    /// `seed` decides between pieces that are equally good: different on each node.
    pub fn new(me: Peer, seed: u64, limits: Limits) -> Self {
        Self {
            me,
            seed,
            limits,
            scheduler: false,
            downloads: BTreeMap::new(),
            requests: BTreeMap::new(),
            links: BTreeMap::new(),
            next_request: 0,
            bulk: Times::default(),
            faults: Times::default(),
            last_received: Now::ZERO,
            origin_failures: 0,
            origin_not_before: Now::ZERO,
            bans: BTreeMap::new(),
            quarantined: BTreeSet::new(),
        }
    }

    pub fn apply(&mut self, now: Now, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.hear(now, event, &mut actions);
        self.watch(now, &mut actions);
        self.fill(now, &mut actions);
        self.flush(now, &mut actions);
        actions
    }

    /// When [`Event::Tick`] is due, if nothing else happens.
    pub fn next_wake(&self, now: Now) -> Option<Now> {
        self.next_due(now)
    }

    /// Whether anything of the task is wanted or on its way to disk.
    pub fn is_downloading(&self, task: &TaskId) -> bool {
        self.downloads.get(task).is_some_and(|download| !download.is_over())
    }

    fn hear(&mut self, now: Now, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Want { pieces, .. } if pieces.is_empty() => {}
            Event::Want { task, shape, pieces, class, origin } => {
                let download = self.downloads.entry(task).or_insert_with(|| {
                    let mut download = Download::new(now, shape, origin);
                    download.banned = self.bans.get(&task).cloned().unwrap_or_default();
                    let forever = self.quarantined.iter().map(|peer| (*peer, Now::MAX));
                    download.banned.extend(forever);
                    download
                });
                let may_again = origin && !download.origin;
                download.origin = origin;
                let news = download.want(now, &pieces, class);
                // Since the origin refused it, the scheduler gives this node no lease until it says so.
                let wanted = || download.all_wanted().intersection(&pieces);
                let pieces = if may_again { wanted() } else { news };
                if self.scheduler && !pieces.is_empty() {
                    download.told.insert_all(&pieces);
                    let shape = download.shape;
                    let want = Report::Want { task, shape, pieces, class, origin };
                    actions.push(Action::Report(want));
                }
            }
            Event::Unwant { task, pieces } => self.unwant(&task, &pieces, actions),
            Event::Assigned { .. }
            | Event::Leased { .. }
            | Event::Neighbours { .. }
            | Event::Queued { .. }
            | Event::Cancelled { .. } => self.obey(now, event, actions),
            Event::Has { task, peer, pieces, active } => {
                if let Some(download) = self.downloads.get_mut(&task) {
                    let holder = download.has(now, peer, &pieces);
                    (holder.awaited, holder.answered) = (None, Some(now));
                    if active && !holder.active {
                        (holder.active, holder.grew) = (true, now);
                    }
                }
            }
            Event::Coming { task, peer, pieces } => {
                if let Some(download) = self.downloads.get_mut(&task) {
                    download.holders.entry(peer).or_default().coming = pieces;
                }
            }
            Event::Met { peer } => {
                if self.links.len() < LINKS {
                    self.links.entry(peer).or_default();
                }
            }
            Event::Received { request, piece } => self.received(now, request, piece, actions),
            Event::Stored { task, pieces } => self.stored(now, &task, &pieces, actions),
            Event::Wrong { task, piece } => self.wrong(task, piece, actions),
            Event::Ended { request, outcome } => {
                self.ended(now, request, outcome.err().unwrap_or(Fault::Absent), actions);
            }
            Event::PeerUp { peer } => {
                let link = self.links.entry(peer).or_default();
                link.up = true;
                link.pardon();
            }
            Event::PeerLost { peer } => self.lost(now, peer, actions),
            Event::SchedulerUp => self.introduce(actions),
            Event::SchedulerDown => {
                self.scheduler = false;
                self.downloads.values_mut().for_each(|download| download.told = PieceSet::new());
            }
            Event::Tick => {}
        }
    }

    /// What the scheduler says.
    fn obey(&mut self, now: Now, event: Event, actions: &mut Vec<Action>) {
        let (Event::Assigned { task, .. }
        | Event::Leased { task, .. }
        | Event::Neighbours { task, .. }
        | Event::Queued { task }
        | Event::Cancelled { task, .. }) = &event
        else {
            return;
        };
        let Some(download) = self.downloads.get_mut(task) else { return };
        if let Event::Leased { task, pieces } = &event
            && !download.origin
        {
            let pieces = download.all_wanted().intersection(pieces);
            self.report_failure(*task, pieces, None, Fault::Refused, actions);
            return;
        }
        download.heard = now;
        if let Event::Assigned { pieces, .. } = &event {
            download.leased.remove_all(pieces);
        }
        match event {
            Event::Assigned { task, parent, pieces } if download.is_banned(&parent, now) => {
                let pieces = download.all_wanted().intersection(&pieces);
                self.report_failure(task, pieces, Some(parent), Fault::Refused, actions);
            }
            Event::Assigned { parent, pieces, .. } => {
                for others in download.assigned.values_mut() {
                    others.remove_all(&pieces);
                }
                // The scheduler knows better than what was seen before.
                download.holders.entry(parent).or_default().absent.remove_all(&pieces);
                download.has(now, parent, &pieces);
                download.assigned.entry(parent).or_default().insert_all(&pieces);
            }
            Event::Leased { pieces, .. } => download.leased.insert_all(&pieces),
            Event::Neighbours { peers, .. } => {
                for (peer, pieces) in &peers {
                    download.has(now, *peer, pieces);
                }
                download.neighbours = Some(peers.into_iter().map(|(peer, _)| peer).collect());
            }
            Event::Cancelled { task, pieces } => self.cancelled(now, &task, &pieces, actions),
            _ => {}
        }
    }

    /// What flies by the scheduler's word is to come from elsewhere.
    fn cancelled(&mut self, now: Now, task: &TaskId, pieces: &PieceSet, actions: &mut Vec<Action>) {
        let Some(download) = self.downloads.get_mut(task) else { return };
        let by_word = |request: &Request| match request.peer {
            Some(peer) => download.assigned.get(&peer).is_some_and(|a| a.intersects(&request.left)),
            None => download.leased.intersects(&request.left),
        };
        let over = |request: &Request| {
            request.task == *task && request.left.intersects(pieces) && by_word(request)
        };
        let over: Vec<_> =
            self.requests.iter().filter(|(_, request)| over(request)).map(|(id, _)| *id).collect();
        download.leased.remove_all(pieces);
        for assigned in download.assigned.values_mut() {
            assigned.remove_all(pieces);
        }
        for id in over {
            let Some(Request { peer, left, .. }) = self.requests.remove(&id) else { continue };
            download.take_back(now, &left, id);
            if let Some(link) = peer.and_then(|peer| self.links.get_mut(&peer)) {
                link.unanswered = link.unanswered.saturating_sub(left.len());
            }
            actions.push(Action::Abandon { request: id });
        }
    }

    fn unwant(&mut self, task: &TaskId, pieces: &PieceSet, actions: &mut Vec<Action>) {
        let Some(download) = self.downloads.get_mut(task) else { return };
        let given_up = download.told.intersection(pieces).difference(&download.stored);
        download.told.remove_all(&given_up);
        let mut carriers = Vec::new();
        for piece in pieces.iter() {
            download.landed.remove(&piece);
            carriers.extend(download.settle(piece).into_iter().map(|request| (request, piece)));
        }
        let wanted = download.is_waiting() || !download.flying.is_empty();
        let nothing = !wanted && download.landed.is_empty();
        if nothing {
            download.told = PieceSet::new();
        }
        for (request, piece) in carriers {
            self.relieve(request, piece, actions);
        }
        if self.scheduler && (nothing || !given_up.is_empty()) {
            let pieces = (!nothing).then_some(given_up);
            actions.push(Action::Report(Report::Withdraw { task: *task, pieces }));
        }
    }

    fn received(&mut self, now: Now, id: RequestId, piece: u32, actions: &mut Vec<Action>) {
        let Some(request) = self.requests.get(&id).filter(|r| r.left.contains(piece)) else {
            return;
        };
        let (task, peer, class) = (request.task, request.peer, request.class);
        self.last_received = now;
        match peer.and_then(|peer| self.links.get_mut(&peer)) {
            Some(link) => {
                let took = now.saturating_sub(link.free_since.max(request.asked));
                link.free_since = now;
                link.pardon();
                let times = if class == Class::Fault { &mut self.faults } else { &mut self.bulk };
                times.add(took);
            }
            None => self.origin_is_back(now),
        }
        let Some(download) = self.downloads.get_mut(&task) else { return };
        download.heard = now;
        let carriers = download.settle(piece);
        download.landed.insert(piece, peer);
        for carrier in carriers {
            let mut after = Vec::new();
            self.relieve(carrier, piece, &mut after);
            // A request that has brought its last piece ends by itself.
            actions.extend(after.into_iter().filter(|_| carrier != id));
        }
    }

    fn stored(&mut self, now: Now, task: &TaskId, pieces: &PieceSet, actions: &mut Vec<Action>) {
        let Some(download) = self.downloads.get_mut(task) else { return };
        download.stored.insert_all(pieces);
        download.heard = now;
        let mut carriers = Vec::new();
        for piece in pieces.iter() {
            download.landed.remove(&piece);
            // It may have come another way.
            carriers.extend(download.settle(piece).into_iter().map(|request| (request, piece)));
        }
        for (request, piece) in carriers {
            self.relieve(request, piece, actions);
        }
    }

    fn wrong(&mut self, task: TaskId, piece: u32, actions: &mut Vec<Action>) {
        let Some(download) = self.downloads.get_mut(&task) else { return };
        let Some(sender) = download.landed.remove(&piece) else { return };
        if let Some(peer) = sender {
            self.ban(task, peer, Fault::Corrupt, Now::MAX, actions);
        }
        let pieces = std::iter::once(piece).collect();
        self.report_failure(task, pieces, sender, Fault::Corrupt, actions);
    }

    /// A request need not bring `piece` any more.
    fn relieve(&mut self, id: RequestId, piece: u32, actions: &mut Vec<Action>) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if !request.left.remove(piece) {
            return;
        }
        if let Some(link) = request.peer.and_then(|peer| self.links.get_mut(&peer)) {
            link.unanswered = link.unanswered.saturating_sub(1);
        }
        if request.left.is_empty() {
            self.requests.remove(&id);
            actions.push(Action::Abandon { request: id });
        }
    }

    /// A request brings nothing more. What it owes is wanted still.
    fn ended(&mut self, now: Now, id: RequestId, fault: Fault, actions: &mut Vec<Action>) {
        let Some(request) = self.requests.remove(&id) else { return };
        let Request { task, peer, mut left, asked, .. } = request;
        let Some(download) = self.downloads.get_mut(&task) else { return };
        download.take_back(now, &left, id);
        match peer {
            None => {
                download.leased.remove_all(&left);
                if fault == Fault::Refused {
                    download.origin = false;
                    let leased = std::mem::take(&mut download.leased);
                    left.insert_all(&leased.intersection(&download.all_waiting()));
                }
                // Requests that were under way together fail for one reason: only the first counts.
                if asked >= self.origin_not_before {
                    let factor = 1 << self.origin_failures.min(5);
                    self.origin_failures = (self.origin_failures + 1).min(5);
                    self.origin_not_before = now + self.limits.origin_backoff * factor;
                }
            }
            Some(peer) => {
                if let Some(assigned) = download.assigned.get_mut(&peer) {
                    assigned.remove_all(&left);
                }
                let holder = download.holders.entry(peer).or_default();
                match fault {
                    Fault::Absent => holder.lacks(now + self.limits.penalty, &left),
                    Fault::Corrupt => self.ban(task, peer, fault, Now::MAX, actions),
                    Fault::Refused => {
                        self.ban(task, peer, fault, now + self.limits.refusal, actions);
                    }
                    Fault::Gone | Fault::Slow => {}
                }
                let link = self.links.entry(peer).or_default();
                link.unanswered = link.unanswered.saturating_sub(left.len());
                if matches!(fault, Fault::Gone | Fault::Slow) {
                    if id >= link.counts_from || link.not_before <= now {
                        let next = RequestId(self.next_request);
                        link.punish(now, next, self.limits.penalty, self.limits.rest);
                    }
                    // Nor does it bring what it hasn't been asked for yet.
                    if let Some(download) = self.downloads.get_mut(&task)
                        && let Some(assigned) = download.assigned.remove(&peer)
                    {
                        left.insert_all(&assigned.intersection(&download.all_waiting()));
                    }
                }
            }
        }
        self.report_failure(task, left, peer, fault, actions);
    }

    /// The peer isn't asked for the task, nor for anything after several wrong pieces.
    fn ban(
        &mut self,
        task: TaskId,
        peer: Peer,
        fault: Fault,
        until: Now,
        actions: &mut Vec<Action>,
    ) {
        let known = self.bans.entry(task).or_default().entry(peer).or_default();
        *known = until.max(*known);
        if self.bans.len() > BANS {
            self.bans.pop_first();
        }
        let link = self.links.entry(peer).or_default();
        link.wrong += u32::from(fault == Fault::Corrupt);
        if link.wrong >= WRONG_PIECES {
            self.quarantined.insert(peer);
        }
        let everywhere = self.quarantined.contains(&peer);
        for (other, download) in &mut self.downloads {
            if everywhere || *other == task {
                let known = download.banned.entry(peer).or_default();
                *known = if everywhere { Now::MAX } else { until.max(*known) };
            }
        }
        let concerns = |other: &TaskId| everywhere || *other == task;
        self.forsake(peer, fault, concerns, actions);
    }

    /// Nothing more comes from the peer: what it was to give and wasn't asked for goes back.
    fn forsake(
        &mut self,
        peer: Peer,
        fault: Fault,
        concerns: impl Fn(&TaskId) -> bool,
        actions: &mut Vec<Action>,
    ) {
        let mut unasked = Vec::new();
        for (task, download) in self.downloads.iter_mut().filter(|(task, _)| concerns(task)) {
            download.holders.remove(&peer);
            let assigned = download.assigned.remove(&peer).unwrap_or_default();
            unasked.push((*task, download.all_waiting().intersection(&assigned)));
        }
        for (task, pieces) in unasked {
            self.report_failure(task, pieces, Some(peer), fault, actions);
        }
    }

    fn lost(&mut self, now: Now, peer: Peer, actions: &mut Vec<Action>) {
        self.end_all(now, peer, Fault::Gone, actions);
        if let Some(link) = self.links.get_mut(&peer) {
            link.up = false;
            // If it has just failed, this is the same failure.
            if link.not_before <= now {
                let next = RequestId(self.next_request);
                link.punish(now, next, self.limits.penalty, self.limits.rest);
            }
        }
        if self.links.len() > LINKS {
            self.links.retain(|_, link| link.up || link.wrong > 0 || link.unanswered > 0);
        }
        self.forsake(peer, Fault::Gone, |_| true, actions);
    }

    /// Ends every request to `peer`.
    fn end_all(&mut self, now: Now, peer: Peer, fault: Fault, actions: &mut Vec<Action>) {
        let of_peer = self.requests.iter().filter(|(_, request)| request.peer == Some(peer));
        let requests: Vec<_> = of_peer.map(|(id, _)| *id).collect();
        for request in requests {
            actions.push(Action::Abandon { request });
            self.ended(now, request, fault, actions);
        }
    }
}

#[cfg(test)]
mod tests;
