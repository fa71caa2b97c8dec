//! One task's download: what is wanted, what flies, who has what.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use skimmer_cache::Class;
use skimmer_proto::PieceSet;

use super::event::{Now, Peer, RequestId, Shape};

/// Pieces are in exactly one of `waiting`, `flying`, `landed`, or not wanted (any more).
#[derive(Debug)]
pub struct Download {
    pub shape: Shape,
    /// The node may read the origin.
    pub origin: bool,
    /// Wanted and not asked for, in the order of [`Class::ALL`].
    pub waiting: [PieceSet; 3],
    pub flying: BTreeMap<u32, Flying>,
    /// Received, not on disk yet; from whom, if not from the origin.
    pub landed: BTreeMap<u32, Option<Peer>>,
    /// On disk, not reported yet.
    pub stored: PieceSet,
    /// What the scheduler was told to be wanted, and neither to have arrived nor to be wanted no more.
    pub told: PieceSet,
    /// When more may be reported.
    pub report_at: Now,
    /// By the scheduler's word; stays until the piece is here or the parent fails.
    pub assigned: BTreeMap<Peer, PieceSet>,
    pub leased: PieceSet,
    /// Set once the scheduler has left the choice to this node.
    pub neighbours: Option<BTreeSet<Peer>>,
    pub holders: BTreeMap<Peer, Holder>,
    /// Peers that aren't asked for this task, and until when: wrong bytes, or no right.
    pub banned: BTreeMap<Peer, Now>,
    /// When something last came from the scheduler or a transfer.
    pub heard: Now,
    /// When each class began to wait.
    pub since: [Now; 3],
}

#[derive(Debug)]
pub struct Flying {
    pub class: Class,
    /// One, or two where a second peer is asked for the same piece.
    pub requests: Vec<RequestId>,
    pub since: Now,
}

/// What is known of a peer within the task.
#[derive(Debug, Default)]
pub struct Holder {
    pub pieces: PieceSet,
    /// It says that it is fetching.
    pub active: bool,
    /// When it was first and last asked what it has.
    pub asked_first: Option<Now>,
    pub asked_last: Option<Now>,
    /// Since when an answer of it is awaited, and when it last gave one.
    pub awaited: Option<Now>,
    pub answered: Option<Now>,
    /// On their way to it from the origin.
    pub coming: PieceSet,
    /// When its map last grew, or it first said that it is active.
    pub grew: Now,
    /// What it was asked for and didn't have, whatever it says, and until when that is believed.
    pub absent: PieceSet,
    pub absent_until: Now,
}

impl Holder {
    /// It was asked for these and hasn't got them.
    pub fn lacks(&mut self, until: Now, pieces: &PieceSet) {
        self.pieces.remove_all(pieces);
        self.absent.insert_all(pieces);
        self.absent_until = until;
    }
}

impl Download {
    pub fn new(now: Now, shape: Shape, origin: bool) -> Self {
        Self {
            shape,
            origin,
            waiting: Default::default(),
            flying: BTreeMap::new(),
            landed: BTreeMap::new(),
            stored: PieceSet::new(),
            told: PieceSet::new(),
            report_at: now,
            assigned: BTreeMap::new(),
            leased: PieceSet::new(),
            neighbours: None,
            holders: BTreeMap::new(),
            banned: BTreeMap::new(),
            heard: now,
            since: [now; 3],
        }
    }

    /// Adds to what is wanted; what is new or has become more urgent.
    pub fn want(&mut self, now: Now, pieces: &PieceSet, class: Class) -> PieceSet {
        let mut news = PieceSet::new();
        let end = self.shape.pieces;
        for piece in pieces.iter().take_while(|piece| *piece < end) {
            self.landed.remove(&piece);
            self.stored.remove(piece);
            if let Some(flying) = self.flying.get_mut(&piece) {
                if class < flying.class {
                    flying.class = class;
                    news.insert(piece);
                }
                continue;
            }
            let urgent = class as usize;
            if self.waiting[..=urgent].iter().any(|waiting| waiting.contains(piece)) {
                continue;
            }
            for less in &mut self.waiting[urgent + 1..] {
                less.remove(piece);
            }
            self.wait(now, piece, class);
            news.insert(piece);
        }
        news
    }

    fn wait(&mut self, now: Now, piece: u32, class: Class) {
        if self.waiting[class as usize].is_empty() {
            self.since[class as usize] = now;
        }
        self.waiting[class as usize].insert(piece);
    }

