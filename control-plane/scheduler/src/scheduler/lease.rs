//! Leases of the origin: each piece that nobody has is fetched from there by one node.
//!
//! Successive pieces go to different nodes, so that each can pass on its own. A few leases are out at any time, over all
//! tasks; how many a task may have beyond follows the origin: more while the time per piece stays as short as it was at best.

use skimmer_proto::{PieceSet, TaskId};

use super::Scheduler;
use crate::event::{Action, Class, NodeId, Reason};
use crate::fetch::{Fetch, MAX_RUN};
use crate::task::Task;
use crate::view::What;

/// Leases that a node holds before others are asked, whatever else speaks for it.
const FULL: u32 = 2;
/// A lease that takes this many percent longer than the quickest leaves the origin room for one more; …
const EAGER: u32 = 25;
/// … if it takes so many longer, there are too many.
const CROWDED: u32 = 75;
/// Bytes of one lease at most where no swarm waits for its first piece.
const ALONE_BYTES: u64 = 8 << 20;

/// Who gets the next lease; the least does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    /// The piece is one that a reader of its own waits for: 0, else 1.
    own_reader: u8,
    /// Leases beyond [`FULL`].
    over: u32,
    slow: bool,
    /// Something that it fetches should be there by now: it may be gone.
    late: bool,
    /// It has less than half of what the others have: it may be slow.
    behind: bool,
    class: Class,
    not_seed: bool,
    leases: u32,
    held: u32,
    slot: u32,
}

impl Scheduler {
    /// Leases what nobody has, as far as the origin bears it.
    pub(super) fn grant_leases(&mut self, task: u32) {
        if !self.settled {
            return;
        }
        while let Some(of) = self.task(task)
            && of.active
            && !of.orphans.is_empty()
        {
            let full = self.is_full(of);
            if of.barren || full && of.readers.is_empty() {
                break;
            }
            let Some((slot, piece)) = self.next_lease(of) else {
                if let Some(of) = self.task_mut(task) {
                    of.barren = !full;
                }
                break;
            };
            self.lease(task, slot, piece);
        }
    }

    /// Whether the task has all the leases that it may have beside those of the others.
    const fn is_full(&self, of: &Task) -> bool {
        of.leases >= of.leases_most && self.leases >= self.limits.leases.0
    }

    /// The most urgent orphan and who gets it.
    fn next_lease(&self, of: &Task) -> Option<(u32, u32)> {
        let mut urgent = PieceSet::new();
        for peer in of.readers.iter().filter_map(|slot| of.peer(*slot)) {
            urgent.insert_all(&peer.fault.intersection(&of.orphans));
        }
        // Readers don't wait for the origin's other leases.
        let full = self.is_full(of);
        let most = of.leases_most.max(self.limits.leases.0) * 2;
        if full && (urgent.is_empty() || of.leases >= most) {
            return None;
        }
        let others = if full { None } else { Some(&of.orphans) };
        let able: Vec<u32> = of
            .slots()
            .filter(|(_, peer)| {
                let node = self.nodes.get(peer.node);
                peer.may_lease(self.now)
                    && node.is_some_and(|node| node.no_lease_before <= self.now)
            })
            .map(|(slot, _)| slot)
            .collect();
        let count = u32::try_from(able.len()).ok().filter(|count| *count > 0)?;
        let held: u64 = able.iter().map(|slot| u64::from(of.held[*slot as usize])).sum();
        let middle = u32::try_from(held / u64::from(count)).unwrap_or(u32::MAX);
        urgent.iter().chain(others.into_iter().flat_map(PieceSet::iter)).find_map(|piece| {
            let scores = able.iter().filter_map(|slot| self.lease_score(of, *slot, piece, middle));
            scores.min().map(|score| (score.slot, piece))
        })
    }

    fn lease_score(&self, of: &Task, slot: u32, piece: u32, middle: u32) -> Option<Score> {
        let peer = of.peer(slot).filter(|peer| peer.lack.contains(piece))?;
        let node = self.nodes.get(peer.node)?;
        Some(Score {
            own_reader: u8::from(!peer.fault.contains(piece)),
            over: node.leases.saturating_sub(FULL - 1),
            slow: node.slow,
            late: peer.fetches.iter().any(|fetch| fetch.is_late(self.now, self.lead)),
            behind: of.held[slot as usize] * 2 + 2 < middle,
            class: peer.class,
            not_seed: !node.seed,
            leases: peer.leases,
            held: of.held[slot as usize],
            slot,
        })
    }

