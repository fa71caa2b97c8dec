//! What time alone brings about: peers that stall, readers that wait too long.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use skimmer_cache::Class;
use skimmer_proto::{PieceSet, TaskId};

use super::Planner;
use super::event::{Action, Fault, Now, Peer, Why};

/// A peer is stalled once it takes so many times the usual.
const STALLED: u32 = 10;

/// While something is under way, time is looked at this often; less where the scheduler leads.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_LED: Duration = Duration::from_millis(500);
const LOOK_FAULT: Duration = Duration::from_millis(10);

impl Planner {
    pub(super) fn watch(&mut self, now: Now, actions: &mut Vec<Action>) {
        for peer in self.stalled(now) {
            self.end_all(now, peer, Fault::Slow, actions);
        }
        self.hedge(now, actions);
        for (task, download) in &self.downloads {
            let silent = now.saturating_sub(download.heard) >= self.limits.fault_patience * 10;
            let holders = || download.holders.values().filter(|holder| !holder.pieces.is_empty());
            if !download.origin
                && silent
                && download.is_waiting()
                && download.flying.is_empty()
                && holders().next().is_none()
            {
                actions.push(Action::Hopeless { task: *task });
            }
        }
    }

    /// Who sends nothing for so long isn't waited for any more.
    fn stall_wait(&self) -> Duration {
        let usual = self.bulk.percentile(50);
        usual.map_or(self.limits.stall_first, |usual| (usual * STALLED).max(self.limits.stall_min))
    }

    fn stalled(&self, now: Now) -> Vec<Peer> {
        let wait = self.stall_wait();
        let mut oldest = BTreeMap::new();
        for request in self.requests.values() {
            if let Some(peer) = request.peer {
                let asked = oldest.entry(peer).or_insert(request.asked);
                *asked = request.asked.min(*asked);
            }
        }
        // Until something is known of usual times, what others bring shows that it is this node's link that is slow.
        let known = self.bulk.percentile(50).is_some();
        let busy = if known { Now::ZERO } else { self.last_received };
        let is_stalled = |(peer, asked): &(Peer, Now)| {
            let free = self.links.get(peer).map_or(Now::ZERO, |link| link.free_since);
            now.saturating_sub(free.max(*asked).max(busy)) >= wait
        };
        oldest.into_iter().filter(is_stalled).map(|(peer, _)| peer).collect()
    }

    /// Faults that take longer than nearly all are asked of somebody else as well; in the end of the
    /// origin. So is whatever an origin that has stalled owes.
    fn hedge(&mut self, now: Now, actions: &mut Vec<Action>) {
        let usual = self.faults.percentile(90);
        let wait = usual.map_or(self.limits.hedge_first, |usual| usual.max(self.limits.hedge_min));
        let mut late = Vec::new();
        for (task, download) in &self.downloads {
            for (piece, flying) in &download.flying {
                let overdue = now.saturating_sub(flying.since);
                let fault = flying.class == Class::Fault;
                let wait = if fault { wait } else { self.stall_wait() };
                if flying.requests.len() < 2 && overdue >= wait {
                    late.push((*task, *piece, flying.requests[0], flying.class, overdue));
                }
            }
        }
        let mut asks: BTreeMap<(TaskId, Peer, Class), PieceSet> = BTreeMap::new();
        let mut origin: BTreeMap<TaskId, PieceSet> = BTreeMap::new();
        for (task, piece, request, class, overdue) in late {
            let Some(asked) = self.requests.get(&request).map(|request| request.peer) else {
                continue;
            };
            let Some(download) = self.downloads.get(&task) else { continue };
            // Of peers that stall something else is made: they are given up.
            if class != Class::Fault && asked.is_some() {
                continue;
            }
            let others = download.holders.iter().filter(|(peer, holder)| {
                Some(**peer) != asked
                    && holder.pieces.contains(piece)
                    && !download.is_banned(peer, now)
            });
            let others: BTreeSet<Peer> = others.map(|(peer, _)| *peer).collect();
            if let Some(peer) = self.best(now, &others, self.limits.assigned_pieces, piece) {
                self.links.entry(peer).or_default().unanswered += 1;
                asks.entry((task, peer, class)).or_default().insert(piece);
            } else if asked.is_some() && overdue >= self.limits.fault_patience * 4 {
                origin.entry(task).or_default().insert(piece);
            }
        }
        for ((task, peer, class), pieces) in asks {
            self.ask_counted(now, task, peer, pieces, class, actions);
        }
        for (task, mut pieces) in origin {
            while let Some(download) = self.downloads.get(&task)
                && let Some(run) = self.origin_run(now, download, &pieces, Class::Fault)
            {
                pieces.remove_all(&run);
                self.read_origin(now, task, run, Class::Fault, Why::ReaderWaits, actions);
            }
        }
    }

    pub(super) fn next_due(&self, now: Now) -> Option<Now> {
        let reports = self.downloads.values().filter(|download| !download.stored.is_empty());
        let report = reports.map(|download| download.report_at).min();
        let urgent = Class::Fault as usize;
        let look = self.downloads.values().map(|download| {
            let mut classes = download.flying.values().map(|flying| flying.class);
            let fault = !download.waiting[urgent].is_empty() || classes.any(|c| c == Class::Fault);
            let led = self.scheduler && self.origin_failures == 0;
            let look = if led { LOOK_LED } else { LOOK };
            now + if fault { LOOK_FAULT } else { look }
        });
        report.into_iter().chain(look.min()).min()
    }
}
