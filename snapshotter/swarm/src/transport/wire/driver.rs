//! The loop that owns the libp2p swarm: dials, hands streams to jobs, keeps the links' table.
//!
//! Invariants:
//! - A link is in the table from its first connection until it has no connection for bulk.
//! - Whoever waits for a link is answered: when it is up, when a dial fails, or when its connections
//!   keep closing.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt as _;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, Stream, Swarm, SwarmEvent};
use libp2p::{Multiaddr, ping};
use skimmer_identity::{Membership, PeerId};
use tokio::sync::{mpsc, oneshot};

use super::super::asking::{Asker, Counters};
use super::super::frame::Role;
use super::super::pool::Pool;
use super::super::security::{Members, to_libp2p};
use super::super::serving::{Desk, serve};
use super::super::streams::{self, Opened};
use super::super::upload::Upload;
use super::super::{Error, Serve};
use super::behaviour::{Behaviour, BehaviourEvent};
use super::{LinkState, Links, StartError};

/// How often a link is tried when its connections close right away: they may have met a link that the
/// other end was just dropping.
const TRIES: u32 = 3;

pub enum Command {
    Connect {
        peer: PeerId,
        addresses: Vec<Multiaddr>,
        reply: Waiter,
    },
    Disconnect(PeerId),
    Block(PeerId),
    Unblock(PeerId),
    /// The other end said what an inbound connection is for.
    Hello {
        connection: ConnectionId,
        role: Role,
    },
    /// A stream ended, hence its connection is of no use any more.
    Ended {
        connection: ConnectionId,
        reason: String,
    },
}

type Waiter = oneshot::Sender<Result<Membership, Error>>;

pub struct Driver {
    swarm: Swarm<Behaviour>,
    members: Arc<Members>,
    serve: Arc<dyn Serve>,
    upload: Arc<Upload>,
    links: Arc<Links>,
    listening: Arc<Mutex<Vec<Multiaddr>>>,
    commands: mpsc::UnboundedSender<Command>,
    connections: HashMap<ConnectionId, Connection>,
    dials: HashMap<ConnectionId, (PeerId, Role)>,
    waiting: HashMap<PeerId, Waiting>,
    pool: Arc<Pool>,
}

/// Who waits for a link.
#[derive(Default)]
struct Waiting {
    waiters: Vec<Waiter>,
    addresses: Vec<Multiaddr>,
    /// How often a connection closed before the link was up.
    closed: u32,
}

struct Connection {
    peer: PeerId,
    /// It is of no use any more, though libp2p hasn't said yet that it is closed.
    closing: bool,
    counters: Arc<Counters>,
    /// `None`: the other end dialled and hasn't said yet.
    role: Option<Role>,
    /// Waits for the role to be known.
    asking: Option<Stream>,
}

impl Driver {
    pub fn new(
        (swarm, members): (Swarm<Behaviour>, Arc<Members>),
        (serve, upload): (Arc<dyn Serve>, Arc<Upload>),
        (links, listening): (Arc<Links>, Arc<Mutex<Vec<Multiaddr>>>),
        commands: mpsc::UnboundedSender<Command>,
    ) -> Self {
        Self {
            swarm,
            members,
            serve,
            upload,
            links,
            listening,
            commands,
            connections: HashMap::new(),
            dials: HashMap::new(),
            waiting: HashMap::new(),
            pool: Arc::default(),
        }
    }

