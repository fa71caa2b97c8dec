//! The watch on links: which are up, which have to go, who is let in again.
//!
//! A link shows the membership of its handshake. It goes when that membership has ended beyond the
//! grace period, when its peer is blocked, and when it has brought nothing for long: whoever wants it
//! connects again, with the membership of that day.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use skimmer_identity::{PeerId, Trust};
use tokio::time::Instant;

use super::{Inner, Joined};
use crate::plan::{Event, Peer};
use crate::transport::Link;

/// A link that neither brought nor took anything for so long is dropped.
const IDLE: Duration = Duration::from_secs(1800);

/// What the watch remembers between two looks.
#[derive(Debug, Default)]
pub struct Watch {
    /// Linked at the last look; the bytes that had passed, and since when it is so many.
    passed: BTreeMap<PeerId, (u64, Instant)>,
    /// Blocked at the transport.
    blocked: BTreeSet<PeerId>,
}

/// What a look at the links comes to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Verdict {
    drop: Vec<PeerId>,
    block: Vec<PeerId>,
    unblock: Vec<PeerId>,
}

impl Watch {
    pub fn note_blocked(&mut self, peer: PeerId) {
        self.blocked.insert(peer);
    }

    /// `ended_before`: memberships that ended before that (Unix seconds) don't count any more.
    fn look(&mut self, now: Instant, ended_before: i64, links: &[Link], trust: &Trust) -> Verdict {
        let mut verdict = Verdict::default();
        let mut passed = BTreeMap::new();
        for link in links {
            let bytes = link.sent.saturating_add(link.received);
            let known = self.passed.get(&link.peer).filter(|(before, _)| *before == bytes);
            let since = known.map_or(now, |(_, since)| *since);
            passed.insert(link.peer, (bytes, since));
            let idle = now.saturating_duration_since(since) >= IDLE;
            if trust.is_blocked(&link.peer) {
                verdict.block.push(link.peer);
            } else if idle || link.membership.not_after < ended_before {
                verdict.drop.push(link.peer);
            }
        }
        self.passed = passed;
        self.blocked.extend(&verdict.block);
        verdict.unblock = self.blocked.extract_if(.., |peer| !trust.is_blocked(peer)).collect();
        verdict
    }
}

impl Inner {
    pub(super) fn look_at_links(self: &Arc<Self>, unix_now: i64) {
        let Some(joined) = self.joined() else { return };
        let links = joined.transport.links();
        self.weed(&joined, &links, unix_now);
        let up: BTreeSet<_> = links.iter().map(|link| link.peer).collect();
        self.metrics.peers.set(i64::try_from(up.len()).unwrap_or(i64::MAX));
        let mut state = self.state();
        let before = std::mem::replace(&mut state.linked, up.clone());
        drop(state);
        for peer in up.difference(&before) {
            self.handle(Event::PeerUp { peer: Peer(*peer.public_key()) });
        }
        for peer in before.difference(&up) {
            self.shown.forget(peer);
            self.handle(Event::PeerLost { peer: Peer(*peer.public_key()) });
        }
    }

    fn weed(&self, joined: &Joined, links: &[Link], unix_now: i64) {
        let grace = i64::try_from(self.settings.grace.as_secs()).unwrap_or(i64::MAX);
        let ended_before = unix_now.saturating_sub(grace);
        let trust = &joined.member.trust;
        let verdict = self.state().watch.look(Instant::now(), ended_before, links, trust);
        for peer in verdict.drop {
            tracing::info!(%peer, "a link is dropped: its membership has ended, or nothing passes");
            joined.transport.disconnect(&peer);
        }
        for peer in verdict.block {
            tracing::info!(%peer, "blocked");
            joined.transport.block(&peer);
        }
        for peer in verdict.unblock {
            tracing::info!(%peer, "not blocked any more");
            joined.transport.unblock(&peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use skimmer_identity::{Key, Membership, Role};

    use super::*;

    fn link(peer: PeerId, not_after: i64, sent: u64) -> Link {
        let (cluster, zone, role) = ("c".to_owned(), "z".to_owned(), Role::Peer);
        let membership = Membership { peer, cluster, zone, role, not_before: 0, not_after };
        Link { peer, membership, addresses: Vec::new(), sent, received: 0, rtt: None }
    }

    #[test]
    fn links_go_when_they_have_ended_are_idle_or_blocked() {
        let [one, two, three] = [(); 3].map(|()| Key::generate().unwrap().peer());
        let (mut watch, trust) = (Watch::default(), Trust::new(Duration::ZERO));
        let start = Instant::now();
        trust.block(three);
        let links = [link(one, 99, 0), link(two, 100, 0), link(three, 100, 0)];
        let seen = watch.look(start, 100, &links, &trust);
        assert_eq!((seen.drop, seen.block), (vec![one], vec![three]));
        trust.set_blocked([]);
        let half = start + IDLE / 2;
        let seen = watch.look(half, 100, &[link(one, 200, 0), link(two, 100, 5)], &trust);
        assert_eq!((seen.drop, seen.unblock), (vec![], vec![three]));
        let links = [link(one, 200, 0), link(two, 100, 5)];
        assert_eq!(watch.look(start + IDLE, 100, &links, &trust).drop, [one]);
        assert_eq!(watch.look(half + IDLE, 100, &links[1..], &trust).drop, [two]);
        assert_eq!(watch.look(half + IDLE, 100, &[], &trust), Verdict::default());
    }
}
