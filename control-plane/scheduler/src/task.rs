//! One task: who has what, who lacks what, what is on its way, and the counts that decisions are made from.
//!
//! Owns: the peers' sets, copies and wants per zone and overall. Does not own: links and readiness across tasks
//! (see [`crate::node`]), the choice of who gets what (see [`crate::matching`]).
//!
//! Invariants:
//! - A piece is in at most one of a peer's `have`, `lack` and fetches.
//! - `copies` count unmuted holders and fetches; `lackers` count peers in whose `lack` the piece is.
//! - `orphans` are the pieces with lackers and without copies; a zone's `imports` those with lackers and without
//!   copies in the zone that somebody elsewhere holds.

mod changes;

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use skimmer_proto::{PieceSet, TaskId};

use crate::bits::{Bits, Matrix, Words};
use crate::event::{Class, NodeId, Now, Shape};
use crate::fetch::Fetch;
use crate::rarity::Rarity;
use crate::view::Decision;

/// A node's part in a task.
#[derive(Debug)]
pub struct Peer {
    pub node: u32,
    pub id: NodeId,
    /// Index into [`Task::zones`].
    pub zone: usize,
    pub have: PieceSet,
    /// Wanted, and not on its way.
    pub lack: PieceSet,
    /// Of `lack` and the fetches, what a reader waits for.
    pub fault: PieceSet,
    /// Of the rest.
    pub class: Class,
    /// It may be leased pieces of the origin, by its own word since the origin last refused it.
    pub origin: bool,
    /// How often the origin has refused it since a lease of it was carried out.
    pub refusals: u32,
    /// Until when it isn't sent there again, whatever it says.
    pub refused_until: Now,
    pub fetches: Vec<Fetch>,
    /// The children that fetch from it, one entry a fetch.
    pub children: Vec<u32>,
    /// Nodes that it failed to fetch from.
    pub avoid: Vec<Avoided>,
    /// Nobody fetches from it in this task.
    pub muted: bool,
    /// Until when, if it isn't for good.
    pub muted_until: Option<Now>,
    /// How often that was so.
    pub mutes: u32,
    /// Nodes that have complained about it.
    pub complaints: Vec<u32>,
    pub leases: u32,
    /// Of a graph.
    pub neighbours: Vec<u32>,
    /// It counts in the task's `wanting`.
    pub wanting: bool,
    /// And in its `rate`.
    pub rate: u64,
    /// When it was last given something to do, or told that it will be.
    pub told: Now,
    /// It had nothing on its way when overdue transfers were last looked for.
    pub starving: bool,
}

impl Peer {
    pub fn avoids(&self, node: u32, now: Now) -> bool {
        self.avoid.iter().any(|avoided| avoided.node == node && avoided.until > now)
    }

    pub fn may_lease(&self, now: Now) -> bool {
        self.origin && self.refused_until <= now
    }

    pub fn wants(&self) -> bool {
        !self.lack.is_empty() || !self.fetches.is_empty()
    }
}

/// A parent that a child isn't sent to for a while.
#[derive(Clone, Copy, Debug)]
pub struct Avoided {
    pub node: u32,
    pub until: Now,
    /// Failures so far.
    pub times: u32,
}

#[derive(Debug)]
pub struct Zone {
    pub number: u32,
    /// The words of slots that are this zone's.
    pub words: Words,
    free: Vec<u32>,
    pub rarity: Rarity,
    pub lackers: Vec<u32>,
    /// Pieces with lackers.
    pub lacked: PieceSet,
    pub imports: PieceSet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Pieces are assigned one by one.
    Direct,
    /// Nodes pick among neighbours.
    Graph,
}

