//! What people are shown of a cluster's tasks.

use skimmer_identity::{PeerId, Role};
use skimmer_proto::TaskId;
use skimmer_scheduler::NodeId;
use skimmer_scheduler::view::{Decision, TaskView, What};

use super::super::convert::Task;
use super::Owner;

/// A line of `skimmer task list`.
#[derive(Clone, Debug)]
pub struct TaskRow {
    pub task: Task,
    pub view: TaskView,
}

/// `skimmer task show`.
#[derive(Clone, Debug)]
pub struct Detail {
    pub row: TaskRow,
    pub peers: Vec<PeerRow>,
    pub decisions: Vec<Told>,
}

#[derive(Clone, Debug)]
pub struct PeerRow {
    pub peer: PeerId,
    pub zone: String,
    pub seed: bool,
    pub have: u32,
    pub want: u32,
    pub leased: u32,
    pub assigned: u32,
}

/// A decision in words.
#[derive(Clone, Debug)]
pub struct Told {
    pub at_ms: u64,
    pub node: String,
    pub what: String,
    pub reason: String,
}

impl TaskRow {
    /// Of so many pieces.
    pub fn bytes(&self, pieces: u64) -> u64 {
        pieces.saturating_mul(self.task.shape.piece_len)
    }
}

impl Owner {
    pub(super) fn task_rows(&self) -> Vec<TaskRow> {
        self.scheduler.tasks().into_iter().filter_map(|view| self.row(view)).collect()
    }

    pub(super) fn detail(&self, id: &TaskId) -> Option<Detail> {
        let detail = self.scheduler.task_detail(id)?;
        let peers = detail.peers.iter().filter_map(|view| {
            let seat = self.roster.get(view.node)?;
            Some(PeerRow {
                peer: seat.member.peer,
                zone: seat.member.zone.clone(),
                seed: seat.member.role == Role::Seed,
                have: view.have,
                want: view.want,
                leased: view.leased,
                assigned: view.assigned,
            })
        });
        Some(Detail {
            peers: peers.collect(),
            decisions: detail.decisions.iter().map(|decision| self.tell(decision)).collect(),
            row: self.row(detail.task)?,
        })
    }

    /// Nodes that have all of the task.
    pub(super) fn whole_holders(&self, id: &TaskId) -> Vec<NodeId> {
        let Some(detail) = self.scheduler.task_detail(id) else { return Vec::new() };
        let all = detail.task.shape.pieces;
        let whole = detail.peers.iter().filter(|peer| peer.have == all && !peer.quarantined);
        whole.map(|peer| peer.node).collect()
    }

    fn row(&self, view: TaskView) -> Option<TaskRow> {
        let task = self.tasks.get(&view.id)?.task.clone();
        Some(TaskRow { task, view })
    }

    fn tell(&self, decision: &Decision) -> Told {
        let what = match decision.what {
            // By its name instead of its number.
            What::Assigned { parent, pieces, .. } => {
                format!("assigned {pieces} pieces from {}", self.roster.name(parent))
            }
            what => what.to_string(),
        };
        Told {
            at_ms: u64::try_from(decision.at.as_millis()).unwrap_or(u64::MAX),
            node: self.roster.name(decision.node),
            what,
            reason: decision.reason.to_string(),
        }
    }
}
