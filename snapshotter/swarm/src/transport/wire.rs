//! The real transport: libp2p over TCP with our TLS upgrade.
//!
//! A link is two connections, each with one long-lived stream each way: one for bulk, one reserved
//! for faults and small calls, since yamux has no priorities. The dialling end says in its first
//! frame which is which.
//!
//! Before any cryptography: a rate of connections per address and a number of handshakes under way.
//! In the handshake: membership of this cluster. After it: a number of connections, in all and per peer.

mod behaviour;
mod driver;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use libp2p::Multiaddr;
use libp2p::swarm::ConnectionId;
use skimmer_cache::Class;
use skimmer_identity::{Credentials, Membership, PeerId, Trust, tls};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::asking::{Asker, Counters};
use super::frame::Role;
use super::{Call, Error, Incoming, Link, PieceTransport, Reply, Request, Serve, security, upload};
use driver::{Command, Driver};

/// How long [`PieceTransport::connect`] takes at most.
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);

#[derive(Clone, Debug)]
pub struct Config {
    /// Multiaddrs: `/ip4/0.0.0.0/tcp/4001`.
    pub listen: Vec<String>,
    /// `None`: as much as the network takes.
    pub upload_bytes_per_second: Option<u64>,
    pub limits: Limits,
}

/// Bounds on connections; a link takes two.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Handshakes under way, each way.
    pub pending: u32,
    /// Each way, and twice that in all.
    pub established: u32,
    /// Room for both ends dialling at once, and for links whose end hasn't been noticed yet.
    pub per_peer: u32,
    /// Connections that one address may make at once, and how long it takes to earn one more.
    pub address_burst: u32,
    pub address_period: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pending: 64,
            established: 1024,
            per_peer: 8,
            address_burst: 32,
            address_period: Duration::from_millis(500),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("set up TLS for the swarm")]
    Tls(#[from] tls::Error),
    #[error("listen for peers on {address}: not a multiaddr like /ip4/0.0.0.0/tcp/4001")]
    Address { address: String, source: libp2p::multiaddr::Error },
    #[error("listen for peers on {address}")]
    Listen { address: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("use this node's key as a libp2p key")]
    Key,
}

/// This node's place in the swarm. Dropping it ends every link.
pub struct Wire {
    peer: PeerId,
    trust: Arc<Trust>,
    links: Arc<Links>,
    listening: Arc<Mutex<Vec<Multiaddr>>>,
    /// Bounded by its senders: each waits for an answer, or speaks once for a connection.
    commands: mpsc::UnboundedSender<Command>,
    _stop: DropGuard,
}

/// What callers see of the links.
#[derive(Default)]
struct Links(RwLock<HashMap<PeerId, LinkState>>);

struct LinkState {
    membership: Membership,
    counters: Arc<Counters>,
    rtt: Option<Duration>,
    addresses: Vec<String>,
    askers: Vec<(ConnectionId, Role, Arc<Asker>)>,
}

impl LinkState {
    fn asker(&self, role: Role) -> Option<&Arc<Asker>> {
        self.askers.iter().find(|asker| asker.1 == role).map(|asker| &asker.2)
    }

    fn is_up(&self) -> bool {
        self.asker(Role::Bulk).is_some() && self.asker(Role::Faults).is_some()
    }
}

