//! What no event reports: transfers that never end, nodes that turn out slow, children that starve.

use super::Scheduler;
use crate::event::{Action, Fault, Now, Reason};
use crate::task::{Mode, Peer, Task};

/// A parent is slow if its uploads take so many times what the middle one's take.
const SLOW: u64 = 8;
/// A transfer is overdue after so many times what it should have taken.
const OVERDUE: u32 = 4;
/// Nor is it before so many times what the child's latest took.
const SLUGGISH: u32 = 2;
/// A lease is lost after so many times what the quickest took.
const LEASE_OVERDUE: u32 = 64;
/// A transfer that nobody else could do is taken back after so many times the patience.
const HOPELESS: u32 = 8;
/// Sweeps without anything from its neighbours after which a node is stuck.
const STUCK: u32 = 4;
/// Leases that were taken back double the patience with the next, at most so often: the origin may just be slow.
const DOUBLINGS: u32 = 3;

impl Scheduler {
    /// Looks at every active task; runs while there are any.
    pub(super) fn sweep(&mut self) {
        let tasks: Vec<u32> = self
            .by_id
            .values()
            .copied()
            .filter(|t| self.task(*t).is_some_and(|of| of.active))
            .collect();
        let now = self.now;
        self.next_sweep = (!tasks.is_empty()).then(|| now + self.limits.sweep);
        self.try_slow_nodes();
        self.find_slow_nodes();
        for task in tasks {
            if let Some(of) = self.task_mut(task) {
                of.barren = false;
                // Nothing else may have happened: parents are avoided until then only.
                of.now = now;
            }
            self.pardon(task);
            self.take_back_overdue(task);
            self.feed_starving(task);
            self.help_stuck(task);
            self.link_lonely(task);
            self.reassure(task);
            self.send_neighbours(task);
            self.touch_task(task);
        }
    }

    /// Nobody is sent to a slow node who could go elsewhere, so that nothing would show that it is slow no more, or
    /// only was while links were made: what is known of one that idles fades until it is tried again.
    fn try_slow_nodes(&mut self) {
        let numbers: Vec<u32> = self.nodes.numbers().collect();
        for number in numbers {
            let Some(node) = self.nodes.get_mut(number) else { continue };
            if node.slow && node.up.transfers() == 0 {
                node.up.fade();
            }
        }
    }

    /// Compares the rates, as told or learned.
    pub(super) fn find_slow_nodes(&mut self) {
        let numbers: Vec<u32> = self.nodes.numbers().collect();
        let rate = |number: &u32| self.nodes.get(*number).map(|node| node.up.rate());
        let mut rates: Vec<u64> =
            numbers.iter().filter_map(rate).filter(|rate| *rate > 0).collect();
        if rates.is_empty() {
            return;
        }
        let middle = rates.len() / 2;
        self.typical = *rates.select_nth_unstable(middle).1;
        for number in numbers {
            let typical = self.typical;
            let Some(node) = self.nodes.get_mut(number) else { continue };
            let slow = node.up.rate() > 0 && node.up.rate() < typical / SLOW;
            if std::mem::replace(&mut node.slow, slow) != slow {
                self.touch_node(number);
            }
        }
    }

