//! The store's twin in memory, for tests and for what need not outlive the process.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use crate::model::{
    Authority, Cluster, Enrolment, Event, Joined, Node, Refusal, Scheduler, Token, TokenHash,
};
use crate::store::{Error, Store};

#[derive(Default)]
pub struct Memory(Mutex<State>);

#[derive(Default)]
struct State {
    root: Option<Authority>,
    /// By id.
    clusters: BTreeMap<String, Cluster>,
    tokens: BTreeMap<TokenHash, Token>,
    /// By peer id.
    nodes: BTreeMap<String, Node>,
    events: Vec<Event>,
    /// By id, each with when it was last seen.
    schedulers: BTreeMap<String, (Scheduler, i64)>,
}

impl Memory {
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn enrol(&mut self, hash: &TokenHash, asking: &Enrolment, now: i64) -> Result<Node, Refusal> {
        let token = self.tokens.get_mut(hash).ok_or(Refusal::UnknownToken)?;
        if token.admit(self.nodes.get(&asking.peer), now)? {
            token.uses_left = token.uses_left.map(|left| left.saturating_sub(1));
        }
        let node = Node {
            peer: asking.peer.clone(),
            cluster: token.cluster.clone(),
            name: asking.name.clone(),
            zone: asking.zone.clone(),
            role: token.role,
            token: *hash,
            enrolled: now,
            expires: asking.expires,
            revoked: None,
        };
        self.nodes.insert(node.peer.clone(), node.clone());
        Ok(node)
    }
}

#[async_trait]
impl Store for Memory {
    async fn root(&self, proposed: Authority) -> Result<Authority, Error> {
        Ok(self.state().root.get_or_insert(proposed).clone())
    }

    async fn add_cluster(&self, cluster: &Cluster) -> Result<bool, Error> {
        let clusters = &mut self.state().clusters;
        let free = !clusters.values().any(|c| c.id == cluster.id || c.name == cluster.name);
        if free {
            clusters.insert(cluster.id.clone(), cluster.clone());
        }
        Ok(free)
    }

    async fn clusters(&self) -> Result<Vec<Cluster>, Error> {
        let mut all: Vec<Cluster> = self.state().clusters.values().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    async fn set_repositories(
        &self,
        cluster: &str,
        repositories: &[String],
    ) -> Result<bool, Error> {
        let mut state = self.state();
        let Some(cluster) = state.clusters.get_mut(cluster) else { return Ok(false) };
        cluster.repositories = repositories.to_vec();
        Ok(true)
    }

    async fn add_token(&self, token: &Token) -> Result<(), Error> {
        self.state().tokens.insert(token.hash, token.clone());
        Ok(())
    }

    async fn enrol(&self, token: &TokenHash, node: &Enrolment, now: i64) -> Result<Joined, Error> {
        Ok(match self.state().enrol(token, node, now) {
            Ok(node) => Joined::In(node),
            Err(refusal) => Joined::Refused(refusal),
        })
    }

    async fn drop_tokens(&self, now: i64) -> Result<u64, Error> {
        let tokens = &mut self.state().tokens;
        let before = tokens.len();
        tokens.retain(|_, token| token.expires >= now);
        Ok(u64::try_from(before - tokens.len()).unwrap_or(u64::MAX))
    }

    async fn node(&self, peer: &str) -> Result<Option<Node>, Error> {
        Ok(self.state().nodes.get(peer).cloned())
    }

    async fn nodes(&self, cluster: Option<&str>) -> Result<Vec<Node>, Error> {
        let mut found: Vec<Node> = self.state().nodes.values().cloned().collect();
        found.retain(|node| cluster.is_none_or(|cluster| node.cluster == cluster));
        found.sort_by(|a, b| (&a.cluster, &a.name, &a.peer).cmp(&(&b.cluster, &b.name, &b.peer)));
        Ok(found)
    }

    async fn renew(&self, peer: &str, expires: i64) -> Result<Option<Node>, Error> {
        let mut state = self.state();
        let node = state.nodes.get_mut(peer).filter(|node| node.revoked.is_none());
        Ok(node.map(|node| {
            node.expires = expires;
            node.clone()
        }))
    }

    async fn revoke(&self, peer: &str, reason: &str) -> Result<Option<Node>, Error> {
        let mut state = self.state();
        let node = state.nodes.get_mut(peer).filter(|node| node.revoked.is_none());
        Ok(node.map(|node| {
            node.revoked = Some(reason.to_owned());
            node.clone()
        }))
    }

    async fn revoked(&self, end: i64) -> Result<Vec<Node>, Error> {
        let mut found = self.nodes(None).await?;
        found.retain(|node| node.revoked.is_some() && node.expires > end);
        Ok(found)
    }

    async fn beat(
        &self,
        scheduler: &Scheduler,
        now_ms: i64,
        since_ms: i64,
    ) -> Result<Vec<Scheduler>, Error> {
        let mut state = self.state();
        state.schedulers.insert(scheduler.id.clone(), (scheduler.clone(), now_ms));
        state.schedulers.retain(|id, (known, seen)| {
            *seen >= since_ms && (known.address != scheduler.address || *id == scheduler.id)
        });
        Ok(state.schedulers.values().map(|(scheduler, _)| scheduler.clone()).collect())
    }

    async fn schedulers(&self, since_ms: i64) -> Result<Vec<Scheduler>, Error> {
        let state = self.state();
        let live = state.schedulers.values().filter(|(_, seen)| *seen >= since_ms);
        Ok(live.map(|(scheduler, _)| scheduler.clone()).collect())
    }

    async fn retire(&self, id: &str) -> Result<(), Error> {
        self.state().schedulers.remove(id);
        Ok(())
    }

    async fn add_event(&self, event: &Event) -> Result<(), Error> {
        self.state().events.push(event.clone());
        Ok(())
    }

    async fn events(&self, cluster: Option<&str>, limit: u32) -> Result<Vec<Event>, Error> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let state = self.state();
        let of_it = |event: &&Event| cluster.is_none_or(|cluster| event.cluster == cluster);
        let mut found: Vec<Event> =
            state.events.iter().rev().filter(of_it).take(limit).cloned().collect();
        found.reverse();
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance;

    #[tokio::test]
    async fn conforms() {
        conformance::check(async || (Memory::new(), ())).await;
    }
}
