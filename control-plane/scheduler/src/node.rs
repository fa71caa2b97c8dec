//! Connected nodes: their links, and what they have been caught at.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use skimmer_proto::TaskId;

use crate::event::{NodeId, NodeInfo, Now};
use crate::limits::Limits;
use crate::link::Link;

/// Nodes that have left and whose conduct is remembered.
const REMEMBERED: usize = 4096;

/// What a node is known for, on whichever stream.
#[derive(Clone, Debug, Default)]
pub struct Conduct {
    /// Wrong bytes that it is said to have sent.
    pub strikes: u32,
    /// It isn't used as a parent anywhere.
    pub quarantined: bool,
    /// Where it isn't in any case; no more than it takes to be quarantined.
    pub blamed: BTreeSet<TaskId>,
    /// The keys of those whom it had quarantined.
    pub accused: BTreeSet<[u8; 32]>,
}

impl Conduct {
    fn is_clean(&self) -> bool {
        self.strikes == 0 && self.accused.is_empty()
    }
}

#[derive(Debug)]
pub struct Node {
    pub id: NodeId,
    pub key: [u8; 32],
    pub seed: bool,
    /// Number of its zone.
    pub zone: u32,
    pub up: Link,
    pub down: Link,
    /// Its slot in each of its tasks.
    pub tasks: BTreeMap<u32, u32>,
    /// Those of them that anybody wants something of.
    pub active: Vec<(u32, u32)>,
    /// Its inventory is complete.
    pub announced: bool,
    pub conduct: Conduct,
    /// Its uploads take many times what others' take.
    pub slow: bool,
    /// When a piece last arrived on its disk, or it began to want some.
    pub last_arrival: Now,
    /// How long a transfer takes to it, as the latest showed, or at least so long, as those that were taken back did.
    pub pace: Duration,
    /// A transfer to it has ended by itself: what takes much longer than that is its parent's doing.
    pub paced: bool,
    /// No lease before.
    pub no_lease_before: Now,
    pub failed_leases: u32,
    pub leases: u32,
    /// When it is to be looked at again.
    pub wake: Option<Now>,
    /// It is on the list of nodes to look at.
    pub dirty: bool,
}

impl Node {
    /// Transfers from it and to it at a time.
    pub const fn most(&self, limits: &Limits) -> (u32, u32) {
        let up = self.up.most(limits.uploads, limits.untold);
        (up, self.down.most(limits.downloads, limits.untold))
    }
}

/// Nodes by a small number that is used again, and by id.
#[derive(Debug, Default)]
pub struct Nodes {
    slab: Vec<Option<Node>>,
    free: Vec<u32>,
    by_id: BTreeMap<NodeId, u32>,
    zones: BTreeMap<String, u32>,
    /// Of nodes that have left, by key, and until when.
    past: BTreeMap<[u8; 32], (Now, Conduct)>,
    /// Nodes whose inventory isn't complete.
    pub unannounced: usize,
}

impl Nodes {
    /// A new stream of a node, which is known for what it did on others.
    pub fn insert(&mut self, now: Now, id: NodeId, info: NodeInfo) -> u32 {
        let past = self.past.remove(&info.key).filter(|(until, _)| *until > now);
        let next = u32::try_from(self.zones.len()).unwrap_or(u32::MAX);
        let zone = *self.zones.entry(info.zone).or_insert(next);
        let node = Node {
            id,
            key: info.key,
            seed: info.seed,
            zone,
            up: Link::up(info.upload),
            down: Link::down(info.download),
            tasks: BTreeMap::new(),
            active: Vec::new(),
            announced: false,
            conduct: past.map(|(_, conduct)| conduct).unwrap_or_default(),
            slow: false,
            last_arrival: Now::ZERO,
            pace: Duration::ZERO,
            paced: false,
            no_lease_before: Now::ZERO,
            failed_leases: 0,
            leases: 0,
            wake: None,
            dirty: false,
        };
        self.unannounced += 1;
        let number = self.free.pop().unwrap_or_else(|| {
            self.slab.push(None);
            u32::try_from(self.slab.len() - 1).unwrap_or(u32::MAX)
        });
        self.slab[number as usize] = Some(node);
        self.by_id.insert(id, number);
        number
    }

    /// What the node is known for is remembered until then.
    pub fn remove(&mut self, now: Now, number: u32, memory: Duration) {
        if let Some(node) = self.slab[number as usize].take() {
            self.by_id.remove(&node.id);
            if !node.conduct.is_clean() {
                self.past.retain(|_, (until, _)| *until > now);
                if self.past.len() >= REMEMBERED {
                    let oldest = self.past.iter().min_by_key(|(_, (until, _))| *until);
                    oldest.map(|(key, _)| *key).map(|key| self.past.remove(&key));
                }
                self.past.insert(node.key, (now + memory, node.conduct));
            }
            self.free.push(number);
            self.unannounced -= usize::from(!node.announced);
        }
    }

    pub fn number(&self, id: NodeId) -> Option<u32> {
        self.by_id.get(&id).copied()
    }

    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    pub fn get(&self, number: u32) -> Option<&Node> {
        self.slab.get(number as usize)?.as_ref()
    }

    pub fn get_mut(&mut self, number: u32) -> Option<&mut Node> {
        self.slab.get_mut(number as usize)?.as_mut()
    }

    /// In the order in which they joined.
    pub fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.by_id.values().copied()
    }
}
