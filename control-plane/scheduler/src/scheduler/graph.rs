//! Tasks too large to be planned piece by piece: each node gets some neighbours and picks among what they have. Only the
//! first copies of a piece are still assigned (see [`super::matching`]).
//!
//! Within a zone every node is joined to others at random; into a zone lead a few edges from all others, so that a
//! piece crosses into it about once.

use super::Scheduler;
use crate::event::{Action, NodeId, Reason};
use crate::task::{Mode, Task};
use crate::view::What;

/// Tries to find a partner with room.
const PROBES: u32 = 64;
/// Lonely peers of a task that are looked after at a time.
const LONELY: usize = 256;

impl Scheduler {
    /// A peer begins to want something: does it still go piece by piece?
    pub(super) fn begin_wanting(&mut self, task: u32, slot: u32) {
        let Some(of) = self.tasks.get_mut(task as usize).and_then(Option::as_mut) else { return };
        let bytes = of.shape.piece_len.saturating_mul(u64::from(of.run)).max(1);
        let Some(peer) = of.peer_mut(slot) else { return };
        let Some(node) = self.nodes.get_mut(peer.node) else { return };
        node.last_arrival = self.now;
        let link = if node.up.rate() == 0 { self.limits.assumed_rate } else { node.up.rate() };
        peer.rate = link.saturating_mul(1000) / bytes;
        peer.told = self.now;
        let rate = peer.rate;
        of.rate += rate;
        if of.mode == Mode::Graph {
            self.link(task, slot);
            self.send_neighbours(task);
            return;
        }
        self.rate += rate;
        let cells = u64::from(of.count) * u64::from(of.shape.pieces);
        if self.rate > self.limits.rate * 1000 || cells > self.limits.cells {
            self.rate -= of.rate;
            of.become_graph();
            let slots: Vec<u32> =
                of.slots().filter(|(_, p)| p.wanting).map(|(slot, _)| slot).collect();
            slots.into_iter().for_each(|slot| self.link(task, slot));
            self.send_neighbours(task);
        }
    }

    pub(super) fn end_wanting(&mut self, task: u32, slot: u32) {
        let Some(of) = self.tasks.get_mut(task as usize).and_then(Option::as_mut) else { return };
        let Some(peer) = of.peer_mut(slot) else { return };
        let rate = std::mem::take(&mut peer.rate);
        of.rate -= rate;
        if of.mode == Mode::Direct {
            self.rate -= rate;
        }
    }

    /// Finds neighbours for a peer that has too few.
    fn link(&mut self, task: u32, slot: u32) {
        let (enough, most) = self.limits.degree;
        let edges = self.limits.zone_edges as usize;
        let Some(of) = self.task_mut(task) else { return };
        let Some(peer) = of.peer(slot).filter(|peer| !peer.muted) else { return };
        let zone = peer.zone;
        // Others will be joined to this one later: it looks for half of what it may have.
        let mut more = most.div_ceil(2);
        for probe in 0..PROBES {
            if more == 0 || of.peer(slot).is_none_or(|p| p.neighbours.len() >= enough as usize) {
                break;
            }
            if let Some(other) = pick(of, zone, slot, probe) {
                more -= u32::from(join(of, slot, other, most as usize));
            }
        }
        let crossing = || {
            let near = of.slots().filter(|(_, peer)| peer.zone == zone);
            near.map(|(_, peer)| far(of, &peer.neighbours, zone)).sum::<usize>()
        };
        if of.zones.len() > 1 && crossing() < edges {
            let other = (0..PROBES).find_map(|probe| {
                let zone = (zone + 1 + probe as usize) % of.zones.len();
                pick(of, zone, slot, probe).filter(|other| {
                    of.peer(*other)
                        .is_some_and(|p| p.zone != of.peer(slot).map_or(zone, |p| p.zone))
                })
            });
            if let Some(other) = other {
                join(of, slot, other, most as usize + 1);
            }
        }
        of.regraph.push(slot);
    }

