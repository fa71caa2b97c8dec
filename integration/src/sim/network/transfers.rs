//! One piece from a parent or the origin to a child: request, upload, download, and what can go wrong.

use std::time::Duration;

use skimmer_proto::PieceSet;
use skimmer_scheduler::{Event, Fault, NodeId};

use super::super::planner::Planner as _;
use super::{BURST, LOSS, Oddity, STALL, Transfer, What, World, time};

impl World<'_> {
    pub(super) fn fetch(&mut self, child: u32, parent: Option<u32>, piece: u32) {
        self.next_transfer += 1;
        let id = self.next_transfer;
        self.transfers.insert(id, Transfer { child, parent, piece });
        self.at(self.now + self.setup.latency, What::Request(id));
        if self.setup.oddities.contains(&Oddity::Stalling) {
            // A slow node knows that it is.
            let own = time(self.setup.shape.piece_len, self.nodes[child as usize].rate);
            self.at(self.now + STALL + own * 8, What::Patience(id));
        }
    }

    pub(super) fn request(&mut self, id: u64) {
        let Some(transfer) = self.transfers.get(&id) else { return };
        let (child, parent, piece) = (transfer.child, transfer.parent, transfer.piece);
        let back = self.now + self.setup.latency;
        let Some(parent) = parent else {
            let node = &mut self.nodes[child as usize];
            node.leases += 1;
            match node.oddity {
                Oddity::Refused => return self.at(back, What::Fail(id, Fault::Refused)),
                Oddity::Unlucky if node.leases % 2 == 1 => {
                    return self.at(back, What::Fail(id, Fault::Gone));
                }
                _ => {}
            }
            self.origin.queue.push_back(id);
            return self.serve(None);
        };
        let node = &mut self.nodes[parent as usize];
        if !node.alive {
            return self.at(back + LOSS, What::Fail(id, Fault::Gone));
        }
        if node.oddity == Oddity::Stalling {
            return;
        }
        if !node.have.contains(piece) {
            return self.at(back, What::Fail(id, Fault::Absent));
        }
        node.up.queue.push_back(id);
        self.serve(Some(parent));
    }

    /// Begins with the next request if the upload is free.
    pub(super) fn serve(&mut self, parent: Option<u32>) {
        let (up, rate) = match parent {
            None => (&mut self.origin, self.setup.rate),
            Some(parent) => {
                let node = &mut self.nodes[parent as usize];
                (&mut node.up, node.rate)
            }
        };
        if up.busy.is_some() {
            return;
        }
        let Some(id) =
            std::iter::from_fn(|| up.queue.pop_front()).find(|id| self.transfers.contains_key(id))
        else {
            return;
        };
        up.busy = Some(id);
        self.outcome.origin_pieces += u64::from(parent.is_none());
        let end = self.now + time(self.setup.shape.piece_len, rate);
        self.at(end, What::Sent(parent, id));
        self.at(self.now + self.setup.latency, What::FirstByte(id, end + self.setup.latency));
    }

    pub(super) fn sent(&mut self, parent: Option<u32>, id: u64) {
        let up = match parent {
            None => &mut self.origin,
            Some(parent) => &mut self.nodes[parent as usize].up,
        };
        if up.busy == Some(id) {
            up.busy = None;
            self.serve(parent);
        }
    }

    pub(super) fn first_byte(&mut self, id: u64, last: Duration) {
        let Some(transfer) = self.transfers.get(&id) else { return };
        let node = &mut self.nodes[transfer.child as usize];
        let through = node.down_free.max(self.now) + time(self.setup.shape.piece_len, node.rate);
        node.down_free = through.max(last);
        let at = node.down_free;
        self.at(at, What::Arrive(id));
    }

    pub(super) fn arrive(&mut self, id: u64) {
        let Some(transfer) = self.transfers.get(&id) else { return };
        let (child, parent, piece) = (transfer.child, transfer.parent, transfer.piece);
        if let Some(parent) = parent {
            let parent = &self.nodes[parent as usize];
            if parent.dead {
                // It is noticed when the connection is.
                return;
            }
            if parent.oddity == Oddity::Corrupt {
                return self.fail(id, Fault::Corrupt);
            }
            self.outcome.peer_pieces += 1;
            self.outcome.across += u64::from(parent.zone != self.nodes[child as usize].zone);
        } else {
            self.outcome.origin_arrived += 1;
        }
        self.transfers.remove(&id);
        let task = self.setup.task();
        let node = &mut self.nodes[child as usize];
        if !node.have.insert(piece) {
            return;
        }
        if node.have.len() == self.setup.shape.pieces && node.done.is_none() {
            node.done = Some(self.now - BURST);
            self.unfinished -= 1;
        }
        let steps = self.nodes[child as usize].planner.arrived(piece);
        let pieces: PieceSet = std::iter::once(piece).collect();
        let followers: Vec<u32> = self.nodes[child as usize].followers.iter().copied().collect();
        for follower in followers {
            let news = What::Has(follower, child, pieces.clone());
            self.at(self.now + self.setup.latency, news);
        }
        self.report(Event::Arrived { node: NodeId(u64::from(child)), task, pieces });
        self.take(child, steps);
    }

    pub(super) fn fail(&mut self, id: u64, fault: Fault) {
        let Some(transfer) = self.transfers.remove(&id) else { return };
        let from = transfer.parent.map(|parent| NodeId(u64::from(parent)));
        let pieces: PieceSet = std::iter::once(transfer.piece).collect();
        let (node, task) = (NodeId(u64::from(transfer.child)), self.setup.task());
        let steps = self.nodes[transfer.child as usize].planner.failed(from, &pieces);
        self.report(Event::Failed { node, task, pieces, parent: from, fault });
        self.take(transfer.child, steps);
    }
}
