//! What events say of nodes and pieces, written down.

use skimmer_proto::{PieceSet, TaskId};

use super::{Scheduler, run_of};
use crate::event::{Action, Class, NodeId, NodeInfo, Reason, Shape};
use crate::fetch::Fetch;
use crate::task::{Mode, Task};
use crate::view::What;

impl Scheduler {
    pub(super) fn joined(&mut self, id: NodeId, info: NodeInfo) {
        self.left(id);
        self.nodes.insert(self.now, id, info);
        self.last_join = self.now;
    }

    pub(super) fn left(&mut self, id: NodeId) {
        let Some(number) = self.nodes.number(id) else { return };
        let tasks = self.nodes.get_mut(number).map(|node| std::mem::take(&mut node.tasks));
        for (task, slot) in tasks.unwrap_or_default() {
            self.leave_task(task, slot);
        }
        self.nodes.remove(self.now, number, self.limits.memory);
    }

    fn leave_task(&mut self, task: u32, slot: u32) {
        self.drop_wants(task, slot);
        self.drop_children(task, slot);
        self.unlink(task, slot);
        if let Some(of) = self.task_mut(task) {
            of.mute(slot, true);
            of.remove_peer(slot);
        }
        self.touch_task(task);
    }

    pub(super) fn announce(&mut self, id: NodeId, task: TaskId, shape: Shape, pieces: &PieceSet) {
        let Some((task, slot)) = self.enter(id, task, shape, pieces) else { return };
        let Some(of) = self.task_mut(task) else { return };
        for piece in pieces.iter() {
            of.set_lack(slot, piece, false);
            of.gain(slot, piece);
        }
        self.after(task, slot);
    }

    pub(super) fn announced(&mut self, id: NodeId) {
        let Some(number) = self.nodes.number(id) else { return };
        if let Some(node) = self.nodes.get_mut(number)
            && !std::mem::replace(&mut node.announced, true)
        {
            self.nodes.unannounced -= 1;
        }
    }

    pub(super) fn want(
        &mut self,
        id: NodeId,
        task: TaskId,
        shape: Shape,
        pieces: &PieceSet,
        class: Class,
        origin: bool,
    ) {
        let Some((task, slot)) = self.enter(id, task, shape, pieces) else { return };
        if pieces.is_empty() {
            return;
        }
        self.activate(task);
        let Some(of) = self.task_mut(task) else { return };
        let Some(peer) = of.peer_mut(slot) else { return };
        peer.origin = origin;
        match class {
            Class::Fault => peer.fault.insert_all(pieces),
            _ if !peer.wants() || class < peer.class => peer.class = class,
            _ => {}
        }
        let reads = !peer.fault.is_empty();
        let coming: PieceSet = peer.fetches.iter().flat_map(Fetch::pieces).collect();
        for piece in pieces.difference(&coming).iter() {
            of.lose(slot, piece);
            of.set_lack(slot, piece, true);
        }
        of.barren = false;
        if reads {
            of.readers.insert(slot);
        }
        self.after(task, slot);
        self.seed(task);
    }

    pub(super) fn arrived(&mut self, id: NodeId, task: TaskId, pieces: &PieceSet) {
        let Some((task, slot)) = self.find(id, task) else { return };
        let Some(of) = self.task(task) else { return };
        let count = of.shape.pieces;
        if let Some(node) = self.nodes.number(id).and_then(|number| self.nodes.get_mut(number)) {
            node.last_arrival = self.now;
        }
        for piece in pieces.iter().take_while(|piece| *piece < count) {
            self.land(task, slot, piece);
        }
        if let Some(of) = self.task_mut(task)
            && of.readers.contains(&slot)
            && let Some(peer) = of.peer_mut(slot)
        {
            peer.fault.remove_all(pieces);
            if peer.fault.is_empty() {
                of.readers.remove(&slot);
            }
        }
        self.after(task, slot);
    }

