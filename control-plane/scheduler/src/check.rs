//! Watches a scheduler from outside: keeps its own account of who has, wants and fetches what, from the events and the
//! actions alone, and says which promise an action breaks. Shares no code with the policy.

use std::collections::{BTreeMap, BTreeSet};

use skimmer_proto::{PieceSet, TaskId};

use crate::event::{Action, Event, Fault, NodeId, Now, Reason, Shape};
use crate::limits::Limits;

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("an action for node {0:?}, which isn't connected")]
    UnknownNode(NodeId),
    #[error("piece {piece} was given to {node:?}, which has it")]
    Has { node: NodeId, piece: u32 },
    #[error("piece {piece} was given to {node:?}, which doesn't want it")]
    Unwanted { node: NodeId, piece: u32 },
    #[error("piece {piece} was given to {node:?}, which is getting it already")]
    Twice { node: NodeId, piece: u32 },
    #[error("piece {piece} was leased to {node:?} and {holder:?}")]
    LeasedTwice { node: NodeId, holder: NodeId, piece: u32 },
    #[error("piece {piece} was leased to {node:?}, but {holder:?} has it")]
    LeasedInVain { node: NodeId, holder: NodeId, piece: u32 },
    #[error("piece {piece} was leased to {node:?}, which may not read the origin")]
    NotEntitled { node: NodeId, piece: u32 },
    #[error("piece {piece} was assigned to {node:?} from {parent:?}, which hasn't got it")]
    ParentLacks { node: NodeId, parent: NodeId, piece: u32 },
    #[error("{node:?} was assigned {parent:?}, which sent wrong bytes")]
    Blamed { node: NodeId, parent: NodeId },
    #[error("{node:?} was assigned {parent:?}, from which it couldn't fetch just now")]
    Avoided { node: NodeId, parent: NodeId },
    #[error("{parent:?} has {pieces} pieces to upload")]
    Uploads { parent: NodeId, pieces: u32 },
    #[error("{node:?} has {pieces} pieces to download")]
    Downloads { node: NodeId, pieces: u32 },
    #[error("{node:?} got {count} neighbours")]
    Degree { node: NodeId, count: usize },
}

/// After so many failures a parent isn't one that could give the piece.
const HOPELESS: u32 = 3;

#[derive(Debug, Default)]
struct Peer {
    have: PieceSet,
    want: PieceSet,
    /// From whom each piece that is on its way comes.
    coming: BTreeMap<u32, Option<NodeId>>,
    /// By its own word since the origin last refused it.
    entitled: bool,
    /// When it did.
    refused: Option<Now>,
    /// When it last failed to fetch from them, and how often it did.
    failed: BTreeMap<NodeId, (Now, u32)>,
}

#[derive(Debug)]
struct Task {
    shape: Shape,
    peers: BTreeMap<NodeId, Peer>,
    leased: BTreeMap<u32, NodeId>,
    /// How many nodes that nobody complained about have each piece.
    holders: Vec<u32>,
    /// They sent wrong bytes, on this stream or an earlier one.
    blamed: BTreeSet<NodeId>,
    blamed_keys: BTreeSet<[u8; 32]>,
    /// These, and those that somebody couldn't fetch from: what they have doesn't count.
    doubted: BTreeSet<NodeId>,
}

/// See the module.
#[derive(Debug)]
pub struct Check {
    limits: Limits,
    now: Now,
    connected: BTreeMap<NodeId, [u8; 32]>,
    tasks: BTreeMap<TaskId, Task>,
    uploads: BTreeMap<NodeId, u32>,
    downloads: BTreeMap<NodeId, u32>,
}

