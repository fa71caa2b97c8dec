//! What no event reports: transfers that never end, nodes that turn out slow, children that starve.

use super::Scheduler;
use crate::event::Reason;
use crate::task::{Mode, Task};

/// A parent is slow if its uploads take so many times what the middle one's take.
const SLOW: u64 = 8;
/// A transfer is overdue after so many times what it should have taken.
const OVERDUE: u32 = 4;

impl Scheduler {
    /// Looks at every active task; runs while there are any.
    pub(super) fn sweep(&mut self) {
        let tasks: Vec<u32> = self
            .by_id
            .values()
            .copied()
            .filter(|t| self.task(*t).is_some_and(|of| of.active))
            .collect();
        self.next_sweep = (!tasks.is_empty()).then(|| self.now + self.limits.sweep);
        self.find_slow_nodes();
        for task in tasks {
            self.take_back_overdue(task);
            self.feed_starving(task);
            self.send_neighbours(task);
            self.touch_task(task);
        }
    }

    fn find_slow_nodes(&mut self) {
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
            for fetch in &peer.fetches {
                let took = self.now.saturating_sub(fetch.since);
                let over = took >= self.limits.patience;
                let expected = fetch.due.saturating_sub(fetch.since) + self.lead;
                if over || fetch.parent.is_some() && took > expected * OVERDUE + self.limits.sweep {
                    late.push((slot, fetch.clone(), over));
                }
            }
        }
        for (slot, fetch, over) in late {
            let took = self.now.saturating_sub(fetch.since);
            let Some(of) = self.task(task) else { return };
            let elsewhere = fetch.pieces().all(|piece| another_has(of, piece, fetch.parent));
            if let Some(number) = fetch.parent.and_then(|p| Some(of.peer(p)?.node)) {
                let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
                if let Some(node) = self.nodes.get_mut(number) {
                    node.up.is_at_most(fetch.bytes.saturating_mul(1_000_000) / micros);
                }
            }
            if !over && !elsewhere {
                continue;
            }
            let fetches = self.task(task).and_then(|of| Some(&of.peer(slot)?.fetches));
            let at = fetches.and_then(|all| {
                all.iter().position(|f| f.parent == fetch.parent && f.since == fetch.since)
            });
            if let Some(at) = at {
                if let Some(number) =
                    fetch.parent.and_then(|p| Some(self.task(task)?.peer(p)?.node))
                {
                    self.avoid(task, slot, number);
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
}

fn another_has(of: &Task, piece: u32, parent: Option<u32>) -> bool {
    of.slots().any(|(slot, peer)| Some(slot) != parent && !peer.muted && peer.have.contains(piece))
}
