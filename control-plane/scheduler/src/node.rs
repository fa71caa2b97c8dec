//! Connected nodes: their links, and what they have been caught at.

use std::collections::{BTreeMap, BTreeSet};

use crate::event::{NodeId, NodeInfo, Now};
use crate::link::Link;

#[derive(Debug)]
pub struct Node {
    pub id: NodeId,
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
    /// Wrong bytes that it is said to have sent.
    pub strikes: u32,
    /// It isn't used as a parent anywhere.
    pub quarantined: bool,
    /// Whom it had quarantined.
    pub accused: BTreeSet<NodeId>,
    /// Its uploads take many times what others' take.
    pub slow: bool,
    /// When a piece last arrived on its disk, or it began to want some.
    pub last_arrival: Now,
    /// No lease before.
    pub no_lease_before: Now,
    pub failed_leases: u32,
    pub leases: u32,
    /// When it is to be looked at again.
    pub wake: Option<Now>,
    /// It is on the list of nodes to look at.
    pub dirty: bool,
}

/// Nodes by a small number that is used again, and by id.
#[derive(Debug, Default)]
pub struct Nodes {
    slab: Vec<Option<Node>>,
    free: Vec<u32>,
    by_id: BTreeMap<NodeId, u32>,
    zones: BTreeMap<String, u32>,
    /// Nodes whose inventory isn't complete.
    pub unannounced: usize,
}

impl Nodes {
    /// A node that is known already keeps its number and loses everything else.
    pub fn insert(&mut self, id: NodeId, info: NodeInfo) -> u32 {
        let next = u32::try_from(self.zones.len()).unwrap_or(u32::MAX);
        let zone = *self.zones.entry(info.zone).or_insert(next);
        let node = Node {
            id,
            seed: info.seed,
            zone,
            up: Link::up(info.upload),
            down: Link::down(info.download),
            tasks: BTreeMap::new(),
            active: Vec::new(),
            announced: false,
            strikes: 0,
            quarantined: false,
            accused: BTreeSet::new(),
            slow: false,
            last_arrival: Now::ZERO,
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

    pub fn remove(&mut self, number: u32) {
        if let Some(node) = self.slab[number as usize].take() {
            self.by_id.remove(&node.id);
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
