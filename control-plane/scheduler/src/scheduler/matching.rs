//! Who fetches which piece from whom.
//!
//! Two searches, each from the side of a node that has become free: a parent looks for the child to which it gives the
//! rarest piece, a child for the rarest piece that a free parent has. Whoever finds nobody stays marked as free, and is
//! found by the next that needs it.
//!
//! Of a task whose nodes pick among neighbours, the first copies of a piece are given that way too: nobody else would see
//! to it that they double from one transfer to the next, nor that each piece enters each zone.
//!
//! Between zones only pieces move that a zone has no copy of, on its way or there: each crosses into a zone once.

use super::Scheduler;
use crate::bits::{Bits, slots};
use crate::event::{Action, Class, Reason};
use crate::fetch::Fetch;
use crate::task::{Mode, Peer, Task};
use crate::view::What;

/// Equals among which the best is looked for.
const SAMPLE: usize = 16;

/// Words of slots that a search looks at before it gives up; a starving child's doesn't.
const EFFORT: u32 = 256;

/// Why a pair is better than another, most important first; the least is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    class: Class,
    /// A whole zone lacks the piece: 0, else 1.
    local: u8,
    copies: u32,
    task: u32,
}

#[derive(Clone, Copy, Debug)]
struct Offer {
    score: Score,
    parent: u32,
    child: u32,
    piece: u32,
}

/// Which parent is the best for a piece; the least is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ParentScore {
    slow: bool,
    far: bool,
    transfers: u32,
    held: u32,
    slot: u32,
}

impl Scheduler {
    /// Notes in all its tasks whether a node may be given uploads and downloads, and when to look again.
    pub(super) fn refresh(&mut self, number: u32) {
        let Some(node) = self.nodes.get_mut(number) else { return };
        let (uploads, downloads) = node.most(&self.limits);
        let up = !node.conduct.quarantined && node.up.is_due(self.now, self.lead, uploads);
        let down = node.down.is_due(self.now, self.lead, downloads);
        for &(task, slot) in &node.active {
            let Some(of) = self.tasks.get_mut(task as usize).and_then(Option::as_mut) else {
                continue;
            };
            of.now = self.now;
            let Some(peer) = of.peer(slot) else { continue };
            let background = usize::from(peer.class == Class::Background);
            let (ready, hungry) = (up && !peer.muted, down && !peer.lack.is_empty());
            of.ready.set(slot, ready);
            of.slow.set(slot, node.slow);
            of.hungry[background].set(slot, hungry);
            of.hungry[1 - background].set(slot, false);
        }
        let up = (!up).then(|| node.up.due_at(self.lead, uploads)).flatten();
        let down = (!down).then(|| node.down.due_at(self.lead, downloads)).flatten();
        let Some(at) = up.into_iter().chain(down).min().filter(|at| *at > self.now) else { return };
        // To the millisecond, so that many are looked at together.
        let at = std::time::Duration::from_millis(u64::try_from(at.as_millis()).unwrap_or(0) + 1);
        if node.wake.is_none_or(|wake| at < wake) {
            node.wake = Some(at);
            self.wakes.entry(at).or_default().push(number);
        }
    }

    /// Gives a parent what it may upload.
    pub(super) fn fill_up(&mut self, number: u32) {
        while let Some(node) = self.nodes.get(number)
            && !node.conduct.quarantined
            && node.up.is_due(self.now, self.lead, node.most(&self.limits).0)
        {
            let spread = self.limits.spread;
            let offers = node
                .active
                .iter()
                .filter_map(|&(task, slot)| for_parent(self.task(task)?, task, slot, spread));
            let Some(offer) = offers.min_by_key(|offer| offer.score) else { break };
            self.assign(offer, Reason::RarestPiece);
        }
    }

    /// Gives a child what it may download.
    pub(super) fn fill_down(&mut self, number: u32) {
        self.serve_readers(number);
        while let Some(node) = self.nodes.get(number)
            && node.down.is_due(self.now, self.lead, node.most(&self.limits).1)
        {
            let offers = node.active.iter().filter_map(|&(task, slot)| {
                let of = self.task(task).filter(|of| of.mode == Mode::Direct)?;
                for_child(of, task, slot, false)
            });
            let Some(offer) = offers.min_by_key(|offer| offer.score) else { break };
            self.assign(offer, Reason::LeastBusyParent);
        }
    }

