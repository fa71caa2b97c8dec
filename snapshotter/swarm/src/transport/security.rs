//! The security upgrade of swarm connections: TLS 1.3 in which both ends show their membership.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use futures::future::BoxFuture;
use futures::io::BufReader;
use futures::{AsyncRead, AsyncWrite, FutureExt as _};
use libp2p::core::UpgradeInfo;
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, ServerConfig};
use skimmer_identity::{Credentials, Membership, Trust, tls};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt as _, TokioAsyncReadCompatExt as _};

/// Memberships that are kept for connections that are just being made, and for links.
const REMEMBERED: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("shake hands")]
    Handshake(#[source] io::Error),
    #[error("shake hands: the peer showed no certificate")]
    NoCertificate,
    #[error("shake hands")]
    Trust(#[from] skimmer_identity::trust::Error),
    #[error("shake hands: the certificate's key isn't a peer id")]
    Peer,
}

/// The members that have shaken hands, by libp2p's peer id.
#[derive(Default)]
pub struct Members(Mutex<HashMap<libp2p::PeerId, Membership>>);

impl Members {
    pub fn get(&self, peer: &libp2p::PeerId) -> Option<Membership> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(peer).cloned()
    }

    /// Forgets all but those to keep, when there are many.
    pub fn prune(&self, keep: impl Fn(&libp2p::PeerId) -> bool) {
        let mut members = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if members.len() > REMEMBERED {
            members.retain(|peer, _| keep(peer));
        }
    }

    fn insert(&self, peer: libp2p::PeerId, membership: Membership) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(peer, membership);
    }
}

#[derive(Clone)]
pub struct Security {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    trust: Arc<Trust>,
    members: Arc<Members>,
}

/// A buffer for what rustls would read from the socket 4 KiB at a time. Larger ones cost more than they
/// save: what is read must still be in the processor's cache when it is decrypted.
type Buffered<C> = BufReader<C>;

/// A TLS record.
const READ: usize = 16 << 10;

fn buffered<C: AsyncRead + AsyncWrite>(socket: C) -> Compat<Buffered<C>> {
    BufReader::with_capacity(READ, socket).compat()
}

type Secured<C> = (libp2p::PeerId, Compat<TlsStream<Compat<Buffered<C>>>>);

impl Security {
    pub fn new(
        credentials: &Arc<Credentials>,
        trust: Arc<Trust>,
        members: Arc<Members>,
    ) -> Result<Self, tls::Error> {
        let server = tls::swarm_server(Arc::clone(credentials), Arc::clone(&trust))?;
        let client = tls::swarm_client(Arc::clone(credentials), Arc::clone(&trust))?;
        Ok(Self { server, client, trust, members })
    }

    /// Who is at the other end of a finished handshake.
    fn identify(
        &self,
        certificates: Option<&[CertificateDer<'_>]>,
    ) -> Result<libp2p::PeerId, Error> {
        let Some([certificate]) = certificates else { return Err(Error::NoCertificate) };
        let membership = self.trust.check(certificate, unix_now())?;
        let peer = to_libp2p(&membership.peer).ok_or(Error::Peer)?;
        self.members.insert(peer, membership);
        Ok(peer)
    }
}

impl UpgradeInfo for Security {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once("/skimmer/tls/1")
    }
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> InboundConnectionUpgrade<C> for Security {
    type Output = Secured<C>;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_inbound(self, socket: C, _: Self::Info) -> Self::Future {
        async move {
            let acceptor = TlsAcceptor::from(Arc::clone(&self.server));
            let stream = acceptor.accept(buffered(socket)).await.map_err(Error::Handshake)?;
            let peer = self.identify(stream.get_ref().1.peer_certificates())?;
            Ok((peer, TlsStream::from(stream).compat()))
        }
        .boxed()
    }
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> OutboundConnectionUpgrade<C> for Security {
    type Output = Secured<C>;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_outbound(self, socket: C, _: Self::Info) -> Self::Future {
        async move {
            let connector = TlsConnector::from(Arc::clone(&self.client));
            let stream = connector.connect(tls::any_name(), buffered(socket)).await;
            let stream = stream.map_err(Error::Handshake)?;
            let peer = self.identify(stream.get_ref().1.peer_certificates())?;
            Ok((peer, TlsStream::from(stream).compat()))
        }
        .boxed()
    }
}

/// libp2p's form of a peer id.
pub fn to_libp2p(peer: &skimmer_identity::PeerId) -> Option<libp2p::PeerId> {
    libp2p::PeerId::from_bytes(&peer.to_bytes()).ok()
}

/// Seconds since the Unix epoch.
fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
