//! What the scheduler is told.

use skimmer_cache::Class;
use skimmer_proto::{PieceSet, TaskId};

use super::event::{Action, Fault, Now, Peer, Report};
use super::{Planner, Request};

impl Planner {
    /// A scheduler that knows nothing of this node.
    pub(super) fn introduce(&mut self, actions: &mut Vec<Action>) {
        self.scheduler = true;
        for (task, download) in &mut self.downloads {
            // It deals the cards anew; what is in flight stays.
            download.leased = PieceSet::new();
            download.assigned.clear();
            download.neighbours = None;
            download.told = download.all_wanted();
            let (shape, origin) = (download.shape, download.origin);
            let of_task = |request: &&Request| request.peer.is_none() && request.task == *task;
            let mut reading = PieceSet::new();
            for request in self.requests.values().filter(of_task) {
                reading.insert_all(&request.left);
            }
            for (class, pieces) in Class::ALL.into_iter().zip(download.wanted()) {
                if !pieces.is_empty() {
                    let want = Report::Want { task: *task, shape, pieces, class, origin };
                    actions.push(Action::Report(want));
                }
            }
            if !reading.is_empty() {
                actions.push(Action::Report(Report::Reading { task: *task, pieces: reading }));
            }
        }
    }

    pub(super) fn report_failure(
        &self,
        task: TaskId,
        pieces: PieceSet,
        parent: Option<Peer>,
        fault: Fault,
        actions: &mut Vec<Action>,
    ) {
        if self.scheduler && !pieces.is_empty() {
            let failed = Report::Failed { task, pieces, parent, fault };
            actions.push(Action::Report(failed));
        }
    }

    /// Tells what is on disk unless that was done just now, and forgets what is over. The scheduler is told, and
    /// neighbours that lack it: a question what they have says what this node has.
    pub(super) fn flush(&mut self, now: Now, actions: &mut Vec<Action>) {
        let (scheduler, batch, pause) = (self.scheduler, self.limits.batch, self.limits.probe);
        self.downloads.retain(|task, download| {
            let due = download.report_at <= now;
            if !download.stored.is_empty() && (due || !scheduler) {
                download.report_at = now + batch;
                let pieces = std::mem::take(&mut download.stored);
                download.told.remove_all(&pieces);
                if scheduler {
                    for peer in download.lacking(now, &pieces, pause) {
                        download.asks_haves(now, peer);
                        actions.push(Action::Probe { task: *task, peer });
                    }
                    let arrived = Report::Arrived { task: *task, pieces };
                    actions.push(Action::Report(arrived));
                }
            }
            !download.is_over()
        });
    }
}
