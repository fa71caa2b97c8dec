//! What the swarm knows of each task: the blob, what of it this node serves, who vouches for it.

use std::collections::BTreeMap;
use std::sync::Arc;

use skimmer_cache::{BlobRef, Delivery, FetchError};
use skimmer_identity::SignedValue;
use skimmer_proto::{Geometry, PieceSet, PieceTable, Scope};
use tokio::sync::mpsc;

/// Pieces that wait for an order's reader.
pub const QUEUED_PIECES: usize = 4;

/// A blob in a scope.
#[derive(Debug)]
pub struct Task {
    pub blob: BlobRef,
    pub geometry: Geometry,
    pub scope: Scope,
    /// Whether this node has itself proved its right to read the scope, so that it may serve it.
    pub proved: bool,
    /// Trusted; once there is one, signed values are not looked at.
    pub table: Option<Arc<PieceTable>>,
    /// On disk and vouched for.
    pub have: PieceSet,
    /// What was taken from the origin elsewhere and vouched for by its taker.
    pub values: BTreeMap<u32, SignedValue>,
    /// Taken from the origin by this node, outside the swarm: it can vouch for them itself.
    pub own: PieceSet,
    pub orders: BTreeMap<u64, Sink>,
    /// Whether the scheduler of this stream knows the task.
    pub announced: bool,
}

/// The swarm's end of an order.
#[derive(Debug)]
pub struct Sink {
    /// Not delivered yet.
    pub left: PieceSet,
    pub sender: mpsc::Sender<Result<Delivery, FetchError>>,
}

impl Task {
    pub fn new(blob: BlobRef, geometry: Geometry, scope: Scope) -> Self {
        Self {
            blob,
            geometry,
            scope,
            proved: false,
            table: None,
            have: PieceSet::new(),
            values: BTreeMap::new(),
            own: PieceSet::new(),
            orders: BTreeMap::new(),
            announced: false,
        }
    }

    /// The order to which a piece is to be delivered.
    pub fn sink(&self, piece: u32) -> Option<(u64, mpsc::Sender<Result<Delivery, FetchError>>)> {
        let (id, sink) = self.orders.iter().find(|(_, sink)| sink.left.contains(piece))?;
        Some((*id, sink.sender.clone()))
    }

    /// Whether an order still waits for a piece.
    pub fn is_owed(&self, order: u64, piece: u32) -> bool {
        self.orders.get(&order).is_some_and(|sink| sink.left.contains(piece))
    }

    /// A piece is delivered; an order that has all its pieces is closed.
    pub fn delivered(&mut self, piece: u32) {
        for sink in self.orders.values_mut() {
            sink.left.remove(piece);
        }
        self.orders.retain(|_, sink| !sink.left.is_empty());
    }

    /// Whether this node can vouch for a piece that is on its disk.
    pub fn is_vouched(&self, piece: u32) -> bool {
        self.table.is_some() || self.values.contains_key(&piece) || self.own.contains(piece)
    }

    /// Remembers who vouches for a piece. Certificates are shared between values: they are the same
    /// few again and again.
    pub fn vouch(&mut self, mut signed: SignedValue) {
        let same =
            self.values.values().rev().take(64).find(|v| v.certificate == signed.certificate);
        if let Some(known) = same {
            signed.certificate = Arc::clone(&known.certificate);
        }
        self.values.insert(signed.piece, signed);
    }
}