impl Check {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            now: Now::ZERO,
            connected: BTreeMap::new(),
            tasks: BTreeMap::new(),
            uploads: BTreeMap::new(),
            downloads: BTreeMap::new(),
        }
    }

    /// Looks at what the scheduler answered to an event.
    pub fn step(&mut self, now: Now, event: &Event, actions: &[Action]) -> Result<(), Violation> {
        self.now = now;
        self.event(event);
        actions.iter().try_for_each(|action| self.action(action))
    }

    /// Wanted pieces that aren't on their way though a node that has them, or the origin, could give them: none may
    /// be left when everything has come to rest.
    pub fn starving(&self) -> Vec<(NodeId, TaskId, u32)> {
        let mut all = Vec::new();
        for (id, task) in &self.tasks {
            for (node, peer) in &task.peers {
                let waiting = peer.want.iter().filter(|piece| !peer.coming.contains_key(piece));
                let available = |piece: u32| {
                    peer.entitled && !task.leased.contains_key(&piece)
                        || task.peers.iter().any(|(other, of)| {
                            let times = peer.failed.get(other).map_or(0, |(_, times)| *times);
                            of.have.contains(piece)
                                && !task.blamed.contains(other)
                                && times < HOPELESS
                        })
                };
                all.extend(
                    waiting.filter(|piece| available(*piece)).map(|piece| (*node, *id, piece)),
                );
            }
        }
        all
    }

    /// Pieces that are on their way.
    pub fn coming(&self) -> usize {
        self.tasks.values().flat_map(|task| task.peers.values()).map(|peer| peer.coming.len()).sum()
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Joined { node, info } => {
                self.forget(*node);
                self.connected.insert(*node, info.key);
            }
            Event::Left { node } => self.forget(*node),
            Event::Announced { .. } | Event::Tick => {}
            Event::Announce { node, task, shape, pieces } => {
                if self.enter(*node, *task, *shape) {
                    self.has(*node, *task, pieces);
                }
            }
            Event::Want { node, task, shape, pieces, class: _, origin } => {
                if self.enter(*node, *task, *shape) {
                    self.lose(*node, *task, pieces);
                    if let Some(peer) = self.peer(*node, *task) {
                        peer.want.insert_all(pieces);
                        peer.entitled = *origin;
                    }
                }
            }
            Event::Reading { node, task, pieces } => self.reads(*node, *task, pieces),
            Event::Arrived { node, task, pieces } => {
                self.drop_coming(*node, *task, pieces, None);
                self.has(*node, *task, pieces);
            }
            Event::Failed { node, task, pieces, parent, fault } => {
                self.failed(*node, *task, pieces, *parent, *fault);
            }
            Event::Withdraw { node, task, pieces } => {
                if let Some(peer) = self.peer(*node, *task) {
                    let all = || peer.want.iter().chain(peer.coming.keys().copied()).collect();
                    let pieces = pieces.clone().unwrap_or_else(all);
                    peer.want.remove_all(&pieces);
                    self.drop_coming(*node, *task, &pieces, None);
                }
            }
        }
    }

    fn enter(&mut self, node: NodeId, task: TaskId, shape: Shape) -> bool {
        let new = || Task {
            shape,
            peers: BTreeMap::new(),
            leased: BTreeMap::new(),
            holders: vec![0; shape.pieces as usize],
            blamed: BTreeSet::new(),
            blamed_keys: BTreeSet::new(),
            doubted: BTreeSet::new(),
        };
        let Some(key) = self.connected.get(&node) else { return false };
        let task = self.tasks.entry(task).or_insert_with(new);
        task.peers.entry(node).or_default();
        if task.blamed_keys.contains(key) {
            task.doubted.insert(node);
            task.blamed.insert(node);
        }
        true
    }

    /// It reads by itself what nobody else has or reads.
    fn reads(&mut self, node: NodeId, task: TaskId, pieces: &PieceSet) {
        let Some(task) = self.tasks.get_mut(&task) else { return };
        let Task { peers, leased, holders, .. } = task;
        let taken: Vec<u32> = peers.values().flat_map(|peer| peer.coming.keys().copied()).collect();
        let Some(peer) = peers.get_mut(&node) else { return };
        for piece in pieces.intersection(&peer.want).iter().filter(|piece| !taken.contains(piece)) {
            if holders[piece as usize] == 0 {
                leased.insert(piece, node);
                peer.coming.insert(piece, None);
            }
        }
    }

    fn peer(&mut self, node: NodeId, task: TaskId) -> Option<&mut Peer> {
        self.tasks.get_mut(&task)?.peers.get_mut(&node)
    }

    fn has(&mut self, node: NodeId, task: TaskId, pieces: &PieceSet) {
        let Some(task) = self.tasks.get_mut(&task) else { return };
        let Some(peer) = task.peers.get_mut(&node) else { return };
        let new = pieces.difference(&peer.have);
        peer.want.remove_all(pieces);
        peer.have.insert_all(pieces);
        if !task.doubted.contains(&node) {
            new.iter().for_each(|piece| task.holders[piece as usize] += 1);
        }
    }

    fn lose(&mut self, node: NodeId, task: TaskId, pieces: &PieceSet) {
        let Some(task) = self.tasks.get_mut(&task) else { return };
        let Some(peer) = task.peers.get_mut(&node) else { return };
        let lost = pieces.intersection(&peer.have);
        peer.have.remove_all(&lost);
        if !task.doubted.contains(&node) {
            lost.iter().for_each(|piece| task.holders[piece as usize] -= 1);
        }
    }

    fn forget(&mut self, node: NodeId) {
        self.connected.remove(&node);
        let tasks: Vec<TaskId> = self.tasks.keys().copied().collect();
        for id in tasks {
            let Some(peer) = self.peer(node, id) else { continue };
            let (all, have) = (peer.coming.keys().copied().collect(), peer.have.clone());
            self.drop_coming(node, id, &all, None);
            self.lose(node, id, &have);
            let Some(task) = self.tasks.get_mut(&id) else { continue };
            task.peers.remove(&node);
            task.blamed.remove(&node);
            task.doubted.remove(&node);
        }
    }

    /// Pieces aren't on their way any more; `only`: if they came from there.
    fn drop_coming(
        &mut self,
        node: NodeId,
        task: TaskId,
        pieces: &PieceSet,
        only: Option<Option<NodeId>>,
    ) {
        let Some(task) = self.tasks.get_mut(&task) else { return };
        let Some(peer) = task.peers.get_mut(&node) else { return };
        for piece in pieces.iter() {
            let Some(from) = peer.coming.get(&piece).copied() else { continue };
            if only.is_some_and(|only| only != from) {
                continue;
            }
            peer.coming.remove(&piece);
            match from {
                None => {
                    task.leased.remove(&piece);
                }
                Some(parent) => {
                    *self.uploads.entry(parent).or_default() -= 1;
                    *self.downloads.entry(node).or_default() -= 1;
                }
            }
        }
    }

    fn failed(
        &mut self,
        node: NodeId,
        id: TaskId,
        pieces: &PieceSet,
        parent: Option<NodeId>,
        fault: Fault,
    ) {
        self.drop_coming(node, id, pieces, Some(parent));
        let Some(parent) = parent else {
            let now = self.now;
            if let (Some(peer), Fault::Refused) = (self.peer(node, id), fault) {
                (peer.entitled, peer.refused) = (false, Some(now));
            }
            return;
        };
        let present = self.peer(parent, id).is_some();
        let now = self.now;
        if let (Some(peer), true) = (self.peer(node, id), present) {
            let failed = peer.failed.entry(parent).or_default();
            *failed = (now, failed.1 + 1);
        }
        match fault {
            Fault::Absent => self.lose(parent, id, pieces),
            Fault::Corrupt => self.blame(parent, id),
            Fault::Gone | Fault::Slow | Fault::Refused => {}
        }
        if fault != Fault::Refused {
            self.doubt(parent, id);
        }
    }

    fn blame(&mut self, node: NodeId, id: TaskId) {
        self.doubt(node, id);
        if let Some(task) = self.tasks.get_mut(&id)
            && task.peers.contains_key(&node)
        {
            task.blamed.insert(node);
            task.blamed_keys.extend(self.connected.get(&node));
        }
    }

    fn doubt(&mut self, node: NodeId, id: TaskId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let Some(peer) = task.peers.get(&node) else { return };
        if task.doubted.insert(node) {
            peer.have.iter().for_each(|piece| task.holders[piece as usize] -= 1);
        }
    }

    fn action(&mut self, action: &Action) -> Result<(), Violation> {
        match action {
            Action::Assign { node, task, parent, pieces, reason } => {
                self.given(*node, *task, pieces)?;
                self.assigned(*node, *task, *parent, pieces, *reason)
            }
            Action::Lease { node, task, pieces, .. } => {
                self.given(*node, *task, pieces)?;
                self.leased(*node, *task, pieces)
            }
            Action::Cancel { node, task, pieces, .. } => {
                self.drop_coming(*node, *task, pieces, None);
                Ok(())
            }
            Action::Neighbours { node, peers, .. } => {
                self.is_connected(*node)?;
                peers.iter().try_for_each(|peer| self.is_connected(*peer))?;
                if peers.len() > self.limits.degree.1 as usize + 1 {
                    return Err(Violation::Degree { node: *node, count: peers.len() });
                }
                Ok(())
            }
            Action::Queued { node, .. } | Action::Seed { node, .. } => self.is_connected(*node),
        }
    }

    fn is_connected(&self, node: NodeId) -> Result<(), Violation> {
        self.connected.contains_key(&node).then_some(()).ok_or(Violation::UnknownNode(node))
    }

    /// The node wants the pieces, and they are on their way to it from here on.
    fn given(&mut self, node: NodeId, task: TaskId, pieces: &PieceSet) -> Result<(), Violation> {
        let peer = self.peer(node, task).ok_or(Violation::UnknownNode(node))?;
        for piece in pieces.iter() {
            if peer.have.contains(piece) {
                return Err(Violation::Has { node, piece });
            }
            if peer.coming.contains_key(&piece) {
                return Err(Violation::Twice { node, piece });
            }
            if !peer.want.contains(piece) {
                return Err(Violation::Unwanted { node, piece });
            }
        }
        Ok(())
    }

    fn assigned(
        &mut self,
        node: NodeId,
        id: TaskId,
        parent: NodeId,
        pieces: &PieceSet,
        reason: Reason,
    ) -> Result<(), Violation> {
        let task = self.tasks.get_mut(&id).ok_or(Violation::UnknownNode(node))?;
        if task.blamed.contains(&parent) {
            return Err(Violation::Blamed { node, parent });
        }
        let from = task.peers.get(&parent).ok_or(Violation::UnknownNode(parent))?;
        if let Some(piece) = pieces.difference(&from.have).first() {
            return Err(Violation::ParentLacks { node, parent, piece });
        }
        let to = task.peers.get_mut(&node).ok_or(Violation::UnknownNode(node))?;
        let again = to.failed.get(&parent).map(|(failed, _)| *failed + self.limits.backoff);
        if again.is_some_and(|again| again > self.now) {
            return Err(Violation::Avoided { node, parent });
        }
        to.coming.extend(pieces.iter().map(|piece| (piece, Some(parent))));
        let urgent = reason == Reason::ReaderWaits;
        let run = (task.shape.pieces / 512).clamp(1, self.limits.run);
        let most = |bulk: u32| run * if urgent { self.limits.urgent } else { bulk };
        let uploads = self.uploads.entry(parent).or_default();
        *uploads += pieces.len();
        if *uploads > most(self.limits.uploads.max(self.limits.untold)) {
            return Err(Violation::Uploads { parent, pieces: *uploads });
        }
        let downloads = self.downloads.entry(node).or_default();
        *downloads += pieces.len();
        if *downloads > most(self.limits.downloads.max(self.limits.untold)) {
            return Err(Violation::Downloads { node, pieces: *downloads });
        }
        Ok(())
    }

    fn leased(&mut self, node: NodeId, id: TaskId, pieces: &PieceSet) -> Result<(), Violation> {
        let task = self.tasks.get_mut(&id).ok_or(Violation::UnknownNode(node))?;
        for piece in pieces.iter() {
            if let Some(holder) = task.leased.insert(piece, node) {
                return Err(Violation::LeasedTwice { node, holder, piece });
            }
            if task.holders[piece as usize] > 0 {
                let doubted = &task.doubted;
                let mut others = task.peers.iter().filter(|(id, _)| !doubted.contains(id));
                let holder = others.find(|(_, peer)| peer.have.contains(piece));
                let holder = holder.map_or(node, |(id, _)| *id);
                return Err(Violation::LeasedInVain { node, holder, piece });
            }
        }
        let peer = task.peers.get_mut(&node).ok_or(Violation::UnknownNode(node))?;
        peer.coming.extend(pieces.iter().map(|piece| (piece, None)));
        let again = peer.refused.map(|refused| refused + self.limits.backoff);
        if !peer.entitled || again.is_some_and(|again| again > self.now) {
            let piece = pieces.first().unwrap_or(0);
            return Err(Violation::NotEntitled { node, piece });
        }
        Ok(())
    }
}
