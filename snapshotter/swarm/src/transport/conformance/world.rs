//! What the suite runs on: nodes that can reach each other, and what they serve.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use skimmer_cache::Class;
use skimmer_identity::{Authority, Credentials, Key, Membership, Role, SignedValue, Trust};
use skimmer_proto::{Digest, Geometry, Scope, TaskId};
use tokio::time::timeout;

use super::super::memory::{Memory, Network};
use super::super::wire::{Config, Limits, Wire};
use super::super::{
    Call, Error, Held, Incoming, PieceReader, PieceTransport, Reason, Refusal, Reply, Request,
    Serve,
};
use super::LONG;

/// Blobs in memory, and every way of being a bad server that the suite needs.
#[derive(Default)]
pub struct Shelf {
    pub blobs: Mutex<BTreeMap<TaskId, Bytes>>,
    pub absent: BTreeSet<u32>,
    pub signed: Mutex<BTreeMap<u32, SignedValue>>,
    pub delay: Duration,
    pub open: Arc<AtomicU64>,
    pub read: Arc<AtomicU64>,
    pub grants: Mutex<Vec<Bytes>>,
    pub lies: bool,
}

impl Shelf {
    pub fn with(scope: &Scope, blob: &Bytes) -> Self {
        let shelf = Self::default();
        let task = TaskId::of(scope, &Digest::of(blob));
        shelf.blobs.lock().unwrap().insert(task, blob.clone());
        shelf
    }
}

struct Book {
    geometry: Geometry,
    blob: Bytes,
    absent: BTreeSet<u32>,
    signed: BTreeMap<u32, SignedValue>,
    delay: Duration,
    open: Arc<AtomicU64>,
    read: Arc<AtomicU64>,
}

impl Drop for Book {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl PieceReader for Book {
    fn find(&mut self, piece: u32) -> io::Result<Held> {
        std::thread::sleep(self.delay);
        if self.absent.contains(&piece) {
            return Ok(Held::Absent);
        }
        Ok(Held::Here(self.signed.get(&piece).cloned()))
    }

    fn read(&mut self, piece: u32, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(self.geometry.span(piece).start + offset).unwrap();
        buffer.copy_from_slice(&self.blob[start..start + buffer.len()]);
        self.read.fetch_add(buffer.len() as u64, Ordering::SeqCst);
        Ok(())
    }
}

#[async_trait]
impl Serve for Shelf {
    async fn open(
        &self,
        _: &Membership,
        request: &Request,
    ) -> Result<Box<dyn PieceReader>, Refusal> {
        if request.scope == Scope::Repository("host/secret".to_owned()) {
            return Err(Refusal::new(Reason::Rights, "host/secret"));
        }
        let blob = self.blobs.lock().unwrap().get(&request.task()).cloned();
        let blob = blob.ok_or_else(|| Refusal::new(Reason::Absent, ""))?;
        self.open.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Book {
            geometry: Geometry::of(request.len).unwrap(),
            blob,
            absent: self.absent.clone(),
            signed: self.signed.lock().unwrap().clone(),
            delay: if request.class == Class::Fault { Duration::ZERO } else { self.delay },
            open: Arc::clone(&self.open),
            read: Arc::clone(&self.read),
        }))
    }

    async fn call(&self, _: &Membership, call: Call) -> Result<Reply, Refusal> {
        match call {
            Call::Haves { haves, .. } => Ok(Reply::Haves(haves)),
            Call::Get { scope, object, .. } => {
                let task = TaskId::of(&scope, &object);
                match self.blobs.lock().unwrap().get(&task).cloned() {
                    Some(_) if self.lies => Ok(Reply::Object(Bytes::from_static(b"a lie"))),
                    Some(bytes) => Ok(Reply::Object(bytes)),
                    None => Err(Refusal::new(Reason::Absent, "no such object")),
                }
            }
            Call::ShowGrant(grant) => {
                self.grants.lock().unwrap().push(grant);
                Ok(Reply::Done)
            }
        }
    }
}

pub struct Node {
    pub transport: Arc<dyn PieceTransport>,
    pub addresses: Vec<String>,
    pub credentials: Arc<Credentials>,
}

impl Node {
    pub async fn connect(&self, to: &Self) -> Result<Membership, Error> {
        timeout(LONG, self.transport.connect(&to.transport.peer(), &to.addresses)).await.unwrap()
    }

    pub async fn pieces(&self, from: &Self, request: Request) -> Incoming {
        self.transport.pieces(&from.transport.peer(), request).await.unwrap()
    }

    pub async fn call(&self, to: &Self, call: Call) -> Result<Reply, Error> {
        timeout(LONG, self.transport.call(&to.transport.peer(), call)).await.unwrap()
    }
}

/// Makes nodes of one kind of transport that can reach each other.
pub struct World {
    authorities: BTreeMap<&'static str, Authority>,
    /// `None`: real ones.
    network: Option<Arc<Network>>,
}

impl World {
    pub fn new(network: Option<Arc<Network>>) -> Self {
        let make = |id| (id, Authority::create(id, now()).unwrap());
        Self { authorities: ["one", "two"].map(make).into(), network }
    }

    pub fn credentials(&self, cluster: &str) -> (Arc<Credentials>, Arc<Trust>) {
        let authority = &self.authorities[cluster];
        let key = Key::generate().unwrap();
        let membership = Membership {
            peer: key.peer(),
            cluster: cluster.to_owned(),
            zone: "z".to_owned(),
            role: Role::Peer,
            not_before: now() - 60,
            not_after: now() + 3600,
        };
        let certificate = authority.issue(&membership).unwrap();
        let trust = Trust::new(Duration::ZERO);
        trust.set_authority(cluster, authority.certificate_der()).unwrap();
        (Credentials::new(key, &certificate).unwrap(), Arc::new(trust))
    }

    pub async fn node(&self, cluster: &str, shelf: Arc<Shelf>) -> Node {
        let (credentials, trust) = self.credentials(cluster);
        if let Some(network) = &self.network {
            let transport: Arc<Memory> = network.join(credentials.membership(), shelf);
            return Node { transport, addresses: Vec::new(), credentials };
        }
        let config = Config {
            listen: vec!["/ip4/127.0.0.1/tcp/0".to_owned()],
            upload_bytes_per_second: None,
            limits: Limits::default(),
        };
        let wire = Wire::start(&config, &credentials, trust, shelf).await.unwrap();
        let addresses = wire.addresses();
        Node { transport: Arc::new(wire), addresses, credentials }
    }

    /// The node is gone, as if killed.
    pub fn kill(&self, node: Node) {
        if let Some(network) = &self.network {
            network.leave(&node.transport.peer());
        }
        drop(node);
    }
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(since.as_secs()).unwrap()
}

/// A blob in which no two pieces are alike.
pub fn blob(len: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ len as u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes.into()
}

pub fn whole(blob: &Bytes, class: Class) -> Request {
    let len = blob.len() as u64;
    let pieces = std::iter::once(0..Geometry::of(len).unwrap().pieces()).collect();
    Request { scope: Scope::Public, blob: Digest::of(blob), len, pieces, class }
}