    /// Transfers that take far too long: the parent's rate is corrected, and the pieces are wanted again if another has
    /// them; after `patience` in any case.
    fn take_back_overdue(&mut self, task: u32) {
        let Some(of) = self.task(task) else { return };
        let mut late = Vec::new();
        for (slot, peer) in of.slots() {
            // What else arrives meanwhile shows that the child is busy.
            let Some(node) = self.nodes.get(peer.node) else { continue };
            let (heard, usual) = (node.last_arrival, node.pace * SLUGGISH);
            for fetch in &peer.fetches {
                let took = self.now.saturating_sub(fetch.since.max(heard));
                let lease = of.lease_best.filter(|_| fetch.parent.is_none());
                let most = match fetch.parent {
                    Some(_) => self.limits.patience,
                    None => self.limits.patience * 2_u32.pow(of.leases_overdue.min(DOUBLINGS)),
                };
                let patience = lease.map_or(most, |best| {
                    // At a slow origin they wait for one another.
                    (best * LEASE_OVERDUE * fetch.left() + self.limits.sweep * STUCK)
                        .min(most.max(best * SLUGGISH * self.limits.leases.0))
                });
                let over = took >= patience;
                let expected = fetch.due.saturating_sub(fetch.since) + self.lead;
                // A child may be slow itself: what is taken from it too early it would have to begin again, for ever.
                let most = (expected * OVERDUE + self.limits.sweep).max(usual);
                if over || fetch.parent.is_some() && took > most {
                    late.push((slot, fetch.clone(), over));
                }
            }
        }
        for (slot, fetch, over) in late {
            let took = self.now.saturating_sub(fetch.since);
            let Some(of) = self.task(task) else { return };
            let elsewhere = fetch.pieces().all(|piece| another_has(of, piece, fetch.parent))
                || fetch.parent.is_none()
                    && fetch.pieces().all(|piece| another_may_lease(of, slot, piece));
            let child = of.peer(slot).map(|peer| peer.node);
            let paced = child.and_then(|c| self.nodes.get(c)).is_some_and(|child| child.paced);
            if let Some(number) = fetch.parent.and_then(|p| Some(of.peer(p)?.node))
                && paced
            {
                let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
                if let Some(node) = self.nodes.get_mut(number) {
                    node.up.is_at_most(fetch.bytes.saturating_mul(1_000_000) / micros);
                }
            }
            // Where nobody else could do it, to begin again is worse than to wait.
            let hopeless = took >= self.limits.patience * HOPELESS;
            if !elsewhere && !hopeless || fetch.parent.is_none() && !over {
                continue;
            }
            let fetches = self.task(task).and_then(|of| Some(&of.peer(slot)?.fetches));
            let at = fetches.and_then(|all| {
                all.iter().position(|f| f.parent == fetch.parent && f.since == fetch.since)
            });
            if let Some(at) = at {
                if let Some(child) = child.and_then(|child| self.nodes.get_mut(child)) {
                    child.pace = child.pace.max(took);
                }
                match fetch.parent.and_then(|p| Some(self.task(task)?.peer(p)?.node)) {
                    Some(parent) => self.avoid(task, slot, parent, Fault::Slow),
                    None => {
                        self.origin_failed(task, slot, Fault::Slow);
                        if let Some(of) = self.task_mut(task) {
                            of.leases_overdue += 1;
                        }
                    }
                }
                self.take_back(task, slot, at, Reason::Overdue);
            }
        }
    }

    /// Children without anything on its way for a whole sweep get what they lack from wherever it is.
    fn feed_starving(&mut self, task: u32) {
        let Some(of) = self.task_mut(task).filter(|of| of.mode == Mode::Direct) else { return };
        let mut starving = Vec::new();
        for (slot, peer) in (0_u32..).zip(&mut of.peers) {
            let Some(peer) = peer else { continue };
            let idle = !peer.lack.is_empty() && peer.fetches.is_empty();
            if idle && std::mem::replace(&mut peer.starving, idle) {
                starving.push(slot);
            }
            peer.starving = idle;
        }
        starving.into_iter().for_each(|slot| self.feed(task, slot));
    }

    /// Nodes that pick among neighbours and get nothing from them are given a piece.
    fn help_stuck(&mut self, task: u32) {
        let Some(of) = self.task(task).filter(|of| of.mode == Mode::Graph) else { return };
        let patience = self.limits.sweep * STUCK;
        let stuck = |peer: &Peer| {
            let heard = self.nodes.get(peer.node).map_or(Now::ZERO, |node| node.last_arrival);
            !peer.lack.is_empty() && peer.fetches.is_empty() && heard + patience < self.now
        };
        let slots: Vec<u32> = of.slots().filter(|(_, p)| stuck(p)).map(|(slot, _)| slot).collect();
        slots.into_iter().for_each(|slot| self.feed(task, slot));
    }

    /// Nodes that nothing is on its way to, while it is to others, hear that they haven't been forgotten.
    fn reassure(&mut self, task: u32) {
        let (now, interval) = (self.now, self.limits.reassure);
        let Some(of) = self.task_mut(task) else { return };
        let id = of.id;
        let coming = of.peers.iter().flatten().any(|peer| !peer.fetches.is_empty());
        let mut nodes = Vec::new();
        for peer in of.peers.iter_mut().flatten().filter(|peer| peer.wanting) {
            if !peer.fetches.is_empty() {
                peer.told = now;
            } else if coming && peer.told + interval <= now {
                peer.told = now;
                nodes.push(peer.id);
            }
        }
        let reason = Reason::OnItsWay;
        self.actions.extend(nodes.into_iter().map(|node| Action::Queued {
            node,
            task: id,
            reason,
        }));
    }
}

fn another_may_lease(of: &Task, slot: u32, piece: u32) -> bool {
    let may = |peer: &Peer| peer.may_lease(of.now) && peer.lack.contains(piece);
    of.slots().any(|(other, peer)| other != slot && may(peer))
}

fn another_has(of: &Task, piece: u32, parent: Option<u32>) -> bool {
    of.slots().any(|(slot, peer)| Some(slot) != parent && !peer.muted && peer.have.contains(piece))
}