    /// One piece is on a node's disk, through a transfer of ours or otherwise.
    fn land(&mut self, task: u32, slot: u32, piece: u32) {
        let Some(of) = self.task_mut(task) else { return };
        let Some(peer) = of.peer_mut(slot) else { return };
        let Some(at) = peer.fetches.iter_mut().position(|fetch| fetch.take(piece)) else {
            of.set_lack(slot, piece, false);
            of.gain(slot, piece);
            of.from_peers += u64::from(of.active);
            return;
        };
        let fetch = &peer.fetches[at];
        let (origin, over) = (fetch.parent.is_none(), fetch.is_over());
        of.land(slot, piece);
        *(if origin { &mut of.from_origin } else { &mut of.from_peers }) += 1;
        if over {
            self.end(task, slot, at, true);
        }
    }

    pub(super) fn withdraw(&mut self, id: NodeId, task: TaskId, pieces: Option<&PieceSet>) {
        let Some((task, slot)) = self.find(id, task) else { return };
        match pieces {
            None => self.drop_wants(task, slot),
            Some(pieces) => self.drop_pieces(task, slot, pieces),
        }
        self.after(task, slot);
    }

    /// Some of what a peer wanted, on its way or not, isn't wanted any more.
    fn drop_pieces(&mut self, task: u32, slot: u32, pieces: &PieceSet) {
        self.call_off(task, slot, pieces, |_| true);
        let Some(of) = self.task_mut(task) else { return };
        let count = of.shape.pieces;
        for piece in pieces.iter().take_while(|piece| *piece < count) {
            of.set_lack(slot, piece, false);
        }
        let Some(peer) = of.peer_mut(slot) else { return };
        peer.fault.remove_all(pieces);
        if peer.fault.is_empty() {
            of.readers.remove(&slot);
        }
        self.touch_task(task);
    }

    /// Takes pieces off a peer's transfers, of those from `chosen` parents; which they were.
    pub(super) fn call_off(
        &mut self,
        task: u32,
        slot: u32,
        pieces: &PieceSet,
        chosen: impl Fn(Option<u32>) -> bool,
    ) -> PieceSet {
        let (mut taken, mut at) = (PieceSet::new(), 0);
        while let Some(of) = self.task_mut(task)
            && let Some(peer) = of.peer_mut(slot)
            && at < peer.fetches.len()
        {
            let zone = peer.zone;
            let fetch = &mut peer.fetches[at];
            if !chosen(fetch.parent) {
                at += 1;
                continue;
            }
            let off: Vec<u32> = fetch.pieces().filter(|piece| pieces.contains(*piece)).collect();
            for piece in &off {
                fetch.take(*piece);
            }
            let over = fetch.is_over();
            for piece in off {
                of.give_up(slot, zone, piece);
                taken.insert(piece);
            }
            if over {
                self.end(task, slot, at, false);
            } else {
                at += 1;
            }
        }
        taken
    }

    /// The wants of a peer, and what is on its way to it, are over.
    fn drop_wants(&mut self, task: u32, slot: u32) {
        while let Some(peer) = self.task(task).and_then(|of| of.peer(slot)) {
            if peer.fetches.is_empty() {
                break;
            }
            self.end(task, slot, 0, false);
        }
        let Some(of) = self.task_mut(task) else { return };
        let Some(peer) = of.peer_mut(slot) else { return };
        peer.fault = PieceSet::new();
        let lack = peer.lack.clone();
        of.readers.remove(&slot);
        for piece in lack.iter() {
            of.set_lack(slot, piece, false);
        }
        self.count_wanting(task, slot);
    }

    /// Whatever is fetched from a peer has to come from elsewhere.
    pub(super) fn drop_children(&mut self, task: u32, slot: u32) {
        while let Some(child) =
            self.task(task).and_then(|of| of.peer(slot)?.children.first().copied())
        {
            let fetches = self.task(task).and_then(|of| Some(&of.peer(child)?.fetches));
            let at = fetches.and_then(|f| f.iter().position(|fetch| fetch.parent == Some(slot)));
            let Some(at) = at else { break };
            self.take_back(task, child, at, Reason::ParentGone);
        }
    }

