//! What a simulated node does with the scheduler's actions.

use std::collections::{BTreeMap, BTreeSet};

use skimmer_proto::PieceSet;
use skimmer_scheduler::{Action, NodeId};

/// The part of a node that decides, for one task.
pub trait Planner {
    /// An action of the scheduler has reached the node.
    fn told(&mut self, action: &Action) -> Vec<Step>;
    /// A piece is on disk.
    fn arrived(&mut self, piece: u32) -> Vec<Step>;
    /// Pieces won't come from there (`None`: the origin).
    fn failed(&mut self, from: Option<NodeId>, pieces: &PieceSet) -> Vec<Step>;
    /// A neighbour has pieces.
    fn peer_has(&mut self, peer: NodeId, pieces: &PieceSet) -> Vec<Step>;
}

/// What a planner wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Ask for pieces; `None`: the origin.
    Fetch { from: Option<NodeId>, pieces: PieceSet },
    /// Whatever of these was asked for isn't wanted from there any more.
    Drop { pieces: PieceSet },
    /// Follow what these nodes have, and nobody else.
    Follow { peers: Vec<NodeId> },
}

/// Fetches what it is told to; among neighbours it takes the rarest piece from the least busy of them.
#[derive(Debug)]
pub struct Simple {
    missing: PieceSet,
    /// From whom pieces are on their way.
    coming: BTreeMap<u32, Option<NodeId>>,
    neighbours: BTreeMap<NodeId, Neighbour>,
    /// Requests to neighbours at a time.
    depth: usize,
    /// Makes ties fall differently on each node.
    salt: u32,
}

#[derive(Debug, Default)]
struct Neighbour {
    have: PieceSet,
    coming: BTreeSet<u32>,
}

/// Requests to one neighbour at a time.
const PER_NEIGHBOUR: usize = 1;

impl Simple {
    pub fn new(missing: PieceSet, salt: u32) -> Self {
        Self { missing, coming: BTreeMap::new(), neighbours: BTreeMap::new(), depth: 4, salt }
    }

    fn release(&mut self, piece: u32) {
        if let Some(Some(from)) = self.coming.remove(&piece)
            && let Some(neighbour) = self.neighbours.get_mut(&from)
        {
            neighbour.coming.remove(&piece);
        }
    }

    /// Rarest first among what free neighbours have.
    fn pick(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        while !self.neighbours.is_empty() && self.coming.len() < self.depth {
            let wanted = |piece: &u32| !self.coming.contains_key(piece);
            let best = self.missing.iter().filter(wanted).filter_map(|piece| {
                let holders = self.neighbours.values().filter(|n| n.have.contains(piece));
                let count = holders.count();
                let free = self
                    .neighbours
                    .iter()
                    .filter(|(_, n)| n.have.contains(piece) && n.coming.len() < PER_NEIGHBOUR);
                let from = free.min_by_key(|(id, n)| {
                    (n.coming.len(), n.have.len(), id.0 ^ u64::from(self.salt))
                })?;
                Some((count, (piece ^ self.salt).wrapping_mul(0x9E37_79B1), piece, *from.0))
            });
            let Some((_, _, piece, from)) = best.min() else { break };
            self.coming.insert(piece, Some(from));
            if let Some(neighbour) = self.neighbours.get_mut(&from) {
                neighbour.coming.insert(piece);
            }
            let pieces = std::iter::once(piece).collect();
            steps.push(Step::Fetch { from: Some(from), pieces });
        }
        steps
    }
}

impl Planner for Simple {
    fn told(&mut self, action: &Action) -> Vec<Step> {
        let (from, pieces) = match action {
            Action::Assign { parent, pieces, .. } => (Some(*parent), pieces),
            Action::Lease { pieces, .. } => (None, pieces),
            Action::Cancel { pieces, .. } => {
                pieces.iter().for_each(|piece| self.release(piece));
                return vec![Step::Drop { pieces: pieces.clone() }];
            }
            Action::Neighbours { peers, .. } => {
                let mut old = std::mem::take(&mut self.neighbours);
                self.neighbours =
                    peers.iter().map(|id| (*id, old.remove(id).unwrap_or_default())).collect();
                let gone = old.values().flat_map(|n| n.coming.iter().copied());
                let gone: PieceSet = gone.collect();
                for piece in gone.iter() {
                    self.coming.remove(&piece);
                }
                return vec![Step::Drop { pieces: gone }, Step::Follow { peers: peers.clone() }];
            }
            Action::Seed { .. } => return Vec::new(),
        };
        // What it got meanwhile, or is getting from a neighbour, it doesn't fetch twice.
        let pieces: PieceSet = pieces
            .iter()
            .filter(|piece| self.missing.contains(*piece) && !self.coming.contains_key(piece))
            .collect();
        self.coming.extend(pieces.iter().map(|piece| (piece, from)));
        if pieces.is_empty() { Vec::new() } else { vec![Step::Fetch { from, pieces }] }
    }

    fn arrived(&mut self, piece: u32) -> Vec<Step> {
        self.missing.remove(piece);
        self.release(piece);
        self.pick()
    }

    fn failed(&mut self, from: Option<NodeId>, pieces: &PieceSet) -> Vec<Step> {
        for piece in pieces.iter() {
            if self.coming.get(&piece) == Some(&from) {
                self.release(piece);
            }
        }
        if let Some(from) = from {
            self.neighbours.remove(&from);
        }
        self.pick()
    }

    fn peer_has(&mut self, peer: NodeId, pieces: &PieceSet) -> Vec<Step> {
        if let Some(neighbour) = self.neighbours.get_mut(&peer) {
            neighbour.have.insert_all(pieces);
        }
        self.pick()
    }
}
