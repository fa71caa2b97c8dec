//! A member of a cluster that is no node: it speaks to nodes as they do to each other, honestly or not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use skimmer_identity::{Membership, PeerId, Trust};
use skimmer_proto::{Digest, Scope};
use skimmer_swarm::transport::wire::{Config, Limits, Wire};
use skimmer_swarm::transport::{
    Arrival, Call, Class, Error, Haves, PieceReader, PieceTransport as _, Reason, Refusal, Reply,
    Request, Serve,
};

use crate::member::Member;

/// How long a node may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A place in the swarm.
pub struct Outsider {
    wire: Wire,
}

impl Outsider {
    /// Listens on `listen`, a multiaddr, and gives whoever asks the `objects` of which it knows the digest, nothing
    /// else.
    pub async fn start(
        member: &Member,
        listen: &str,
        objects: Vec<Vec<u8>>,
    ) -> anyhow::Result<Self> {
        let trust = Trust::new(Duration::ZERO);
        trust.set_authority(&member.membership.cluster, &member.membership.cluster_ca)?;
        let config = Config {
            listen: vec![listen.to_owned()],
            upload_bytes_per_second: None,
            limits: Limits::default(),
        };
        let objects = objects.into_iter().map(|object| (Digest::of(&object), object.into()));
        let serve = Arc::new(Objects { by_digest: objects.collect() });
        let wire = Wire::start(&config, &member.credentials, Arc::new(trust), serve).await?;
        Ok(Self { wire })
    }

    /// Connects to a node.
    pub async fn connect(&self, peer: &PeerId, address: &str) -> Result<(), Error> {
        self.wire.connect(peer, &[address.to_owned()]).await.map(|_| ())
    }

    /// Shows a node a grant.
    pub async fn show_grant(&self, peer: &PeerId, grant: Vec<u8>) -> Result<(), Error> {
        self.wire.call(peer, Call::ShowGrant(grant.into())).await.map(|_| ())
    }

    /// Asks a node for the first piece of a blob of `len` bytes; nothing if it hasn't got it.
    ///
    /// # Errors
    /// If the node doesn't answer in time, or says no.
    pub async fn first_piece(
        &self,
        peer: &PeerId,
        scope: Scope,
        blob: Digest,
        len: u64,
    ) -> anyhow::Result<Option<Bytes>> {
        let class = Class::PullThrough;
        let request = Request { scope, blob, len, pieces: std::iter::once(0..1).collect(), class };
        let mut incoming = self.wire.pieces(peer, request).await?;
        let next = tokio::time::timeout(PATIENCE, incoming.next()).await;
        match next.context("a node doesn't answer")?.context("a node answers nothing")?? {
            Arrival::Piece { bytes, .. } => Ok(Some(bytes)),
            Arrival::Absent(_) => Ok(None),
        }
    }
}

/// Objects, for everybody.
struct Objects {
    by_digest: BTreeMap<Digest, Bytes>,
}

#[async_trait]
impl Serve for Objects {
    async fn open(&self, _: &Membership, _: &Request) -> Result<Box<dyn PieceReader>, Refusal> {
        Err(Refusal::new(Reason::Absent, ""))
    }

    async fn call(&self, _: &Membership, call: Call) -> Result<Reply, Refusal> {
        match call {
            Call::Get { object, .. } => match self.by_digest.get(&object) {
                Some(bytes) => Ok(Reply::Object(bytes.clone())),
                None => Err(Refusal::new(Reason::Absent, "")),
            },
            Call::Haves { .. } => Ok(Reply::Haves(Haves::default())),
            Call::ShowGrant(_) => Ok(Reply::Done),
        }
    }
}