    /// A transfer is taken from a node and its pieces are wanted again.
    pub(super) fn take_back(&mut self, task: u32, slot: u32, at: usize, reason: Reason) {
        let fetch = self.task(task).and_then(|of| of.peer(slot)?.fetches.get(at));
        let Some(pieces) = fetch.map(Fetch::set) else { return };
        self.end(task, slot, at, false);
        if let Some(of) = self.task_mut(task) {
            pieces.iter().for_each(|piece| of.set_lack(slot, piece, true));
        }
        self.cancel(task, slot, pieces, reason);
        self.after(task, slot);
    }

    /// A transfer is over; pieces of it that haven't arrived are nobody's.
    pub(super) fn end(&mut self, task: u32, slot: u32, at: usize, whole: bool) {
        let now = self.now;
        let Some(of) = self.tasks.get_mut(task as usize).and_then(Option::as_mut) else { return };
        let Some(peer) = of.peer_mut(slot) else { return };
        let (node, zone) = (peer.node, peer.zone);
        let fetch = peer.fetches.remove(at);
        for piece in fetch.pieces() {
            of.give_up(slot, zone, piece);
        }
        self.touch_node(node);
        if let Some(parent) = fetch.parent {
            self.end_upload(task, slot, &fetch, parent, whole);
            if let Some(node) = self.nodes.get_mut(node) {
                node.down.end(now, &fetch, whole);
                if whole {
                    (node.pace, node.paced) = (now.saturating_sub(fetch.since), true);
                }
            }
        } else {
            self.end_lease(task, slot, &fetch, whole);
        }
        self.touch_task(task);
    }

    fn end_upload(&mut self, task: u32, slot: u32, fetch: &Fetch, parent: u32, whole: bool) {
        let now = self.now;
        let Some(peer) = self.task_mut(task).and_then(|of| of.peer_mut(parent)) else { return };
        if let Some(at) = peer.children.iter().position(|child| *child == slot) {
            peer.children.swap_remove(at);
        }
        if whole && !peer.complaints.is_empty() {
            peer.complaints.clear();
        }
        let number = peer.node;
        if let Some(node) = self.nodes.get_mut(number) {
            node.up.end(now, fetch, whole);
        }
        self.touch_node(number);
    }

    /// What every change of a peer's sets ends with.
    pub(super) fn after(&mut self, task: u32, slot: u32) {
        self.count_wanting(task, slot);
        if let Some(node) = self.task(task).and_then(|of| Some(of.peer(slot)?.node)) {
            self.touch_node(node);
        }
        self.touch_task(task);
    }

    fn count_wanting(&mut self, task: u32, slot: u32) {
        let Some(of) = self.task_mut(task) else { return };
        let Some(peer) = of.peer_mut(slot) else { return };
        let wants = peer.wants();
        if std::mem::replace(&mut peer.wanting, wants) == wants {
            return;
        }
        of.wanting = if wants { of.wanting + 1 } else { of.wanting - 1 };
        if wants {
            self.begin_wanting(task, slot);
        } else {
            self.end_wanting(task, slot);
        }
    }

    /// The task and the node's slot in it, if it is part of it.
    pub(super) fn find(&self, id: NodeId, task: TaskId) -> Option<(u32, u32)> {
        let task = *self.by_id.get(&task)?;
        let node = self.nodes.get(self.nodes.number(id)?)?;
        Some((task, *node.tasks.get(&task)?))
    }