    /// Pieces go out with a request.
    pub fn fly(&mut self, now: Now, pieces: &PieceSet, class: Class, request: RequestId) {
        for piece in pieces.iter() {
            for waiting in &mut self.waiting {
                waiting.remove(piece);
            }
            let flying = self.flying.entry(piece);
            let flying =
                flying.or_insert_with(|| Flying { class, requests: Vec::new(), since: now });
            flying.requests.push(request);
        }
    }

    /// Pieces won't come with this request; what is on no other request waits again.
    pub fn take_back(&mut self, now: Now, pieces: &PieceSet, request: RequestId) {
        for piece in pieces.iter() {
            let Some(flying) = self.flying.get_mut(&piece) else { continue };
            flying.requests.retain(|other| *other != request);
            if flying.requests.is_empty() {
                let class = flying.class;
                self.flying.remove(&piece);
                self.wait(now, piece, class);
            }
        }
    }

    /// A piece is here: nobody need fetch it any more. The requests that still carry it.
    pub fn settle(&mut self, piece: u32) -> Vec<RequestId> {
        for waiting in &mut self.waiting {
            waiting.remove(piece);
        }
        self.assigned.retain(|_, pieces| {
            pieces.remove(piece);
            !pieces.is_empty()
        });
        self.leased.remove(piece);
        self.flying.remove(&piece).map(|flying| flying.requests).unwrap_or_default()
    }

    pub fn is_waiting(&self) -> bool {
        self.waiting.iter().any(|waiting| !waiting.is_empty())
    }

    /// Nothing is wanted, and nothing is to be told.
    pub fn is_over(&self) -> bool {
        !self.is_waiting()
            && self.flying.is_empty()
            && self.landed.is_empty()
            && self.stored.is_empty()
            && self.told.is_empty()
    }

    /// Everything wanted, by class.
    pub fn wanted(&self) -> [PieceSet; 3] {
        let mut wanted = self.waiting.clone();
        for (piece, flying) in &self.flying {
            wanted[flying.class as usize].insert(*piece);
        }
        wanted
    }

    pub fn all_waiting(&self) -> PieceSet {
        let mut all = PieceSet::new();
        self.waiting.iter().for_each(|waiting| all.insert_all(waiting));
        all
    }

    pub fn all_wanted(&self) -> PieceSet {
        let mut all = PieceSet::new();
        self.wanted().iter().for_each(|wanted| all.insert_all(wanted));
        all
    }

    /// Whether the scheduler has said from where every waiting piece of a class may come.
    pub fn is_directed(&self, class: Class) -> bool {
        let mut rest = self.waiting[class as usize].clone();
        rest.remove_all(&self.leased);
        for pieces in self.assigned.values() {
            rest.remove_all(pieces);
        }
        rest.is_empty()
    }

    pub fn has(&mut self, now: Now, peer: Peer, pieces: &PieceSet) -> &mut Holder {
        let holder = self.holders.entry(peer).or_default();
        if holder.absent_until <= now {
            holder.absent = PieceSet::new();
        }
        let pieces = pieces.difference(&holder.absent);
        holder.coming.remove_all(&pieces);
        if !holder.pieces.contains_all(&pieces) {
            holder.pieces.insert_all(&pieces);
            holder.grew = now;
        }
        holder
    }

    /// Neighbours that aren't known to have all of these, and answer. Who hasn't answered is asked again after `pause`.
    pub fn lacking(&self, now: Now, pieces: &PieceSet, pause: Duration) -> Vec<Peer> {
        let fits = |holder: &Holder| {
            let busy =
                holder.awaited.is_some() && holder.asked_last.is_some_and(|at| at + pause > now);
            !busy && !holder.pieces.contains_all(pieces)
        };
        let fits = |peer: &Peer| self.holders.get(peer).is_none_or(fits);
        let named = self.neighbours.iter().flatten();
        named.filter(|peer| !self.is_banned(peer, now) && fits(peer)).copied().collect()
    }

    /// A peer is asked what it has.
    pub fn asks_haves(&mut self, now: Now, peer: Peer) {
        let holder = self.holders.entry(peer).or_default();
        holder.asked_first.get_or_insert(now);
        holder.asked_last = Some(now);
        holder.awaited.get_or_insert(now);
    }

    pub fn is_banned(&self, peer: &Peer, now: Now) -> bool {
        self.banned.get(peer).is_some_and(|until| *until > now)
    }
}
