//! Which scheduler owns which task: rendezvous hashing over those that run.
//!
//! Pure. Whoever knows the same schedulers computes the same owners; when one goes, only its tasks
//! move, evenly to all others.

use skimmer_control_store::Scheduler;
use skimmer_proto::{Digest, TaskId};

/// The schedulers that run, as one of them sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    own: String,
    /// By id.
    all: Vec<Scheduler>,
}

impl Ring {
    /// `own` is among `all`, or added.
    pub fn new(own: &Scheduler, mut all: Vec<Scheduler>) -> Self {
        if all.iter().all(|scheduler| scheduler.id != own.id) {
            all.push(own.clone());
        }
        all.sort_by(|a, b| a.id.cmp(&b.id));
        Self { own: own.id.clone(), all }
    }

    /// All but the own one.
    pub fn others(&self) -> impl Iterator<Item = &Scheduler> {
        self.all.iter().filter(|scheduler| scheduler.id != self.own)
    }

    pub fn is_alone(&self) -> bool {
        self.all.len() == 1
    }

    /// Of all, ascending.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.all.iter().map(|scheduler| scheduler.id.as_str())
    }

    /// The id of the other scheduler that owns the task; `None` if it is the own one.
    pub fn elsewhere(&self, task: &TaskId) -> Option<&str> {
        let weight = |id: &&str| *Digest::of(&[id.as_bytes(), task.as_bytes()].concat()).as_bytes();
        let owner = self.ids().max_by_key(weight)?;
        (owner != self.own).then_some(owner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn scheduler(id: &str) -> Scheduler {
        Scheduler { id: id.into(), address: format!("{id}:8002") }
    }

    fn ring(own: &str, ids: &[&str]) -> Ring {
        Ring::new(&scheduler(own), ids.iter().map(|id| scheduler(id)).collect())
    }

    fn tasks() -> impl Iterator<Item = TaskId> {
        (0..3000_u32).map(|n| TaskId::from_bytes(*Digest::of(&n.to_le_bytes()).as_bytes()))
    }

    fn owners(ids: &[&str]) -> Vec<String> {
        let ring = ring(ids[0], ids);
        let of = |task| ring.elsewhere(&task).unwrap_or(ids[0]).to_owned();
        tasks().map(of).collect()
    }

    #[test]
    fn all_agree_and_share_evenly() {
        let expected = owners(&["a", "b", "c"]);
        assert_eq!(owners(&["c", "b", "a"]), expected, "whoever asks");
        let mut shares = BTreeMap::<&str, usize>::new();
        expected.iter().for_each(|owner| *shares.entry(owner).or_default() += 1);
        assert!(shares.values().all(|share| (900..1100).contains(share)), "{shares:?}");
    }

    #[test]
    fn only_the_tasks_of_who_goes_move() {
        let (before, after) = (owners(&["a", "b", "c"]), owners(&["a", "c"]));
        assert!(before.iter().zip(&after).all(|(was, is)| was == "b" || was == is));
    }

    #[test]
    fn alone_it_owns_everything() {
        let ring = ring("a", &[]);
        assert!(ring.is_alone() && ring.others().next().is_none());
        assert!(tasks().all(|task| ring.elsewhere(&task).is_none()));
    }
}