#[derive(Debug)]
pub struct Task {
    pub id: TaskId,
    pub shape: Shape,
    /// Pieces in an assignment.
    pub run: u32,
    pub mode: Mode,
    /// Anybody wants something.
    pub active: bool,
    pub peers: Vec<Option<Peer>>,
    pub zones: Vec<Zone>,
    pub count: u32,
    pub wanting: u32,
    /// Over all zones.
    copies: Vec<u32>,
    holders: Vec<u32>,
    lackers: Vec<u32>,
    pub orphans: PieceSet,
    /// Who has and who lacks each piece; both kept for direct assignment only.
    pub holding: Matrix,
    pub lacking: Matrix,
    /// Parents that may be given a transfer.
    pub ready: Bits,
    /// Children that may, by whether all they want is for the background.
    pub hungry: [Bits; 2],
    /// Parents that are many times slower than the others.
    pub slow: Bits,
    /// Pieces that each slot's peer has or is getting.
    pub held: Vec<u32>,
    /// Peers that avoid somebody.
    pub picky: Bits,
    /// Peers of which a reader waits for something.
    pub readers: BTreeSet<u32>,
    /// Nobody can be leased what nobody has, until somebody else wants it or time passes.
    pub barren: bool,
    /// As of the last event.
    pub now: Now,
    /// Where the next search among equals begins.
    pub turn: u32,
    pub leases: u32,
    /// Leases that the origin bears, whatever other tasks have.
    pub leases_most: u32,
    /// Leases that were taken back because they took too long.
    pub leases_overdue: u32,
    /// The shortest time that a piece of the origin took.
    pub lease_best: Option<Duration>,
    pub seeded: bool,
    pub decisions: VecDeque<Decision>,
    /// Pieces that arrived from the origin, and from peers.
    pub from_origin: u64,
    pub from_peers: u64,
    /// Pieces that were assigned across zones.
    pub across: u64,
    /// Of a graph: slots whose neighbours are to be sent.
    pub regraph: Vec<u32>,
    /// Pieces that were leased and lost.
    pub lost: PieceSet,
    /// Assignments that it may need, were it assigned directly, in thousandths per second.
    pub rate: u64,
}

impl Task {
    pub fn new(id: TaskId, shape: Shape, run: u32) -> Self {
        Self {
            id,
            shape,
            run,
            mode: Mode::Direct,
            active: false,
            peers: Vec::new(),
            zones: Vec::new(),
            count: 0,
            wanting: 0,
            copies: Vec::new(),
            holders: Vec::new(),
            lackers: Vec::new(),
            orphans: PieceSet::new(),
            holding: Matrix::default(),
            lacking: Matrix::default(),
            ready: Bits::default(),
            hungry: [Bits::default(), Bits::default()],
            slow: Bits::default(),
            held: Vec::new(),
            picky: Bits::default(),
            readers: BTreeSet::new(),
            barren: false,
            now: Now::ZERO,
            turn: 0,
            leases: 0,
            leases_most: 1,
            leases_overdue: 0,
            lease_best: None,
            seeded: false,
            decisions: VecDeque::new(),
            from_origin: 0,
            from_peers: 0,
            across: 0,
            regraph: Vec::new(),
            lost: PieceSet::new(),
            rate: 0,
        }
    }

    pub fn peer(&self, slot: u32) -> Option<&Peer> {
        self.peers.get(slot as usize)?.as_ref()
    }

    pub fn peer_mut(&mut self, slot: u32) -> Option<&mut Peer> {
        self.peers.get_mut(slot as usize)?.as_mut()
    }

    pub fn slots(&self) -> impl Iterator<Item = (u32, &Peer)> {
        (0..).zip(&self.peers).filter_map(|(slot, peer)| Some((slot, peer.as_ref()?)))
    }

    pub fn is_complete(&self, peer: &Peer) -> bool {
        peer.have.len() == self.shape.pieces
    }

    /// A slot for a node that isn't in the task yet, in its zone's words.
    pub fn add_peer(&mut self, node: u32, id: NodeId, zone: u32) -> u32 {
        let index = self.zones.iter().position(|z| z.number == zone).unwrap_or_else(|| {
            self.zones.push(self.new_zone(zone));
            self.zones.len() - 1
        });
        if self.zones[index].free.is_empty() {
            let word = u32::try_from(self.peers.len() / 64).unwrap_or(u32::MAX);
            self.peers.resize_with(self.peers.len() + 64, || None);
            self.held.resize(self.peers.len(), 0);
            self.picky.grow(self.peers.len() / 64);
            self.zones[index].words.insert(word);
            self.zones[index].free.extend((word * 64..word * 64 + 64).rev());
            self.grow();
        }
        let slot = self.zones[index].free.pop().unwrap_or(0);
        self.peers[slot as usize] = Some(Peer {
            node,
            id,
            zone: index,
            have: PieceSet::new(),
            lack: PieceSet::new(),
            fault: PieceSet::new(),
            class: Class::Background,
            origin: false,
            refusals: 0,
            refused_until: Now::ZERO,
            fetches: Vec::new(),
            children: Vec::new(),
            avoid: Vec::new(),
            muted: false,
            muted_until: None,
            mutes: 0,
            complaints: Vec::new(),
            leases: 0,
            neighbours: Vec::new(),
            wanting: false,
            rate: 0,
            told: Now::ZERO,
            starving: false,
        });
        self.count += 1;
        slot
    }

