//! What follows from failed transfers: who isn't asked any more, by whom.
//!
//! One child's word quarantines a parent that sends wrong bytes, as everything in its place could be wrong too. So that
//! one node can't take all others out, what it says is believed of a few parents only.

use skimmer_proto::{PieceSet, TaskId};

use super::Scheduler;
use crate::event::{Fault, NodeId, Reason};
use crate::task::{Avoided, Peer};
use crate::view::What;

/// Children that can't fetch from a parent, out of many, until nobody is sent there for a while.
const COMPLAINTS: usize = 3;
/// How often the time doubles for which a parent is avoided, or a node gets no lease.
const DOUBLINGS: u32 = 6;
/// Parents that a child remembers not to ask.
const AVOIDED: usize = 64;

impl Scheduler {
    pub(super) fn failed(
        &mut self,
        id: NodeId,
        task: TaskId,
        pieces: &PieceSet,
        parent: Option<NodeId>,
        fault: Fault,
    ) {
        let Some((task, slot)) = self.find(id, task) else { return };
        let known = parent.and_then(|parent| self.nodes.number(parent));
        let parent_slot = known.and_then(|n| self.nodes.get(n)?.tasks.get(&task).copied());
        if parent.is_none() || parent_slot.is_some() {
            self.put_back(task, slot, pieces, parent_slot);
        }
        match (parent, known, parent_slot) {
            (None, ..) => self.origin_failed(task, slot, fault),
            (Some(_), Some(number), Some(parent)) => {
                self.parent_failed(task, (slot, id), (parent, number), pieces, fault);
            }
            _ => {}
        }
        self.after(task, slot);
    }

    /// Pieces that didn't come from there are wanted again.
    fn put_back(&mut self, task: u32, slot: u32, pieces: &PieceSet, parent: Option<u32>) {
        let failed = self.call_off(task, slot, pieces, |from| from == parent);
        let Some(of) = self.task_mut(task) else { return };
        for piece in failed.iter() {
            of.set_lack(slot, piece, true);
            if parent.is_none() {
                of.lost.insert(piece);
            }
        }
    }

    pub(super) fn origin_failed(&mut self, task: u32, slot: u32, fault: Fault) {
        let (now, backoff) = (self.now, self.limits.backoff);
        let Some(of) = self.tasks.get_mut(task as usize).and_then(Option::as_mut) else { return };
        of.barren = false;
        let Some(peer) = of.peer_mut(slot) else { return };
        let (id, number) = (peer.id, peer.node);
        // Leases that were under way together fail for one reason: only the first counts.
        if fault == Fault::Refused {
            peer.origin = false;
            let new = peer.refused_until <= now;
            let times = if new { peer.refusals.min(DOUBLINGS) } else { 0 };
            peer.refused_until = peer.refused_until.max(now + backoff * 2_u32.pow(times));
            peer.refusals += u32::from(new);
            self.note(task, id, What::NotEntitled, Reason::Refused);
            return;
        }
        if let Some(node) = self.nodes.get_mut(number).filter(|node| node.no_lease_before <= now) {
            node.no_lease_before = now + backoff * 2_u32.pow(node.failed_leases.min(DOUBLINGS));
            node.failed_leases += 1;
        }
        self.reconsider(task);
    }

    /// The origin fails: whoever was only complained about may still be the better way.
    fn reconsider(&mut self, task: u32) {
        let now = self.now;
        let Some(of) = self.task_mut(task) else { return };
        for peer in of.peers.iter_mut().flatten() {
            peer.muted_until = peer.muted_until.map(|until| until.min(now));
        }
        self.pardon(task);
    }

    fn parent_failed(
        &mut self,
        task: u32,
        (slot, child): (u32, NodeId),
        (parent, number): (u32, u32),
        pieces: &PieceSet,
        fault: Fault,
    ) {
        let Some(peer) = self.task(task).and_then(|of| of.peer(slot)) else { return };
        let complainer = peer.node;
        self.avoid(task, slot, number, fault);
        match fault {
            Fault::Absent => {
                if let Some(of) = self.task_mut(task) {
                    pieces.iter().for_each(|piece| of.lose(parent, piece));
                }
                self.complain(task, parent, complainer);
            }
            Fault::Corrupt => self.accuse(task, child, parent, number),
            Fault::Gone | Fault::Slow => self.complain(task, parent, complainer),
            // The child isn't entitled there: that says nothing of the parent.
            Fault::Refused => {}
        }
    }