    /// Pieces that a reader waits for come from the best parent there is, whether it is free or not.
    fn serve_readers(&mut self, number: u32) {
        let Some(node) = self.nodes.get(number) else { return };
        let waiting: Vec<(u32, u32)> = node
            .active
            .iter()
            .copied()
            .filter(|(task, slot)| {
                let peer = self.task(*task).and_then(|of| of.peer(*slot));
                peer.is_some_and(|peer| peer.fault.intersects(&peer.lack))
            })
            .collect();
        for (task, slot) in waiting {
            let Some(of) = self.task(task) else { continue };
            let Some(peer) = of.peer(slot) else { continue };
            for piece in peer.fault.intersection(&peer.lack).iter() {
                let Some(of) = self.task(task) else { break };
                if !of.peer(slot).is_some_and(|peer| peer.lack.contains(piece)) {
                    continue;
                }
                if self.nodes.get(number).is_none_or(|n| n.down.transfers() >= self.limits.urgent) {
                    return;
                }
                if let Some(parent) = self.any_parent(of, slot, piece, true) {
                    let score = Score { class: Class::Fault, local: 1, copies: 0, task };
                    self.assign(Offer { score, parent, child: slot, piece }, Reason::ReaderWaits);
                }
            }
        }
    }

    /// The best holder of a piece that has fewer transfers than it may have, due or not.
    fn any_parent(&self, of: &Task, child: u32, piece: u32, urgent: bool) -> Option<u32> {
        let to = of.peer(child)?;
        let score = |(slot, peer): (u32, &Peer)| {
            let node = self.nodes.get(peer.node)?;
            let able = peer.have.contains(piece)
                && !peer.muted
                && !node.conduct.quarantined
                && node.up.transfers()
                    < if urgent { self.limits.urgent } else { node.most(&self.limits).0 }
                && !to.avoids(peer.node, self.now);
            let far = peer.zone != to.zone;
            let (transfers, held) = (node.up.transfers(), 0);
            able.then_some(ParentScore { slow: node.slow, far, transfers, held, slot })
        };
        of.slots().filter_map(score).min().map(|score| score.slot)
    }

    /// A child that starves takes what it gets.
    pub(super) fn feed(&mut self, task: u32, slot: u32) {
        let Some(of) = self.task(task) else { return };
        // Other tasks may keep its link busy.
        let node = of.peer(slot).and_then(|peer| self.nodes.get(peer.node));
        if node.is_none_or(|node| node.down.transfers() >= node.most(&self.limits).1) {
            return;
        }
        let offer = match of.mode {
            Mode::Direct => for_child(of, task, slot, true),
            Mode::Graph => of.peer(slot).and_then(|peer| {
                let (class, child) = (peer.class, slot);
                let score = Score { class, local: 1, copies: 0, task };
                peer.lack.iter().find_map(|piece| {
                    let parent = self.any_parent(of, slot, piece, false)?;
                    Some(Offer { score, parent, child, piece })
                })
            }),
        };
        if let Some(offer) = offer {
            self.assign(offer, Reason::LeastBusyParent);
        }
    }