    fn lease(&mut self, task: u32, slot: u32, first: u32) {
        let Some(of) = self.task(task) else { return };
        let Some(peer) = of.peer(slot) else { return };
        let id = peer.id;
        let most = if of.wanting <= 2 {
            // Whoever is the first of many looks alone as well: not more than it has shown to be alone for.
            let alone = u32::try_from(ALONE_BYTES / of.shape.piece_len.max(1)).unwrap_or(MAX_RUN);
            of.run.max(of.held[slot as usize].min(alone).min(MAX_RUN))
        } else {
            of.run
        };
        let urgent = peer.fault.contains(first);
        let fits = |piece: u32| {
            of.orphans.contains(piece)
                && peer.lack.contains(piece)
                && peer.fault.contains(piece) == urgent
        };
        let mut len = 1;
        while len < most && first + len < of.shape.pieces && fits(first + len) {
            len += 1;
        }
        let lost = of.lost.intersects(&std::iter::once(first..first + len).collect());
        let Some(pieces) = self.begin_lease(task, slot, first, len, urgent) else { return };
        let reason = match (lost, urgent) {
            (true, _) => Reason::LeaseLost,
            (false, true) => Reason::ReaderWaits,
            (false, false) => Reason::NobodyHasIt,
        };
        let Some(task_id) = self.task(task).map(|of| of.id) else { return };
        self.note(task, id, What::Leased { first, pieces: len }, reason);
        self.actions.push(Action::Lease { node: id, task: task_id, pieces, reason });
    }

    /// A run of pieces is on its way from the origin to a peer that lacks them.
    fn begin_lease(
        &mut self,
        task: u32,
        slot: u32,
        first: u32,
        len: u32,
        urgent: bool,
    ) -> Option<PieceSet> {
        let (now, lead) = (self.now, self.lead);
        let of = self.task_mut(task)?;
        let bytes = u64::from(len) * of.shape.piece_len;
        let mut fetch = Fetch::new(None, first, len, bytes, now);
        fetch.due = now + lead;
        fetch.urgent = urgent;
        let pieces = fetch.set();
        let peer = of.peer_mut(slot)?;
        let (node, zone) = (peer.node, peer.zone);
        peer.leases += 1;
        peer.fetches.push(fetch);
        for piece in pieces.iter() {
            of.begin(slot, zone, piece);
        }
        of.lost.remove_all(&pieces);
        of.leases += 1;
        self.leases += 1;
        if let Some(node) = self.nodes.get_mut(node) {
            node.leases += 1;
        }
        Some(pieces)
    }

    /// What a node reads from the origin without a lease of this scheduler's counts as one.
    pub(super) fn reading(&mut self, id: NodeId, task: TaskId, pieces: &PieceSet) {
        let Some((task, slot)) = self.find(id, task) else { return };
        let Some(of) = self.task(task).filter(|of| of.active) else { return };
        let Some(peer) = of.peer(slot) else { return };
        let free = pieces.intersection(&peer.lack).intersection(&of.orphans);
        let runs: Vec<_> = free.runs().collect();
        for run in runs {
            for first in run.clone().step_by(MAX_RUN as usize) {
                let len = (run.end - first).min(MAX_RUN);
                // Nobody was told to.
                let _ = self.begin_lease(task, slot, first, len, false);
            }
        }
        self.after(task, slot);
    }

    /// A lease is over; if `whole`, all of it arrived.
    pub(super) fn end_lease(&mut self, task: u32, slot: u32, fetch: &Fetch, whole: bool) {
        let now = self.now;
        let most = self.limits.leases.1;
        self.leases = self.leases.saturating_sub(1);
        let Some(of) = self.tasks.get_mut(task as usize).and_then(Option::as_mut) else { return };
        of.leases = of.leases.saturating_sub(1);
        of.lost.insert_all(&fetch.set());
        let Some(peer) = of.peer_mut(slot) else { return };
        let number = peer.node;
        if whole {
            peer.refusals = 0;
        }
        if let Some(node) = self.nodes.get_mut(number) {
            node.leases = node.leases.saturating_sub(1);
            if whole {
                node.failed_leases = 0;
            }
        }
        if !whole {
            return;
        }
        let pieces = u32::try_from(fetch.bytes / of.shape.piece_len.max(1)).unwrap_or(1).max(1);
        let took = now.saturating_sub(fetch.since) / pieces;
        let best = of.lease_best.map_or(took, |best| best.min(took));
        of.lease_best = Some(best);
        if took <= best + best * EAGER / 100 {
            of.leases_most = (of.leases_most + 1).min(most);
        } else if took > best + best * CROWDED / 100 {
            of.leases_most = (of.leases_most - 1).max(1);
        }
    }
}
