//! Starting requests: by the scheduler's word, or by this node's own choice.

use std::collections::{BTreeMap, BTreeSet};

use skimmer_cache::Class;
use skimmer_proto::{PieceSet, TaskId};

use super::download::Download;
use super::event::{Action, Now, Peer, RequestId, Why};
use super::{Planner, Request};

/// Stripes that a blob is cut into for its owners, at most.
const STRIPES: u32 = 64;

/// Longest stripe in pieces.
const STRIPE_PIECES: u32 = 16;

/// Peers without a link that are asked at a time whether they are there again.
const REDIALLED: usize = 16;

/// Failures in a row after which the origin doesn't count as one.
const ORIGIN_FAILS: u32 = 2;

/// Without a right to the origin, and without a word, a node looks around after so many times the
/// patience for a fault.
const FORSAKEN: u32 = 5;

/// The order in which a node chooses pieces: members in order of importance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rarity {
    holders: u32,
    tie: u64,
    piece: u32,
}

/// The order in which a node chooses peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Fitness {
    penalised: bool,
    unanswered: u32,
    tie: u64,
    peer: Peer,
}

impl Planner {
    /// Starts whatever may start, most urgent first; among equals, tasks with less in flight first.
    pub(super) fn fill(&mut self, now: Now, actions: &mut Vec<Action>) {
        let open = self.downloads.iter().filter(|(_, d)| d.is_waiting() || !d.flying.is_empty());
        let mut order: Vec<_> = open.map(|(task, d)| (d.flying.len(), *task)).collect();
        order.sort_unstable();
        for (_, task) in &order {
            self.probe(now, *task, actions);
        }
        for class in Class::ALL {
            for (_, task) in &order {
                self.fill_leased(now, *task, class, actions);
                self.fill_assigned(now, *task, class, actions);
                self.fill_chosen(now, *task, class, actions);
            }
        }
    }

    fn fill_leased(&mut self, now: Now, task: TaskId, class: Class, actions: &mut Vec<Action>) {
        while let Some(download) = self.downloads.get(&task) {
            let ready = download.waiting[class as usize].intersection(&download.leased);
            let Some(run) = self.origin_run(now, download, &ready, class) else { return };
            self.read_origin(now, task, run, class, Why::Leased, actions);
        }
    }

    fn fill_assigned(&mut self, now: Now, task: TaskId, class: Class, actions: &mut Vec<Action>) {
        let Some(download) = self.downloads.get(&task) else { return };
        let parents: Vec<Peer> = download.assigned.keys().copied().collect();
        for parent in parents {
            let Some(download) = self.downloads.get(&task) else { return };
            let Some(assigned) = download.assigned.get(&parent) else { continue };
            let ready = download.waiting[class as usize].intersection(assigned);
            let unanswered = self.links.get(&parent).map_or(0, |link| link.unanswered);
            let room = self.limits.assigned_pieces.saturating_sub(unanswered);
            let pieces: PieceSet = ready.iter().take(room as usize).collect();
            if !pieces.is_empty() {
                self.ask(now, task, parent, pieces, class, actions);
            }
        }
    }

    /// What the node chooses itself: faults always, everything else where the scheduler leaves it to
    /// the node, or is gone or silent.
    fn fill_chosen(&mut self, now: Now, task: TaskId, class: Class, actions: &mut Vec<Action>) {
        let Some(download) = self.downloads.get(&task) else { return };
        if download.waiting[class as usize].is_empty() {
            return;
        }
        let silent = self.is_silent(now, download, class);
        let alone = self.is_left_alone(now, download);
        if !alone && download.neighbours.is_none() && class != Class::Fault {
            return;
        }
        self.choose(now, task, class, alone, actions);
        if !self.scheduler {
            self.fill_unled(now, task, class, actions);
        } else if silent {
            let why = if class == Class::Fault { Why::ReaderWaits } else { Why::SchedulerSilent };
            self.fill_origin(now, task, class, why, |_| true, actions);
        }
    }

    /// Whether a scheduler that is there has left pieces of a class without any direction for too
    /// long, while nothing came.
    fn is_silent(&self, now: Now, download: &Download, class: Class) -> bool {
        let since = download.since[class as usize];
        let (patience, since) = match class {
            Class::Fault => (self.limits.fault_patience, since),
            _ => (self.limits.patience, since.max(download.heard)),
        };
        self.scheduler
            && now.saturating_sub(since) >= patience
            && (class == Class::Fault || download.flying.is_empty())
            && !download.is_directed(class)
    }