    /// The same, and it becomes part of it; `None` if the node is unknown, has too many tasks, or means another blob.
    fn enter(
        &mut self,
        id: NodeId,
        task: TaskId,
        shape: Shape,
        pieces: &PieceSet,
    ) -> Option<(u32, u32)> {
        let number = self.nodes.number(id)?;
        if shape.pieces == 0 || pieces.iter().last().is_some_and(|last| last >= shape.pieces) {
            return None;
        }
        let known = self.by_id.get(&task).copied();
        if let Some(of) = known.and_then(|task| self.task(task))
            && of.shape != shape
        {
            return None;
        }
        if let Some(slot) = known.and_then(|task| self.nodes.get(number)?.tasks.get(&task)) {
            return Some((known?, *slot));
        }
        if self.nodes.get(number)?.tasks.len() >= self.limits.tasks_per_node {
            return None;
        }
        let index = known.unwrap_or_else(|| self.new_task(task, shape));
        let zone = self.nodes.get(number)?.zone;
        let of = self.task_mut(index)?;
        let slot = of.add_peer(number, id, zone);
        let active = of.active;
        let node = self.nodes.get_mut(number)?;
        node.tasks.insert(index, slot);
        let quarantined = node.conduct.quarantined || node.conduct.blamed.contains(&task);
        if active {
            node.active.push((index, slot));
        }
        if let Some(peer) = self.task_mut(index).and_then(|of| of.peer_mut(slot)) {
            peer.muted = quarantined;
        }
        Some((index, slot))
    }

    fn new_task(&mut self, id: TaskId, shape: Shape) -> u32 {
        let run = run_of(shape.pieces, self.limits.run);
        let task = Task::new(id, shape, run);
        let index = self.free_tasks.pop().unwrap_or_else(|| {
            self.tasks.push(None);
            u32::try_from(self.tasks.len() - 1).unwrap_or(u32::MAX)
        });
        self.tasks[index as usize] = Some(task);
        self.by_id.insert(id, index);
        index
    }

    /// Somebody begins to want something of the task.
    fn activate(&mut self, task: u32) {
        let Some(of) = self.tasks.get_mut(task as usize).and_then(Option::as_mut) else { return };
        if of.active {
            return;
        }
        of.activate();
        for (slot, peer) in of.slots() {
            if let Some(node) = self.nodes.get_mut(peer.node) {
                node.active.push((task, slot));
            }
        }
        let peers: Vec<u32> = of.slots().map(|(_, peer)| peer.node).collect();
        peers.into_iter().for_each(|node| self.touch_node(node));
        self.find_slow_nodes();
        let next = self.now + self.limits.sweep;
        self.next_sweep.get_or_insert(next);
    }

    /// Nobody wants anything of the task any more: only who has what is kept, and nothing if nobody has.
    pub(super) fn forget(&mut self, task: u32) {
        let Some(of) = self.tasks.get_mut(task as usize).and_then(Option::as_mut) else { return };
        if of.active && of.wanting == 0 {
            of.deactivate();
            for (_, peer) in of.slots() {
                if let Some(node) = self.nodes.get_mut(peer.node) {
                    node.active.retain(|(other, _)| *other != task);
                }
            }
        }
        if !of.active {
            let empty: Vec<(u32, u32)> = of
                .slots()
                .filter(|(_, peer)| peer.have.is_empty())
                .map(|(slot, peer)| (slot, peer.node))
                .collect();
            for (slot, node) in empty {
                of.remove_peer(slot);
                if let Some(node) = self.nodes.get_mut(node) {
                    node.tasks.remove(&task);
                }
            }
        }
        if of.count == 0 {
            self.by_id.remove(&of.id);
            self.tasks[task as usize] = None;
            self.free_tasks.push(task);
        }
    }

    /// The first nodes want a task that nobody has whole: a seed peer gets it too.
    fn seed(&mut self, task: u32) {
        let Some(of) = self.task(task).filter(|of| !of.seeded && of.mode == Mode::Direct) else {
            return;
        };
        let seeds =
            |number: u32| self.nodes.get(number).filter(|n| n.seed && !n.conduct.quarantined);
        let served = of.slots().any(|(_, peer)| {
            (peer.wanting || of.is_complete(peer)) && seeds(peer.node).is_some()
                || of.is_complete(peer) && !peer.muted
        });
        let chosen = self
            .nodes
            .numbers()
            .filter_map(|number| seeds(number).map(|n| (n.active.len(), n.id)))
            .min();
        let id = of.id;
        if let Some(of) = self.task_mut(task) {
            of.seeded = true;
        }
        if let (false, Some((_, node))) = (served, chosen) {
            self.note(task, node, What::Seed, Reason::SeedFirst);
            self.actions.push(Action::Seed { node, task: id, reason: Reason::SeedFirst });
        }
    }
}