    /// A child isn't sent to a parent for a while, longer each time.
    pub(super) fn avoid(&mut self, task: u32, slot: u32, node: u32, fault: Fault) {
        let (now, backoff) = (self.now, self.limits.backoff);
        let Some(of) = self.task_mut(task) else { return };
        of.picky.set(slot, true);
        let Some(peer) = of.peer_mut(slot) else { return };
        let place = peer.avoid.iter().position(|avoided| avoided.node == node);
        let before = place.map(|place| peer.avoid.remove(place));
        let times = match fault {
            Fault::Refused => DOUBLINGS,
            _ => before.map_or(0, |before| (before.times + 1).min(DOUBLINGS)),
        };
        if peer.avoid.len() >= AVOIDED {
            peer.avoid.remove(0);
        }
        peer.avoid.push(Avoided { node, until: now + backoff * 2_u32.pow(times), times });
    }

    fn complain(&mut self, task: u32, parent: u32, complainer: u32) {
        let Some(of) = self.task_mut(task) else { return };
        let others = of.slots().filter(|(slot, peer)| peer.wanting && *slot != parent).count();
        let enough = others.clamp(1, COMPLAINTS);
        let Some(peer) = of.peer_mut(parent).filter(|peer| !peer.muted) else { return };
        if !peer.complaints.contains(&complainer) {
            peer.complaints.push(complainer);
        }
        if peer.complaints.len() >= enough {
            self.quarantine(task, parent, Reason::Complaints);
            let (now, patience) = (self.now, self.limits.patience);
            if let Some(peer) = self.task_mut(task).and_then(|of| of.peer_mut(parent)) {
                // Longer each time.
                peer.muted_until = Some(now + patience * 2_u32.pow(peer.mutes.min(DOUBLINGS)));
                peer.mutes += 1;
            }
        }
    }

    fn accuse(&mut self, task: u32, child: NodeId, parent: u32, number: u32) {
        let most = self.limits.accusations as usize;
        let Some(key) = self.nodes.get(number).map(|node| node.key) else { return };
        let accuser = self.nodes.number(child).and_then(|n| self.nodes.get_mut(n));
        let Some(accuser) = accuser else { return };
        let accused = &mut accuser.conduct.accused;
        if accused.len() >= most && !accused.contains(&key) {
            return;
        }
        accused.insert(key);
        if let Some(peer) = self.task_mut(task).and_then(|of| of.peer_mut(parent)) {
            peer.muted_until = None;
        }
        self.quarantine(task, parent, Reason::WrongBytes);
        let strikes = self.limits.strikes;
        let Some(id) = self.task(task).map(|of| of.id) else { return };
        let Some(node) = self.nodes.get_mut(number) else { return };
        node.conduct.strikes = node.conduct.strikes.saturating_add(1);
        if node.conduct.blamed.len() < strikes as usize {
            node.conduct.blamed.insert(id);
        }
        let enough = node.conduct.strikes >= strikes;
        if enough && !std::mem::replace(&mut node.conduct.quarantined, true) {
            let tasks: Vec<(u32, u32)> = node.tasks.iter().map(|(t, s)| (*t, *s)).collect();
            for (task, slot) in tasks {
                self.quarantine(task, slot, Reason::WrongBytes);
            }
        }
    }

    /// Nobody fetches from the peer in this task from here on, and what it has doesn't count.
    fn quarantine(&mut self, task: u32, slot: u32, reason: Reason) {
        let Some(of) = self.task_mut(task) else { return };
        let Some(peer) = of.peer(slot).filter(|peer| !peer.muted) else { return };
        let node = peer.id;
        of.mute(slot, true);
        self.note(task, node, What::Quarantined, reason);
        self.drop_children(task, slot);
        self.unlink(task, slot);
        self.after(task, slot);
    }

    /// Peers that were only complained about are given another chance.
    pub(super) fn pardon(&mut self, task: u32) {
        let now = self.now;
        let Some(of) = self.task_mut(task) else { return };
        let over = |peer: &Peer| peer.muted_until.is_some_and(|until| until <= now);
        let slots: Vec<u32> = of.slots().filter(|(_, p)| over(p)).map(|(slot, _)| slot).collect();
        for slot in slots {
            let Some(of) = self.task_mut(task) else { return };
            if let Some(peer) = of.peer_mut(slot) {
                peer.muted_until = None;
                peer.complaints.clear();
            }
            of.mute(slot, false);
            self.after(task, slot);
        }
    }
}