    /// Whether this node has to look for holders itself: there is no scheduler, it says nothing, or all
    /// that it can give is an origin that fails.
    fn is_left_alone(&self, now: Now, download: &Download) -> bool {
        let unheard = now.saturating_sub(download.heard) >= self.limits.fault_patience * FORSAKEN;
        !self.scheduler
            || !download.origin && download.flying.is_empty() && unheard
            || self.origin_failures >= ORIGIN_FAILS
            || Class::ALL.into_iter().any(|class| {
                !download.waiting[class as usize].is_empty() && self.is_silent(now, download, class)
            })
    }

    /// Rarest first among the peers that this node may ask, or, if it is `alone`, among all.
    fn choose(
        &mut self,
        now: Now,
        task: TaskId,
        class: Class,
        alone: bool,
        actions: &mut Vec<Action>,
    ) {
        let Some(download) = self.downloads.get(&task) else { return };
        let fault = class == Class::Fault;
        let mut peers = self.choosable(now, download, fault || alone);
        if alone && self.may_read_origin(now, download) {
            // Better there than from those that have failed.
            peers.retain(|peer| !self.is_penalised(now, peer));
        }
        let mut ready = download.waiting[class as usize].clone();
        if !fault && self.origin_failures < ORIGIN_FAILS {
            // These have their way already.
            ready.remove_all(&download.leased);
        }
        let mut order: Vec<Rarity> = ready
            .iter()
            .filter_map(|piece| {
                let holders = peers.iter().filter(|peer| has(download, peer, piece)).count();
                let holders = u32::try_from(holders).ok().filter(|holders| *holders > 0)?;
                let tie = mix(self.seed, u64::from(piece));
                Some(Rarity { holders, tie, piece })
            })
            .collect();
        order.sort_unstable();
        let limits = &self.limits;
        let (most, total) = match (fault, alone) {
            (true, _) => (limits.assigned_pieces, limits.chosen_total),
            (false, true) => (limits.chosen_pieces, limits.chosen_total),
            (false, false) => (limits.neighbour_pieces, limits.neighbour_total),
        };
        let flying = u32::try_from(download.flying.len()).unwrap_or(u32::MAX);
        let room = total.saturating_sub(flying) as usize;
        let room = if fault { order.len() } else { room };
        let mut asks: BTreeMap<Peer, PieceSet> = BTreeMap::new();
        let mut planned = 0;
        for Rarity { piece, .. } in order {
            if planned == room {
                break;
            }
            let Some(download) = self.downloads.get(&task) else { return };
            let holders = peers.iter().filter(|peer| has(download, peer, piece)).copied();
            let Some(peer) = self.best(now, &holders.collect(), most, piece) else { continue };
            planned += 1;
            self.links.entry(peer).or_default().unanswered += 1;
            asks.entry(peer).or_default().insert(piece);
        }
        for (peer, pieces) in asks {
            self.ask_counted(now, task, peer, pieces, class, actions);
        }
    }

    /// Holders that may be asked; those that the scheduler named, unless any will do.
    fn choosable(&self, now: Now, download: &Download, any: bool) -> BTreeSet<Peer> {
        let named = download.neighbours.as_ref().filter(|_| !any);
        let holders = download.holders.keys();
        let usable = |peer: &&Peer| {
            !download.is_banned(peer, now) && named.is_none_or(|named| named.contains(peer))
        };
        holders.filter(usable).copied().collect()
    }

    fn is_penalised(&self, now: Now, peer: &Peer) -> bool {
        self.links.get(peer).is_some_and(|link| link.not_before > now)
    }

    fn may_read_origin(&self, now: Now, download: &Download) -> bool {
        download.origin && now >= self.origin_not_before
    }

    /// The peer to ask, of those that have it: one with fewer than `most` unanswered pieces.
    pub(super) fn best(
        &self,
        now: Now,
        peers: &BTreeSet<Peer>,
        most: u32,
        piece: u32,
    ) -> Option<Peer> {
        let fitness = |peer: &Peer| {
            let (unanswered, not_before) =
                self.links.get(peer).map_or((0, now), |link| (link.unanswered, link.not_before));
            let tie = mix(self.seed ^ u64::from(piece), first_word(peer));
            Fitness { penalised: not_before > now, unanswered, tie, peer: *peer }
        };
        let rested = |peer: &&Peer| self.links.get(peer).is_none_or(|link| link.rest_until <= now);
        let fit = peers.iter().filter(rested).map(fitness).filter(|fit| fit.unanswered < most);
        fit.min().map(|fitness| fitness.peer)
    }

