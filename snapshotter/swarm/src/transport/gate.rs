//! Whom the listener lets in before any cryptography: a rate per address.
//!
//! How many handshakes and connections there may be at once is libp2p's connection limits' part.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};

/// Addresses that are remembered; the quietest are forgotten first.
const ADDRESSES: usize = 4096;

#[derive(Debug, thiserror::Error)]
#[error("{0} connects too often")]
struct TooOften(IpAddr);

/// A token bucket for each address.
pub struct Gate {
    accepts: Accepts,
    epoch: Instant,
}

impl Gate {
    /// `burst` connections at once, then one every `period`.
    pub fn new(burst: u32, period: Duration) -> Self {
        Self { accepts: Accepts::new(burst, period), epoch: Instant::now() }
    }
}

/// The decision, pure.
struct Accepts {
    burst: u32,
    period: Duration,
    /// When the address's bucket will be full again.
    full_at: HashMap<IpAddr, Duration>,
}

impl Accepts {
    fn new(burst: u32, period: Duration) -> Self {
        Self { burst, period, full_at: HashMap::new() }
    }

    fn accept(&mut self, from: IpAddr, now: Duration) -> bool {
        if self.full_at.len() >= ADDRESSES {
            self.full_at.retain(|_, full_at| *full_at > now);
        }
        // Everybody is busy: then nobody new.
        if self.full_at.len() >= ADDRESSES && !self.full_at.contains_key(&from) {
            return false;
        }
        let full_at = self.full_at.entry(from).or_insert(now);
        let next = (*full_at).max(now) + self.period;
        let accepted = next <= now + self.period * self.burst;
        if accepted {
            *full_at = next;
        }
        accepted
    }
}

impl NetworkBehaviour for Gate {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        let address = remote.iter().find_map(|part| match part {
            Protocol::Ip4(address) => Some(IpAddr::from(address)),
            Protocol::Ip6(address) => Some(IpAddr::from(address)),
            _ => None,
        });
        match address {
            Some(address) if !self.accepts.accept(address, self.epoch.elapsed()) => {
                Err(ConnectionDenied::new(TooOften(address)))
            }
            _ => Ok(()),
        }
    }

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, _: FromSwarm<'_>) {}

    fn on_connection_handler_event(
        &mut self,
        _: PeerId,
        _: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_burst_and_a_rate() {
        let mut accepts = Accepts::new(3, Duration::from_secs(1));
        let [one, two] = [1, 2].map(|n| IpAddr::from([10, 0, 0, n]));
        for (from, now_ms, accepted) in [
            (one, 0, true),
            (one, 0, true),
            (one, 0, true),
            (one, 0, false),
            (two, 0, true),
            (one, 999, false),
            (one, 1000, true),
            (one, 1000, false),
            (one, 10_000, true),
            (one, 10_000, true),
            (one, 10_000, true),
            (one, 10_000, false),
        ] {
            assert_eq!(accepts.accept(from, Duration::from_millis(now_ms)), accepted, "{now_ms}");
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut accepts = Accepts::new(1, Duration::from_secs(1));
        for n in 0..10_000_u32 {
            accepts.accept(IpAddr::from(n.to_be_bytes()), Duration::ZERO);
        }
        assert_eq!(accepts.full_at.len(), ADDRESSES);
        assert!(!accepts.accept(IpAddr::from([255; 4]), Duration::ZERO));
        assert!(accepts.accept(IpAddr::from([255; 4]), Duration::from_secs(2)));
    }
}