    /// Forgets a peer whose sets and fetches are empty.
    pub fn remove_peer(&mut self, slot: u32) {
        if let Some(peer) = self.peers.get_mut(slot as usize).and_then(Option::take) {
            self.zones[peer.zone].free.push(slot);
            self.held[slot as usize] = 0;
            self.picky.set(slot, false);
            self.readers.remove(&slot);
            self.count -= 1;
            if self.active {
                self.ready.set(slot, false);
                self.slow.set(slot, false);
                self.hungry[0].set(slot, false);
                self.hungry[1].set(slot, false);
            }
        }
    }

    /// Builds the counts of a task that somebody begins to want something of.
    pub fn activate(&mut self) {
        let pieces = self.shape.pieces;
        self.active = true;
        self.copies = vec![0; pieces as usize];
        self.holders = vec![0; pieces as usize];
        self.lackers = vec![0; pieces as usize];
        self.holding = Matrix::new(pieces);
        self.lacking = Matrix::new(pieces);
        for index in 0..self.zones.len() {
            let (words, free) = (
                std::mem::take(&mut self.zones[index].words),
                std::mem::take(&mut self.zones[index].free),
            );
            let number = self.zones[index].number;
            self.zones[index] = Zone { words, free, ..self.new_zone(number) };
        }
        self.grow();
        for slot in 0..self.peers.len() {
            let slot = u32::try_from(slot).unwrap_or(u32::MAX);
            let Some(peer) = self.peer(slot).filter(|peer| !peer.muted) else { continue };
            let (zone, have) = (peer.zone, peer.have.clone());
            for piece in have.iter() {
                self.note_copy(slot, zone, piece, true);
            }
        }
    }

    /// Drops what only an active task needs.
    pub fn deactivate(&mut self) {
        self.active = false;
        self.mode = Mode::Direct;
        self.seeded = false;
        self.barren = false;
        self.readers = BTreeSet::new();
        self.orphans = PieceSet::new();
        self.lost = PieceSet::new();
        (self.copies, self.holders, self.lackers) = (Vec::new(), Vec::new(), Vec::new());
        (self.holding, self.lacking) = (Matrix::default(), Matrix::default());
        (self.ready, self.slow) = (Bits::default(), Bits::default());
        self.hungry = [Bits::default(), Bits::default()];
        for zone in &mut self.zones {
            zone.rarity = Rarity::default();
            zone.lackers = Vec::new();
            (zone.lacked, zone.imports) = (PieceSet::new(), PieceSet::new());
        }
        for peer in self.peers.iter_mut().flatten() {
            peer.neighbours = Vec::new();
        }
    }

    /// Drops the matrices: nodes pick among neighbours from here on.
    pub fn become_graph(&mut self) {
        self.mode = Mode::Graph;
        (self.holding, self.lacking) = (Matrix::default(), Matrix::default());
    }

    fn new_zone(&self, number: u32) -> Zone {
        let pieces = if self.active { self.shape.pieces } else { 0 };
        Zone {
            number,
            words: Words::default(),
            free: Vec::new(),
            rarity: Rarity::new(pieces),
            lackers: vec![0; pieces as usize],
            lacked: PieceSet::new(),
            imports: PieceSet::new(),
        }
    }

    fn grow(&mut self) {
        if !self.active {
            return;
        }
        let words = self.peers.len() / 64;
        if self.mode == Mode::Direct {
            self.holding.grow(words);
            self.lacking.grow(words);
        }
        self.ready.grow(words);
        self.slow.grow(words);
        self.hungry[0].grow(words);
        self.hungry[1].grow(words);
    }
}