    /// Asks the peers of a task what they have, from time to time: the neighbours, or whoever is linked
    /// if this node is left alone.
    fn probe(&mut self, now: Now, task: TaskId, actions: &mut Vec<Action>) {
        let Some(download) = self.downloads.get(&task) else { return };
        let alone = self.is_left_alone(now, download);
        let known: BTreeSet<Peer> = if alone {
            let up = self.links.iter().filter(|(_, link)| link.up);
            let away = self.links.iter().filter(|(_, link)| !link.up && link.not_before <= now);
            let linked = up.chain(away.take(REDIALLED)).map(|(peer, _)| *peer);
            linked.chain(download.holders.keys().copied()).collect()
        } else {
            download.neighbours.clone().unwrap_or_default()
        };
        let Some(download) = self.downloads.get_mut(&task) else { return };
        let pieces = download.shape.pieces;
        for peer in known {
            if download.is_banned(&peer, now) {
                continue;
            }
            let holder = download.holders.entry(peer).or_default();
            let due = holder.asked_last.is_none_or(|at| at + self.limits.probe <= now);
            if due && holder.pieces.len() < pieces {
                download.asks_haves(now, peer);
                actions.push(Action::Probe { task, peer });
            }
        }
    }

    /// Without a scheduler: pieces that no peer has are read from the origin by their stripe's owner.
    fn fill_unled(&mut self, now: Now, task: TaskId, class: Class, actions: &mut Vec<Action>) {
        let Some(download) = self.downloads.get(&task) else { return };
        if self.is_answer_due(now, download, class) {
            return;
        }
        let mut owners = vec![self.me];
        for (peer, holder) in &download.holders {
            let fresh = holder.grew + self.limits.owner_progress > now;
            let asked = holder.asked_first.unwrap_or(now);
            let pending = asked + self.limits.owner_answer > now;
            let up = self.links.get(peer).is_some_and(|link| link.up);
            if up && !download.is_banned(peer, now) && ((holder.active && fresh) || pending) {
                owners.push(*peer);
            }
        }
        let (me, alone) = (self.me, owners.len() == 1);
        let why = match class {
            _ if alone => Why::Alone,
            Class::Fault => Why::ReaderWaits,
            _ => Why::StripeOwner,
        };
        let stripe = (download.shape.pieces / STRIPES).clamp(1, STRIPE_PIECES);
        let is_mine = |piece: u32| {
            let stripe = u64::from(piece / stripe);
            let score = |owner: &&Peer| (weight(&task, stripe, owner), **owner);
            class == Class::Fault || alone || owners.iter().max_by_key(score) == Some(&me)
        };
        self.fill_origin(now, task, class, why, is_mine, actions);
    }

    /// Whether what peers have is not known yet: before that the origin isn't read without a lease,
    /// as they may have what was fetched already.
    fn is_answer_due(&self, now: Now, download: &Download, class: Class) -> bool {
        let patience = match class {
            Class::Fault => self.limits.fault_patience,
            _ => self.limits.owner_answer,
        };
        download.holders.iter().any(|(peer, holder)| {
            let awaited = holder.awaited.is_some_and(|since| since + patience > now);
            let stale = holder.answered.is_none_or(|at| at + self.limits.probe * 2 < now);
            awaited && stale && !download.is_banned(peer, now)
        })
    }

    /// What of the task this node is getting from the origin, or has got and is writing.
    pub fn coming(&self, task: &TaskId) -> PieceSet {
        let of_task = |request: &&Request| request.peer.is_none() && request.task == *task;
        let mut coming = PieceSet::new();
        for request in self.requests.values().filter(of_task) {
            coming.insert_all(&request.left);
        }
        if let Some(download) = self.downloads.get(task) {
            coming.insert_all(&download.leased.intersection(&download.all_waiting()));
            download.landed.keys().for_each(|piece| _ = coming.insert(*piece));
        }
        coming
    }

    /// What other nodes are getting from the origin, as long as they get on with it.
    fn coming_to_others(&self, now: Now, download: &Download) -> PieceSet {
        let mut coming = PieceSet::new();
        for (peer, holder) in &download.holders {
            let since = holder.grew.max(holder.asked_first.unwrap_or(Now::ZERO));
            let lively = since + self.limits.owner_progress > now;
            if lively && self.links.get(peer).is_some_and(|link| link.up) {
                coming.insert_all(&holder.coming);
            }
        }
        coming
    }

    /// Whoever was lost when the origin was may be there again too, with what this node lacks.
    pub(super) fn origin_is_back(&mut self, now: Now) {
        if std::mem::take(&mut self.origin_failures) == 0 {
            return;
        }
        let away = self.links.iter_mut().filter(|(_, link)| !link.up);
        away.for_each(|(_, link)| link.not_before = link.not_before.min(now));
        for holder in self.downloads.values_mut().flat_map(|d| d.holders.values_mut()) {
            (holder.awaited, holder.asked_last) = (None, None);
        }
    }