    fn assign(&mut self, offer: Offer, reason: Reason) {
        let Offer { score, parent, child, piece } = offer;
        let (now, task, urgent) = (self.now, score.task, reason == Reason::ReaderWaits);
        let Some(of) = self.tasks.get_mut(task as usize).and_then(Option::as_mut) else { return };
        let len = run_length(of, &offer);
        let bytes = u64::from(len) * of.shape.piece_len;
        let Some((from, to)) = of.peer(parent).zip(of.peer(child)) else { return };
        let (from_node, to_node, from_id, to_id) = (from.node, to.node, from.id, to.id);
        let (far, zone) = (from.zone != to.zone, to.zone);
        for piece in piece..piece + len {
            of.begin(child, zone, piece);
        }
        of.across += if far { u64::from(len) } else { 0 };
        of.turn = of.turn.wrapping_add(1);
        let mut fetch = Fetch::new(Some(parent), piece, len, bytes, now);
        if let Some(node) = self.nodes.get_mut(from_node) {
            fetch.due = node.up.begin(now, self.lead, bytes);
        }
        if let Some(node) = self.nodes.get_mut(to_node) {
            fetch.due = fetch.due.max(node.down.begin(now, self.lead, bytes));
        }
        fetch.urgent = urgent;
        let pieces = fetch.set();
        if let Some(peer) = of.peer_mut(parent) {
            peer.children.push(child);
        }
        if let Some(peer) = of.peer_mut(child) {
            peer.fetches.push(fetch);
        }
        let id = of.id;
        self.note(
            task,
            to_id,
            What::Assigned { parent: from_id, first: piece, pieces: len },
            reason,
        );
        self.actions.push(Action::Assign {
            node: to_id,
            task: id,
            parent: from_id,
            pieces,
            reason,
        });
        self.refresh(from_node);
        self.refresh(to_node);
    }
}

/// The best offer for a child of what it lacks; `anywhere`: also from other zones what its own has.
fn for_child(of: &Task, task: u32, child: u32, anywhere: bool) -> Option<Offer> {
    let peer = of.peer(child).filter(|peer| !of.ready.is_empty() && !peer.lack.is_empty())?;
    let zone = &of.zones[peer.zone];
    let mut effort = if anywhere { u32::MAX } else { EFFORT };
    let offer = |piece, parent, local| {
        let copies = zone.rarity.copies(piece);
        Offer { score: Score { class: peer.class, local, copies, task }, parent, child, piece }
    };
    if zone.imports.intersects(&peer.lack) {
        for piece in zone.imports.intersection(&peer.lack).iter() {
            if let Some(parent) = free_parent(of, peer, piece, false, &mut effort) {
                return Some(offer(piece, parent, 0));
            }
        }
    }
    let lacked = zone.rarity.existing().iter().copied().filter(|p| peer.lack.contains(*p));
    for piece in lacked {
        if effort == 0 {
            break;
        }
        if let Some(parent) = free_parent(of, peer, piece, !anywhere, &mut effort) {
            return Some(offer(piece, parent, 1));
        }
    }
    None
}

/// The best offer that a parent can make: the rarest of its pieces that a free child lacks; of a graph, only pieces
/// that a zone has fewer than `spread` copies of.
fn for_parent(of: &Task, task: u32, parent: u32, spread: u32) -> Option<Offer> {
    let peer = of.peer(parent).filter(|peer| !peer.muted && !peer.have.is_empty())?;
    let slow = of.slow.get(parent);
    let mut effort = EFFORT;
    let direct = of.mode == Mode::Direct;
    let usable = |piece: u32| {
        peer.have.contains(piece) && !(slow && (!direct || has_fast_holder(of, piece)))
    };
    for (class, hungry) in [(Class::PullThrough, 0), (Class::Background, 1)] {
        if of.hungry[hungry].is_empty() {
            continue;
        }
        let offer = |piece, child, zone: usize, local| {
            let copies = of.zones[zone].rarity.copies(piece);
            Offer { score: Score { class, local, copies, task }, parent, child, piece }
        };
        for (index, zone) in of.zones.iter().enumerate() {
            if index == peer.zone || !zone.imports.intersects(&peer.have) {
                continue;
            }
            for piece in zone.imports.intersection(&peer.have).iter().filter(|p| usable(*p)) {
                if let Some(child) = free_child(of, peer, index, piece, hungry, &mut effort) {
                    return Some(offer(piece, child, index, 0));
                }
            }
        }
        let zone = &of.zones[peer.zone];
        if !zone.lacked.intersects(&peer.have) {
            continue;
        }
        let existing = zone.rarity.existing().iter().copied();
        for piece in existing.filter(|p| zone.lackers[*p as usize] > 0 && usable(*p)) {
            if effort == 0 || !direct && zone.rarity.copies(piece) >= spread {
                break;
            }
            if let Some(child) = free_child(of, peer, peer.zone, piece, hungry, &mut effort) {
                return Some(offer(piece, child, peer.zone, 1));
            }
        }
    }
    None
}