impl Links {
    fn with<T>(&self, f: impl FnOnce(&mut HashMap<PeerId, LinkState>) -> T) -> T {
        f(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn asker(&self, peer: &PeerId, role: Role) -> Option<Arc<Asker>> {
        let links = self.0.read().unwrap_or_else(PoisonError::into_inner);
        links.get(peer)?.asker(role).cloned()
    }
}

impl Wire {
    /// Listens, and serves whoever connects. `credentials` and `trust` may change while it runs.
    pub async fn start(
        config: &Config,
        credentials: &Arc<Credentials>,
        trust: Arc<Trust>,
        serve: Arc<dyn Serve>,
    ) -> Result<Self, StartError> {
        let peer = credentials.key().peer();
        let members = Arc::new(security::Members::default());
        let security =
            security::Security::new(credentials, Arc::clone(&trust), Arc::clone(&members))?;
        let swarm = behaviour::swarm(config, &peer, security)?;
        let (commands, queue) = mpsc::unbounded_channel();
        let (links, listening) = (Arc::<Links>::default(), Arc::<Mutex<Vec<_>>>::default());
        let upload = upload::Upload::new(config.upload_bytes_per_second);
        let mut driver = Driver::new(
            (swarm, members),
            (serve, Arc::clone(&upload)),
            (Arc::clone(&links), Arc::clone(&listening)),
            commands.clone(),
        );
        for address in &config.listen {
            driver.listen(address).await?;
        }
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = driver.run(queue) => {}
                () = upload.run() => {}
            }
        });
        Ok(Self { peer, trust, links, listening, commands, _stop: stop.drop_guard() })
    }

    /// Where this node listens now, as multiaddrs of its interfaces.
    pub fn addresses(&self) -> Vec<String> {
        let listening = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        listening.iter().map(ToString::to_string).collect()
    }

    fn asker(&self, peer: &PeerId, role: Role) -> Result<Arc<Asker>, Error> {
        self.links.asker(peer, role).ok_or(Error::NoLink { peer: *peer })
    }

    fn tell(&self, command: Command) {
        // The driver runs for as long as this does.
        let _ = self.commands.send(command);
    }
}

#[async_trait]
impl PieceTransport for Wire {
    fn peer(&self) -> PeerId {
        self.peer
    }

    async fn connect(&self, peer: &PeerId, addresses: &[String]) -> Result<Membership, Error> {
        let peer = *peer;
        let failed = |source| Error::Connect { peer, source };
        if self.trust.is_blocked(&peer) {
            return Err(Error::Blocked { peer });
        }
        let (reply, replied) = oneshot::channel();
        let addresses = addresses.iter().map(|address| address.parse());
        let addresses = addresses.collect::<Result<Vec<Multiaddr>, _>>();
        let addresses = addresses.map_err(|error| failed(Arc::new(error)))?;
        self.tell(Command::Connect { peer, addresses, reply });
        match timeout(CONNECT_DEADLINE, replied).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(failed(Arc::new(std::io::Error::other("the node is stopping")))),
            Err(late) => Err(failed(Arc::new(late))),
        }
    }

    async fn pieces(&self, peer: &PeerId, request: Request) -> Result<Incoming, Error> {
        let role = if request.class == Class::Fault { Role::Faults } else { Role::Bulk };
        self.asker(peer, role)?.pieces(request)
    }

    async fn call(&self, peer: &PeerId, call: Call) -> Result<Reply, Error> {
        let role = if matches!(call, Call::Get { .. }) { Role::Bulk } else { Role::Faults };
        self.asker(peer, role)?.call(call).await
    }

    fn links(&self) -> Vec<Link> {
        let mut links: Vec<_> = self.links.with(|links| {
            let up = links.iter().filter(|(_, link)| link.is_up());
            up.map(|(peer, link)| Link {
                peer: *peer,
                membership: link.membership.clone(),
                addresses: link.addresses.clone(),
                sent: link.counters.sent.load(Ordering::Relaxed),
                received: link.counters.received.load(Ordering::Relaxed),
                rtt: link.rtt,
            })
            .collect()
        });
        links.sort_by_key(|link: &Link| link.peer);
        links
    }

    fn disconnect(&self, peer: &PeerId) {
        self.links.with(|links| links.remove(peer));
        self.tell(Command::Disconnect(*peer));
    }

    fn block(&self, peer: &PeerId) {
        self.trust.block(*peer);
        self.links.with(|links| links.remove(peer));
        self.tell(Command::Block(*peer));
    }

    fn unblock(&self, peer: &PeerId) {
        self.trust.unblock(peer);
        self.tell(Command::Unblock(*peer));
    }
}