    /// Reads waiting pieces from the origin that no peer that serves well is known to have.
    fn fill_origin(
        &mut self,
        now: Now,
        task: TaskId,
        class: Class,
        why: Why,
        is_mine: impl Fn(u32) -> bool,
        actions: &mut Vec<Action>,
    ) {
        while let Some(download) = self.downloads.get(&task) {
            let waiting = download.waiting[class as usize].iter();
            let mut peers = self.choosable(now, download, true);
            peers.retain(|peer| !self.is_penalised(now, peer));
            let nobody = |piece: &u32| !peers.iter().any(|peer| has(download, peer, *piece));
            let mut ready: PieceSet = waiting.filter(|p| is_mine(*p)).filter(nobody).collect();
            if class != Class::Fault {
                ready.remove_all(&self.coming_to_others(now, download));
            }
            if class != Class::Fault && self.origin_failures > 0 {
                // One that has failed is tried with one piece.
                let busy = self.requests.values().any(|request| request.peer.is_none());
                ready = ready.iter().take(usize::from(!busy)).collect();
            }
            let Some(run) = self.origin_run(now, download, &ready, class) else { return };
            self.read_origin(now, task, run, class, why, actions);
        }
    }

    /// The first of `ready` that one request to the origin may carry, if there may be one now.
    pub(super) fn origin_run(
        &self,
        now: Now,
        download: &Download,
        ready: &PieceSet,
        class: Class,
    ) -> Option<PieceSet> {
        let more = if class == Class::Fault { 2 } else { 0 };
        let busy = self.requests.values().filter(|request| request.peer.is_none()).count();
        let may = self.may_read_origin(now, download) && busy < self.limits.origin_requests + more;
        let run = ready.runs().next().filter(|_| may)?;
        let longest = (self.limits.origin_run_bytes / download.shape.piece_len.max(1)).max(1);
        let longest = u32::try_from(longest).unwrap_or(u32::MAX);
        let end = run.end.min(run.start.saturating_add(longest));
        Some(std::iter::once(run.start..end).collect())
    }

    pub(super) fn read_origin(
        &mut self,
        now: Now,
        task: TaskId,
        pieces: PieceSet,
        class: Class,
        why: Why,
        actions: &mut Vec<Action>,
    ) {
        let request = self.open(now, task, None, &pieces, class);
        actions.push(Action::Origin { request, task, pieces, class, why });
    }

    /// [`Self::ask`] for pieces that count as unanswered already.
    pub(super) fn ask_counted(
        &mut self,
        now: Now,
        task: TaskId,
        peer: Peer,
        pieces: PieceSet,
        class: Class,
        actions: &mut Vec<Action>,
    ) {
        let link = self.links.entry(peer).or_default();
        link.unanswered = link.unanswered.saturating_sub(pieces.len());
        self.ask(now, task, peer, pieces, class, actions);
    }

    fn ask(
        &mut self,
        now: Now,
        task: TaskId,
        peer: Peer,
        pieces: PieceSet,
        class: Class,
        actions: &mut Vec<Action>,
    ) {
        let request = self.open(now, task, Some(peer), &pieces, class);
        let link = self.links.entry(peer).or_default();
        if link.unanswered == 0 {
            link.free_since = now;
        }
        link.unanswered += pieces.len();
        actions.push(Action::Ask { request, task, peer, pieces, class });
    }

    fn open(
        &mut self,
        now: Now,
        task: TaskId,
        peer: Option<Peer>,
        pieces: &PieceSet,
        class: Class,
    ) -> RequestId {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        if let Some(download) = self.downloads.get_mut(&task) {
            download.fly(now, pieces, class, id);
        }
        let left = pieces.clone();
        self.requests.insert(id, Request { task, peer, left, class, asked: now });
        id
    }
}

fn has(download: &Download, peer: &Peer, piece: u32) -> bool {
    download.holders.get(peer).is_some_and(|holder| holder.pieces.contains(piece))
}

/// The same on every node: who of several is to fetch a stripe.
fn weight(task: &TaskId, stripe: u64, owner: &Peer) -> u64 {
    let words = |bytes: &[u8; 32]| {
        let (words, _) = bytes.as_chunks::<8>();
        words.iter().fold(stripe, |hash, word| mix(hash, u64::from_le_bytes(*word)))
    };
    mix(words(task.as_bytes()), words(&owner.0))
}

fn first_word(peer: &Peer) -> u64 {
    peer.0.as_chunks::<8>().0.iter().fold(0, |hash, word| mix(hash, u64::from_le_bytes(*word)))
}

/// A well mixed function of two numbers (the finalizer of splitmix64).
const fn mix(a: u64, b: u64) -> u64 {
    let mut x =
        a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b).wrapping_add(0x1234_5678_9abc_def1);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