    /// Finds more neighbours for those that came when most had enough: by now others are in the same place.
    pub(super) fn link_lonely(&mut self, task: u32) {
        let enough = self.limits.degree.0 as usize;
        let Some(of) = self.task(task).filter(|of| of.mode == Mode::Graph) else { return };
        let is_lonely = |slot: &u32| {
            of.peer(*slot).is_some_and(|peer| peer.wanting && peer.neighbours.len() < enough)
        };
        // From another place each time: there may be no room for the first ones.
        let count = u32::try_from(of.peers.len()).unwrap_or(u32::MAX);
        let place = mix(u64::try_from(self.now.as_millis()).unwrap_or(0)) % u64::from(count.max(1));
        let from = u32::try_from(place).unwrap_or(0);
        let all = (from..count).chain(0..from);
        let lonely: Vec<u32> = all.filter(is_lonely).take(LONELY).collect();
        lonely.into_iter().for_each(|slot| self.link(task, slot));
    }

    /// A peer is nobody's neighbour any more.
    pub(super) fn unlink(&mut self, task: u32, slot: u32) {
        let least = self.limits.degree.0 as usize / 2;
        let Some(of) = self.task_mut(task) else { return };
        let Some(peer) = of.peer_mut(slot) else { return };
        let neighbours = std::mem::take(&mut peer.neighbours);
        let mut short = Vec::new();
        for other in neighbours {
            if let Some(peer) = of.peer_mut(other) {
                peer.neighbours.retain(|n| *n != slot);
                if peer.neighbours.len() < least && peer.wanting {
                    short.push(other);
                }
            }
            of.regraph.push(other);
        }
        if of.mode == Mode::Graph {
            short.into_iter().for_each(|other| self.link(task, other));
        }
    }

    /// Tells those whose neighbours have changed.
    pub(super) fn send_neighbours(&mut self, task: u32) {
        let Some(of) = self.task_mut(task) else { return };
        let mut changed = std::mem::take(&mut of.regraph);
        changed.sort_unstable();
        changed.dedup();
        for slot in changed {
            let Some(of) = self.task(task) else { return };
            let Some(peer) = of.peer(slot).filter(|peer| peer.wanting) else { continue };
            let peers: Vec<NodeId> =
                peer.neighbours.iter().filter_map(|other| Some(of.peer(*other)?.id)).collect();
            let (node, id, reason) = (peer.id, of.id, Reason::LargeSwarm);
            let count = u32::try_from(peers.len()).unwrap_or(u32::MAX);
            self.note(task, node, What::Neighbours { count }, reason);
            self.actions.push(Action::Neighbours { node, task: id, peers, reason });
        }
    }
}

/// A peer of a zone other than `slot`, by a hash of the three numbers.
fn pick(of: &Task, zone: usize, slot: u32, probe: u32) -> Option<u32> {
    let words: Vec<u32> = of.zones[zone].words.iter().collect();
    let hash = mix(u64::from(slot) << 32 | u64::from(probe) << 8 | zone as u64);
    let slots = words.len() as u64 * 64;
    let at = hash.checked_rem(slots)?;
    let word = words.get(usize::try_from(at / 64).ok()?)?;
    let other = word * 64 + u32::try_from(at % 64).ok()?;
    of.peer(other).filter(|peer| other != slot && !peer.muted).map(|_| other)
}

/// Makes two peers neighbours of each other if they aren't and have room.
fn join(of: &mut Task, a: u32, b: u32, most: usize) -> bool {
    let room = |slot: u32| of.peer(slot).is_some_and(|peer| peer.neighbours.len() < most);
    let joined = of.peer(a).is_some_and(|peer| peer.neighbours.contains(&b));
    if joined || !room(a) || !room(b) {
        return false;
    }
    for (slot, other) in [(a, b), (b, a)] {
        if let Some(peer) = of.peer_mut(slot) {
            peer.neighbours.push(other);
        }
        of.regraph.push(slot);
    }
    true
}

fn far(of: &Task, neighbours: &[u32], zone: usize) -> usize {
    neighbours.iter().filter(|n| of.peer(**n).is_some_and(|peer| peer.zone != zone)).count()
}

/// The finalizer of SplitMix64.
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
