//! Requests from a node to another or to the origin: sent, served, received, and what can go wrong.

use skimmer_proto::PieceSet;
use skimmer_scheduler as scheduler;
use skimmer_swarm::plan::{Action, Event, Fault};

use super::{BURST, LOSS, Oddity, Request, RequestKey, What, World, time};
use crate::sim::node::{id, number, peer, reported, task_id, task_number};

impl World<'_> {
    /// Does what a node's planner wants done.
    pub fn perform(&mut self, child: u32, action: Action) {
        let latency = self.setup.latency;
        match action {
            Action::Ask { request, task, peer, pieces, .. } => {
                let (parent, key) = (number(peer), (child, request));
                // A connection is made first.
                let new = !self.nodes[child as usize].links.contains(&parent);
                self.open(key, Some(parent), task_number(&task), &pieces);
                let wait = if new { self.setup.connect } else { latency };
                self.at(self.now + wait, What::Request(key));
            }
            Action::Origin { request, task, pieces, .. } => {
                let key = (child, request);
                self.open(key, None, task_number(&task), &pieces);
                self.at(self.now + latency, What::Request(key));
            }
            Action::Abandon { request } => _ = self.requests.remove(&(child, request)),
            Action::Probe { task, peer } => {
                let have = self.nodes[child as usize].have[task_number(&task)].clone();
                let asked = What::Probe { child, parent: number(peer), task, have };
                self.at(self.now + latency, asked);
            }
            Action::Report(report) => self.report(reported(id(child), report)),
            // Its reader would be told, and would ask again.
            Action::Hopeless { .. } => {}
        }
    }

    fn open(&mut self, key: RequestKey, parent: Option<u32>, task: usize, pieces: &PieceSet) {
        let unsent = pieces.iter().collect();
        self.requests.insert(key, Request { parent, task, unsent, left: pieces.len() });
    }

    /// A request reaches the one who is to answer it.
    pub fn request(&mut self, key: RequestKey) -> anyhow::Result<()> {
        let Some(request) = self.requests.get_mut(&key) else { return Ok(()) };
        let (child, back) = (key.0, self.now + self.setup.latency);
        let Some(parent) = request.parent else {
            let node = &mut self.nodes[child as usize];
            node.origin_requests += 1;
            match node.oddity {
                Oddity::Refused => self.at(back, What::End(key, Some(Fault::Refused))),
                Oddity::Unlucky if node.origin_requests % 2 == 1 => {
                    self.at(back, What::End(key, Some(Fault::Gone)));
                }
                _ => self.enqueue(key),
            }
            return Ok(());
        };
        let node = &self.nodes[parent as usize];
        if !node.alive {
            self.at(back + LOSS, What::End(key, Some(Fault::Gone)));
            return Ok(());
        }
        let have = &node.have[request.task];
        let before = request.unsent.len();
        request.unsent.retain(|piece| have.contains(*piece));
        let absent = u32::try_from(before - request.unsent.len())?;
        request.left -= absent;
        let (stalls, empty) = (node.oddity == Oddity::Stalling, request.left == 0);
        if self.nodes[child as usize].links.insert(parent) {
            self.nodes[parent as usize].links.insert(child);
            self.plan(child, Event::PeerUp { peer: peer(parent) })?;
            self.plan(parent, Event::PeerUp { peer: peer(child) })?;
        }
        if empty {
            self.at(back, What::End(key, None));
        } else if !stalls {
            self.enqueue(key);
        }
        Ok(())
    }

    fn enqueue(&mut self, key: RequestKey) {
        let Some(line) = self.line_of(key) else { return };
        self.lines.entry(line).or_default().queue.push_back(key);
        self.serve(line);
    }

    /// A piece begins to come in, and waits until those before it are here.
    pub fn first_byte(&mut self, key: RequestKey, piece: u32, last: std::time::Duration) {
        self.nodes[key.0 as usize].down_queue.push_back((key, piece, last));
        self.take_in(key.0, false);
    }

    /// Begins with the next piece if nothing comes in, or that has just `ended`. Nothing is sent on that was abandoned.
    pub fn take_in(&mut self, child: u32, ended: bool) {
        let node = &mut self.nodes[child as usize];
        node.down_busy &= !ended;
        while !node.down_busy
            && let Some((key, piece, last)) = node.down_queue.pop_front()
        {
            if self.requests.contains_key(&key) {
                node.down_busy = true;
                let through = self.now + time(self.setup.shape.piece_len, node.rate);
                self.at(through.max(last), What::Arrive(key, piece));
                return;
            }
        }
    }

    /// The last byte of a piece reaches the child.
    pub fn arrive(&mut self, key: RequestKey, piece: u32) -> anyhow::Result<()> {
        let Some(request) = self.requests.get_mut(&key) else { return Ok(()) };
        let (child, task) = (key.0, request.task);
        if let Some(parent) = request.parent {
            let from = &self.nodes[parent as usize];
            if from.dead {
                // It is noticed when the connection is.
                return Ok(());
            }
            if from.oddity == Oddity::Corrupt {
                return self.end(key, Some(Fault::Corrupt));
            }
            self.outcome.peer_pieces += 1;
            let zone = self.nodes[child as usize].zone;
            self.outcome.across += u64::from(from.zone != zone);
        } else {
            self.outcome.origin_arrived += 1;
        }
        request.left -= 1;
        if request.left == 0 {
            self.requests.remove(&key);
        }
        self.plan(child, Event::Received { request: key.1, piece })?;
        let node = &mut self.nodes[child as usize];
        node.have[task].insert(piece);
        let pieces = std::iter::once(piece).collect();
        self.plan(child, Event::Stored { task: task_id(task), pieces })?;
        self.pull(child)
    }

    /// A request ends before all of it has come.
    pub fn end(&mut self, key: RequestKey, fault: Option<Fault>) -> anyhow::Result<()> {
        if self.requests.remove(&key).is_none() {
            return Ok(());
        }
        let outcome = fault.map_or(Ok(()), Err);
        self.plan(key.0, Event::Ended { request: key.1, outcome })
    }

    /// Wants what comes next, and notices that nothing is left to want.
    pub fn pull(&mut self, number: u32) -> anyhow::Result<()> {
        let setup = self.setup;
        let node = &mut self.nodes[number as usize];
        let complete = node.complete(setup.shape.pieces);
        if complete == setup.tasks && node.done.is_none() {
            node.done = Some(self.now.saturating_sub(BURST));
            self.unfinished -= 1;
        }
        let node = &self.nodes[number as usize];
        if node.oddity == Oddity::Liar {
            return Ok(());
        }
        let most = setup.tasks.min(complete + setup.at_once);
        while self.nodes[number as usize].begun < most {
            let node = &mut self.nodes[number as usize];
            let task = node.begun;
            node.begun += 1;
            let pieces = setup.all().difference(&node.have[task]);
            if !pieces.is_empty() {
                let class = skimmer_swarm::plan::Class::PullThrough;
                self.want(number, task, pieces, class)?;
            }
        }
        Ok(())
    }

    /// One node asks another what it has.
    pub fn probe(&mut self, probe: What) -> anyhow::Result<()> {
        let What::Probe { child, parent, task, have } = probe else { return Ok(()) };
        let node = &self.nodes[parent as usize];
        if !node.alive {
            self.at(self.now + LOSS, What::Lost { node: child, peer: parent });
            return Ok(());
        }
        let liar = node.oddity == Oddity::Liar;
        let pieces = if liar { self.setup.all() } else { node.have[task_number(&task)].clone() };
        let answer = What::Has { node: child, peer: parent, task, pieces };
        self.at(self.now + self.setup.latency, answer);
        self.plan(parent, Event::Has { task, peer: peer(child), pieces: have, active: true })
    }

    /// From a node to the scheduler.
    pub fn report(&mut self, event: scheduler::Event) {
        self.outcome.node_events += 1;
        self.at(self.now + self.setup.control, What::Report(event));
    }
}
