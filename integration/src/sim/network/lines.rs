//! How the bytes of several transfers share a node's links.
//!
//! In turn: a link carries one piece after the other, which is cheap to simulate for thousands of nodes. Fairly: all
//! transfers of a link go on at once, as over TCP, each with its max-min fair share of both its ends.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::{RequestKey, What, World, time};
use crate::sim::Sharing;

/// What is sent one after the other: everything of a node, or what is on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LineKey {
    /// `None`: the origin.
    parent: Option<u32>,
    connection: Option<(u32, u64)>,
}

#[derive(Default)]
pub struct Line {
    pub queue: VecDeque<RequestKey>,
    pub busy: bool,
}

/// A piece under way over links that are shared.
struct Flow {
    line: LineKey,
    request: RequestKey,
    piece: u32,
    parent: Option<u32>,
    child: u32,
    /// Bytes to go, and how many go per second.
    left: f64,
    rate: f64,
}

/// The flows of shared links.
#[derive(Default)]
pub struct Flows {
    flows: BTreeMap<u64, Flow>,
    next: u64,
    /// When `left` was right.
    at: Duration,
    /// Of the latest wake-up; earlier ones count for nothing.
    pub generation: u64,
}

impl World<'_> {
    pub fn line_of(&self, key: RequestKey) -> Option<LineKey> {
        let request = self.requests.get(&key)?;
        let parent = request.parent;
        let connection = match (self.setup.sharing, parent) {
            (Sharing::InTurn, _) => None,
            // A connection for each request to the origin, and one for each pair of nodes.
            (Sharing::Fair, None) => Some((key.0, key.1.0)),
            (Sharing::Fair, Some(_)) => Some((key.0, 0)),
        };
        Some(LineKey { parent, connection })
    }

    /// Begins with the next piece if the line is free.
    pub fn serve(&mut self, line: LineKey) {
        let Some(queue) = self.lines.get_mut(&line).filter(|line| !line.busy) else { return };
        let (request, piece) = loop {
            let Some(key) = queue.queue.pop_front() else {
                self.lines.remove(&line);
                return;
            };
            // It may have been abandoned.
            let Some(request) = self.requests.get_mut(&key) else { continue };
            let Some(piece) = request.unsent.pop_front() else { continue };
            if !request.unsent.is_empty() {
                queue.queue.push_front(key);
            }
            break (key, piece);
        };
        queue.busy = true;
        self.outcome.origin_pieces += u64::from(line.parent.is_none());
        let (now, latency) = (self.now, self.setup.latency);
        let len = self.setup.shape.piece_len;
        match self.setup.sharing {
            Sharing::InTurn => {
                let end = now + time(len, self.uplink(line.parent));
                self.at(end, What::Sent(line));
                self.at(now + latency, What::FirstByte(request, piece, end + latency));
            }
            Sharing::Fair => {
                self.advance();
                let flow = Flow {
                    line,
                    request,
                    piece,
                    parent: line.parent,
                    child: request.0,
                    left: len as f64,
                    rate: 0.0,
                };
                self.flows.next += 1;
                self.flows.flows.insert(self.flows.next, flow);
                self.share();
            }
        }
    }

    pub fn sent(&mut self, line: LineKey) {
        if let Some(known) = self.lines.get_mut(&line) {
            known.busy = false;
            self.serve(line);
        }
    }

    fn uplink(&self, parent: Option<u32>) -> u64 {
        parent.map_or(self.setup.rate, |parent| self.nodes[parent as usize].rate)
    }

    /// Flows whose last byte has left, and those that nobody waits for.
    pub fn flows_end(&mut self) {
        self.advance();
        let mut over = Vec::new();
        for (id, flow) in &self.flows.flows {
            if flow.left < 1.0 || !self.requests.contains_key(&flow.request) {
                over.push((*id, flow.left < 1.0));
            }
        }
        for (id, whole) in over {
            let Some(flow) = self.flows.flows.remove(&id) else { continue };
            if whole {
                let arrives = self.now + self.setup.latency;
                self.at(arrives, What::Arrive(flow.request, flow.piece));
            }
            self.sent(flow.line);
        }
        self.share();
    }

    fn advance(&mut self) {
        let passed = self.now.saturating_sub(self.flows.at).as_secs_f64();
        for flow in self.flows.flows.values_mut() {
            flow.left -= flow.rate * passed;
        }
        self.flows.at = self.now;
    }

    /// Deals out the links anew: of all links, the one that gives each of its flows the least is dealt out first.
    fn share(&mut self) {
        // Up and down, by node; the origin's upload is nobody's.
        let mut links: BTreeMap<(bool, Option<u32>), (f64, u32)> = BTreeMap::new();
        for flow in self.flows.flows.values() {
            let ends =
                [((true, flow.parent), flow.parent), ((false, Some(flow.child)), Some(flow.child))];
            for (link, node) in ends {
                let rate = self.uplink(node) as f64;
                links.entry(link).or_insert((rate, 0)).1 += 1;
            }
        }
        let mut open: Vec<u64> = self.flows.flows.keys().copied().collect();
        while !open.is_empty() {
            let shares = links.iter().filter(|(_, (_, flows))| *flows > 0);
            let shares = shares.map(|(link, (rate, flows))| (*link, rate / f64::from(*flows)));
            let Some((least, share)) = shares.min_by(|a, b| a.1.total_cmp(&b.1)) else { break };
            open.retain(|id| {
                let Some(flow) = self.flows.flows.get_mut(id) else { return false };
                let ends = [(true, flow.parent), (false, Some(flow.child))];
                if !ends.contains(&least) {
                    return true;
                }
                flow.rate = share;
                for end in ends {
                    if let Some((rate, flows)) = links.get_mut(&end) {
                        *rate -= share;
                        *flows -= 1;
                    }
                }
                false
            });
        }
        let ends = self.flows.flows.values().map(|flow| flow.left.max(0.0) / flow.rate.max(1.0));
        if let Some(soonest) = ends.min_by(f64::total_cmp) {
            self.flows.generation += 1;
            // Never too early: a flow that isn't quite over would come round at the same instant for ever.
            let wait = Duration::from_secs_f64(soonest) + Duration::from_nanos(1_000);
            self.at(self.now + wait, What::Flows(self.flows.generation));
        }
    }
}
