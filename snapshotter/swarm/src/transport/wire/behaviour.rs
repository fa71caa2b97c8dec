//! What the libp2p swarm is made of: TCP, our TLS, yamux; gate, limits, block list, identify, ping, streams.

use std::time::Duration;

use libp2p::core::transport::upgrade::Version;
use libp2p::swarm::{NetworkBehaviour, Swarm};
use libp2p::{Transport as _, allow_block_list, connection_limits, identify, identity, ping, tcp};
use skimmer_identity::PeerId;

use super::super::gate::Gate;
use super::super::muxer::Yamux;
use super::super::security::{Security, to_libp2p};
use super::super::streams::Streams;
use super::{Config, StartError};

/// From the first byte of a connection to the end of its handshakes.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// A peer that doesn't answer in time is gone.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_DEADLINE: Duration = Duration::from_secs(10);

/// What identify tells other libp2p programs that this is.
const IDENTITY: &str = "/skimmer/1";

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
pub struct Behaviour {
    pub gate: Gate,
    pub limits: connection_limits::Behaviour,
    pub blocked: allow_block_list::Behaviour<allow_block_list::BlockedPeers>,
    pub identify: identify::Behaviour,
    pub ping: ping::Behaviour,
    pub streams: Streams,
}

pub fn swarm(
    config: &Config,
    peer: &PeerId,
    security: Security,
) -> Result<Swarm<Behaviour>, StartError> {
    let local = to_libp2p(peer).ok_or(StartError::Key)?;
    let key = identity::ed25519::PublicKey::try_from_bytes(peer.public_key())
        .map_err(|_| StartError::Key)?;
    let transport = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true))
        .upgrade(Version::V1)
        .authenticate(security)
        .multiplex(Yamux)
        .timeout(HANDSHAKE_DEADLINE)
        .boxed();
    let limits = config.limits;
    let behaviour = Behaviour {
        gate: Gate::new(limits.address_burst, limits.address_period),
        limits: connection_limits::Behaviour::new(
            connection_limits::ConnectionLimits::default()
                .with_max_pending_incoming(Some(limits.pending))
                .with_max_pending_outgoing(Some(limits.pending))
                .with_max_established_incoming(Some(limits.established))
                .with_max_established_outgoing(Some(limits.established))
                .with_max_established(Some(limits.established.saturating_mul(2)))
                .with_max_established_per_peer(Some(limits.per_peer)),
        ),
        blocked: allow_block_list::Behaviour::default(),
        identify: identify::Behaviour::new(
            identify::Config::new(IDENTITY.to_owned(), key.into())
                .with_agent_version(format!("skimmerd/{}", env!("CARGO_PKG_VERSION"))),
        ),
        ping: ping::Behaviour::new(
            ping::Config::new().with_interval(PING_EVERY).with_timeout(PING_DEADLINE),
        ),
        streams: Streams::default(),
    };
    let config = libp2p::swarm::Config::with_tokio_executor();
    Ok(Swarm::new(transport, behaviour, local, config))
}