/// A free child in a zone that lacks a piece: of some, the one that has the fewest pieces.
fn free_child(
    of: &Task,
    parent: &Peer,
    zone: usize,
    piece: u32,
    hungry: usize,
    effort: &mut u32,
) -> Option<u32> {
    let hungry = &of.hungry[hungry];
    if of.mode == Mode::Graph {
        return any_child(of, parent, zone, piece, hungry, effort);
    }
    let row = of.lacking.row(piece);
    let mut best: Option<(u32, u32)> = None;
    let mut seen = 0;
    hungry.visit(&of.zones[zone].words, of.turn, |word| {
        *effort = effort.saturating_sub(1);
        for slot in slots(word, row[word as usize] & hungry.word(word)) {
            let avoids = of.picky.get(slot)
                && of.peer(slot).is_none_or(|peer| peer.avoids(parent.node, of.now));
            if !avoids {
                let score = (of.held[slot as usize], slot);
                best = Some(best.map_or(score, |best| best.min(score)));
                seen += 1;
            }
        }
        seen >= SAMPLE
    });
    best.map(|(_, slot)| slot)
}

/// The first free child from anywhere on, of a graph: who lacks what isn't kept there.
fn any_child(
    of: &Task,
    parent: &Peer,
    zone: usize,
    piece: u32,
    hungry: &Bits,
    effort: &mut u32,
) -> Option<u32> {
    let mut found = None;
    hungry.visit(&of.zones[zone].words, of.turn, |word| {
        *effort = effort.saturating_sub(1);
        let fits = |slot: &u32| {
            of.peer(*slot)
                .is_some_and(|peer| peer.lack.contains(piece) && !peer.avoids(parent.node, of.now))
        };
        found = slots(word, hungry.word(word)).find(fits);
        found.is_some() || *effort == 0
    });
    found
}

/// A free holder of a piece, in the child's zone if `near`; a slow one only if there is no other.
fn free_parent(of: &Task, child: &Peer, piece: u32, near: bool, effort: &mut u32) -> Option<u32> {
    let (row, picky) = (of.holding.row(piece), !child.avoid.is_empty());
    let zones = if near { child.zone..child.zone + 1 } else { 0..of.zones.len() };
    let mut best: Option<ParentScore> = None;
    let mut seen = 0;
    for zone in zones {
        let far = zone != child.zone;
        of.ready.visit(&of.zones[zone].words, of.turn, |word| {
            *effort = effort.saturating_sub(1);
            for slot in slots(word, row[word as usize] & of.ready.word(word)) {
                let slow = of.slow.get(slot);
                if slow && has_fast_holder(of, piece) || picky && avoids(of, child, slot) {
                    continue;
                }
                let held = of.held[slot as usize];
                let score = ParentScore { slow, far, transfers: 0, held, slot };
                best = Some(best.map_or(score, |best| best.min(score)));
                seen += 1;
            }
            seen >= SAMPLE
        });
        if seen >= SAMPLE {
            break;
        }
    }
    best.map(|best| best.slot)
}

fn avoids(of: &Task, child: &Peer, parent: u32) -> bool {
    of.peer(parent).is_none_or(|parent| child.avoids(parent.node, of.now))
}

/// Whether anybody but slow parents has the piece.
fn has_fast_holder(of: &Task, piece: u32) -> bool {
    let row = of.holding.row(piece);
    (0_u32..).zip(row).any(|(word, holders)| *holders != 0 && holders & !of.slow.word(word) != 0)
}

/// How many pieces from the offered one on can go along.
fn run_length(of: &Task, offer: &Offer) -> u32 {
    let Some((parent, child)) = of.peer(offer.parent).zip(of.peer(offer.child)) else { return 1 };
    let zone = &of.zones[child.zone];
    let far = parent.zone != child.zone;
    let urgent = offer.score.class == Class::Fault;
    let fits = |piece: u32| {
        piece < of.shape.pieces
            && parent.have.contains(piece)
            && child.lack.contains(piece)
            && (!far || urgent || zone.imports.contains(piece))
            && child.fault.contains(piece) == urgent
    };
    let mut len = 1;
    while len < of.run && fits(offer.piece + len) {
        len += 1;
    }
    len
}