    /// Listens on a multiaddr; returns when it does.
    pub async fn listen(&mut self, address: &str) -> Result<(), StartError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| StartError::Listen {
            address: address.to_owned(),
            source,
        };
        let parsed: Multiaddr = address
            .parse()
            .map_err(|source| StartError::Address { address: address.to_owned(), source })?;
        let listener = self.swarm.listen_on(parsed).map_err(|error| failed(Box::new(error)))?;
        loop {
            match self.swarm.select_next_some().await {
                SwarmEvent::NewListenAddr { listener_id, address } if listener_id == listener => {
                    self.lock_listening().push(address);
                    return Ok(());
                }
                SwarmEvent::ListenerClosed { listener_id, reason, .. }
                    if listener_id == listener =>
                {
                    let reason = reason.err().unwrap_or_else(|| io::ErrorKind::Other.into());
                    return Err(failed(Box::new(reason)));
                }
                event => self.on_event(event),
            }
        }
    }

    pub async fn run(&mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => return,
                },
                event = self.swarm.select_next_some() => self.on_event(event),
            }
        }
    }

    fn lock_listening(&self) -> std::sync::MutexGuard<'_, Vec<Multiaddr>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Connect { peer, addresses, reply } => {
                let waiting = self.waiting.entry(peer).or_default();
                waiting.waiters.push(reply);
                waiting.addresses = addresses;
                if !self.settle(&peer) {
                    self.dial_missing(&peer);
                }
            }
            Command::Disconnect(peer) => {
                self.close_all(&peer);
                self.fail(&peer, Arc::new(io::Error::other("it was dropped")));
            }
            Command::Block(peer) => {
                if let Some(peer) = to_libp2p(&peer) {
                    self.swarm.behaviour_mut().blocked.block_peer(peer);
                }
                self.close_all(&peer);
                self.fail(&peer, Arc::new(io::Error::other("it was blocked")));
            }
            Command::Unblock(peer) => {
                if let Some(peer) = to_libp2p(&peer) {
                    self.swarm.behaviour_mut().blocked.unblock_peer(peer);
                }
            }
            Command::Hello { connection, role } => {
                let Some(known) = self.connections.get_mut(&connection) else { return };
                if known.role.is_none() {
                    known.role = Some(role);
                    if let Some(stream) = known.asking.take() {
                        self.start_asking(connection, stream);
                    }
                }
            }
            Command::Ended { connection, reason } => {
                if let Some(known) = self.connections.get(&connection) {
                    tracing::debug!(peer = %known.peer, reason, "a stream ended");
                }
                self.close(connection);
            }
        }
    }

    /// Dials for what the link lacks and nobody has dialled for yet.
    fn dial_missing(&mut self, peer: &PeerId) {
        let addresses = self.waiting.get(peer).map(|waiting| waiting.addresses.clone());
        let addresses = addresses.unwrap_or_default();
        for role in [Role::Bulk, Role::Faults] {
            let under_way = self.dials.values().any(|dial| *dial == (*peer, role));
            if under_way || self.has(peer, role) {
                continue;
            }
            let Some(to) = to_libp2p(peer) else { return };
            let dial = DialOpts::peer_id(to)
                .addresses(addresses.clone())
                // There is a connection already: for the other role.
                .condition(PeerCondition::Always)
                // Two connections from the listening port would be one to TCP.
                .allocate_new_port()
                .build();
            self.dials.insert(dial.connection_id(), (*peer, role));
            let connection = dial.connection_id();
            if let Err(error) = self.swarm.dial(dial) {
                self.dials.remove(&connection);
                self.fail(peer, Arc::new(error));
                return;
            }
        }
    }

    /// Whether there is a connection that is, or may turn out to be, for this.
    fn has(&self, peer: &PeerId, role: Role) -> bool {
        let mut mine = self.connections.values().filter(|known| known.peer == *peer);
        mine.any(|known| !known.closing && known.role.is_none_or(|known| known == role))
    }

    fn close(&mut self, connection: ConnectionId) {
        if let Some(known) = self.connections.get_mut(&connection) {
            known.closing = true;
        }
        self.swarm.close_connection(connection);
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                let role = self.dials.remove(&connection_id).map(|(_, role)| role);
                let known = self.members.get(&peer_id);
                let Some(membership) = known else {
                    self.swarm.close_connection(connection_id);
                    return;
                };
                let address = endpoint.get_remote_address().to_string();
                self.connected(connection_id, role, membership, address);
            }
            SwarmEvent::ConnectionClosed { connection_id, cause, .. } => {
                let cause = cause.map_or_else(|| "it was closed".to_owned(), |c| c.to_string());
                self.closed(connection_id, &cause);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => {
                if let Some((peer, _)) = self.dials.remove(&connection_id) {
                    self.fail(&peer, Arc::new(error));
                }
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                tracing::debug!(from = %send_back_addr, %error, "a connection was refused");
            }
            SwarmEvent::NewListenAddr { address, .. } => self.lock_listening().push(address),
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.lock_listening().retain(|known| *known != address);
            }
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                tracing::error!(?addresses, ?reason, "no longer listening for peers");
            }
            SwarmEvent::Behaviour(BehaviourEvent::Streams(event)) => self.on_stream(event),
            SwarmEvent::Behaviour(BehaviourEvent::Ping(event)) => self.on_ping(&event),
            _ => {}
        }
    }

    fn connected(
        &mut self,
        connection: ConnectionId,
        role: Option<Role>,
        membership: Membership,
        address: String,
    ) {
        let peer = membership.peer;
        let counters = self.links.with(|links| {
            let link = links.entry(peer).or_insert_with(|| LinkState {
                membership: membership.clone(),
                counters: Arc::default(),
                rtt: None,
                addresses: Vec::new(),
                askers: Vec::new(),
            });
            link.membership = membership;
            if !link.addresses.contains(&address) {
                link.addresses.push(address);
            }
            Arc::clone(&link.counters)
        });
        self.connections
            .insert(connection, Connection { peer, closing: false, counters, role, asking: None });
        let linked: Vec<_> =
            self.connections.values().filter_map(|known| to_libp2p(&known.peer)).collect();
        self.members.prune(|member| linked.contains(member));
    }

    fn on_stream(&mut self, event: streams::Event) {
        let streams::Event { connection, opened } = event;
        let Some(known) = self.connections.get_mut(&connection) else { return };
        match opened {
            Opened::Asking(stream) if known.role.is_some() => {
                self.start_asking(connection, stream);
            }
            Opened::Asking(stream) => known.asking = Some(stream),
            Opened::Serving(stream) => {
                let Some(from) = to_libp2p(&known.peer).and_then(|peer| self.members.get(&peer))
                else {
                    return;
                };
                let desk = Desk {
                    serve: Arc::clone(&self.serve),
                    upload: Arc::clone(&self.upload),
                    from,
                    counters: Arc::clone(&known.counters),
                };
                let commands = self.commands.clone();
                tokio::spawn(async move {
                    let hello = |role| drop(commands.send(Command::Hello { connection, role }));
                    let reason = serve(stream, desk, hello).await.to_string();
                    // The driver may have stopped.
                    let _ = commands.send(Command::Ended { connection, reason });
                });
            }
            Opened::Failed(reason) => {
                tracing::debug!(peer = %known.peer, reason, "a peer takes no streams");
                self.close(connection);
            }
        }
    }

    fn start_asking(&mut self, connection: ConnectionId, stream: Stream) {
        let Some(Connection { peer, closing: false, counters, role: Some(role), .. }) =
            self.connections.get(&connection)
        else {
            return;
        };
        let (peer, role) = (*peer, *role);
        let (asker, run) =
            Asker::start(peer, stream, role, (Arc::clone(counters), Arc::clone(&self.pool)));
        let commands = self.commands.clone();
        tokio::spawn(async move {
            let reason = run.await.to_string();
            // The driver may have stopped.
            let _ = commands.send(Command::Ended { connection, reason });
        });
        let came_up = self.links.with(|links| {
            let link = links.get_mut(&peer)?;
            let before = link.is_up();
            link.askers.push((connection, role, asker));
            (!before && link.is_up()).then(|| link.membership.clone())
        });
        if let Some(membership) = came_up {
            tracing::info!(%peer, zone = membership.zone, "linked to a peer");
        }
        self.settle(&peer);
    }

    /// Answers whoever waits for the link, if it is up.
    fn settle(&mut self, peer: &PeerId) -> bool {
        let up = self.links.with(|links| {
            links.get(peer).filter(|link| link.is_up()).map(|link| link.membership.clone())
        });
        let Some(membership) = up else { return false };
        for waiter in self.waiting.remove(peer).unwrap_or_default().waiters {
            // It may have given up.
            let _ = waiter.send(Ok(membership.clone()));
        }
        true
    }

    /// Tells whoever waits for the link that it won't come up.
    fn fail(&mut self, peer: &PeerId, source: Arc<dyn std::error::Error + Send + Sync>) {
        for waiter in self.waiting.remove(peer).unwrap_or_default().waiters {
            // It may have given up.
            let _ = waiter.send(Err(Error::Connect { peer: *peer, source: Arc::clone(&source) }));
        }
    }

    fn on_ping(&mut self, event: &ping::Event) {
        match (&event.result, self.connections.get(&event.connection)) {
            (Ok(rtt), Some(known)) => self.links.with(|links| {
                if let Some(link) = links.get_mut(&known.peer) {
                    link.rtt = Some(*rtt);
                }
            }),
            (Err(error), Some(known)) => {
                tracing::info!(peer = %known.peer, %error, "a peer doesn't answer");
                self.close(event.connection);
            }
            (_, None) => {}
        }
    }

    fn closed(&mut self, connection: ConnectionId, cause: &str) {
        let Some(Connection { peer, .. }) = self.connections.remove(&connection) else { return };
        let bulk_left = self.has(&peer, Role::Bulk);
        let went_down = self.links.with(|links| {
            let link = links.get_mut(&peer)?;
            let before = link.is_up();
            link.askers.retain(|asker| asker.0 != connection);
            let after = link.is_up();
            if !bulk_left {
                links.remove(&peer);
            }
            Some(before && !after)
        });
        if went_down == Some(true) {
            tracing::info!(%peer, cause, "the link to a peer is down");
        }
        if !bulk_left {
            self.close_all(&peer);
        }
        if self.settle(&peer) {
            return;
        }
        match self.waiting.get_mut(&peer) {
            Some(waiting) if waiting.closed + 1 < TRIES => {
                waiting.closed += 1;
                self.dial_missing(&peer);
            }
            Some(_) => self.fail(&peer, Arc::new(io::Error::other(cause.to_owned()))),
            None => {}
        }
    }

    fn close_all(&mut self, peer: &PeerId) {
        let mine = self.connections.iter().filter(|(_, known)| known.peer == *peer);
        let mine: Vec<_> = mine.map(|(connection, _)| *connection).collect();
        for connection in mine {
            self.close(connection);
        }
    }
}
