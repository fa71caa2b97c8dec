//! Requests in flight: pieces from a peer or from the origin, checked and handed to their order.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use skimmer_cache::{Blame, BlobRef, Class, Delivery, Via};
use skimmer_identity::{PeerId, SignedValue, Trust, trust};
use skimmer_proto::piece_table::piece_value;
use skimmer_proto::{Geometry, PieceSet, PieceTable, Scope, TaskId, error_chain};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::metrics::{Because, Failing};
use super::{Inner, Joined, unix_now};
use crate::plan::{Event, Fault, RequestId, Why};
use crate::transport::{self, Arrival, Call, Reason, Request};

/// A peer that can't be reached for so long is gone.
const CONNECT: Duration = Duration::from_secs(10);
/// An origin that sends nothing for so long has failed.
const ORIGIN_STALL: Duration = Duration::from_secs(60);

/// What a request needs to know of its task.
struct About {
    blob: BlobRef,
    geometry: Geometry,
    scope: Scope,
    table: Option<Arc<PieceTable>>,
}

impl Inner {
    fn about(&self, task: &TaskId) -> Option<About> {
        let state = self.state();
        let task = state.tasks.get(task)?;
        Some(About {
            blob: task.blob.clone(),
            geometry: task.geometry,
            scope: task.scope.clone(),
            table: task.table.clone(),
        })
    }

    /// Asks a peer.
    pub(super) async fn ask(
        self: Arc<Self>,
        id: RequestId,
        task: TaskId,
        peer: PeerId,
        pieces: PieceSet,
        class: Class,
    ) -> Result<(), Fault> {
        let result = self.ask_peer(id, task, peer, pieces, class).await;
        if let Err(fault) = &result {
            tracing::debug!(%peer, ?fault, "request failed");
            self.count_failure("peer", *fault);
        }
        result
    }

    async fn ask_peer(
        self: &Arc<Self>,
        id: RequestId,
        task: TaskId,
        peer: PeerId,
        pieces: PieceSet,
        class: Class,
    ) -> Result<(), Fault> {
        let (Some(joined), Some(about)) = (self.joined(), self.about(&task)) else {
            return Err(Fault::Gone);
        };
        let addresses = self.addresses(&peer);
        let connected = timeout(CONNECT, joined.transport.connect(&peer, &addresses)).await;
        connected.map_err(|_| Fault::Gone)?.map_err(|error| fault(&error))?;
        self.show_grant(&joined, &peer, &about.scope).await?;
        let request = Request {
            scope: about.scope.clone(),
            blob: about.blob.digest,
            len: about.blob.len,
            pieces: pieces.runs().take(transport::MAX_RUNS).collect(),
            class,
        };
        let incoming = joined.transport.pieces(&peer, request).await;
        let mut incoming = incoming.map_err(|error| {
            if is_about_rights(&error) {
                // The grant that it was shown has ended, or it has forgotten it: it is shown again.
                self.shown.forget(&peer);
            }
            fault(&error)
        })?;
        while let Some(arrival) = incoming.next().await {
            let (piece, bytes, signed) = match arrival.map_err(|error| fault(&error))? {
                Arrival::Piece { piece, bytes, signed } => (piece, bytes, signed),
                Arrival::Absent(_) => continue,
            };
            self.metrics.received.inc_by(bytes.len() as u64);
            let vouched = match check(&joined, &about, task, piece, &bytes, signed).await {
                // The word for this one is worth nothing here: as good as not there.
                Err(Fault::Absent) => continue,
                checked => checked?,
            };
            if let Some(signed) = vouched
                && let Some(task) = self.state().tasks.get_mut(&task)
            {
                task.vouch(signed);
            }
            self.deliver(id, task, Delivery { piece, bytes, via: Via::Peer }).await;
        }
        Ok(())
    }

    /// Before the first request of a scope that isn't public.
    pub(super) async fn show_grant(
        &self,
        joined: &Joined,
        peer: &PeerId,
        scope: &Scope,
    ) -> Result<(), Fault> {
        if *scope == Scope::Public || !self.shown.is_new(peer, scope) {
            return Ok(());
        }
        let grant = self.grant(scope).await.ok_or(Fault::Refused)?;
        let shown = joined.transport.call(peer, Call::ShowGrant(grant)).await;
        shown.map_err(|error| fault(&error))?;
        self.shown.note(peer, scope);
        Ok(())
    }

    /// Reads contiguous pieces from the origin, and vouches for them.
    pub(super) async fn read_origin(
        self: Arc<Self>,
        id: RequestId,
        task: TaskId,
        pieces: PieceSet,
        class: Class,
        why: Why,
    ) -> Result<(), Fault> {
        let Some(about) = self.about(&task) else { return Err(Fault::Gone) };
        if why != Why::Leased {
            let blob = about.blob.digest;
            tracing::info!(%blob, pieces = pieces.len(), why = why.code(), "reading the origin without a lease");
        }
        let result = self.read_run(id, task, &about, &pieces, class, why).await;
        if let Err(fault) = &result {
            self.count_failure("origin", *fault);
        }
        result
    }

    async fn read_run(
        self: &Arc<Self>,
        id: RequestId,
        task: TaskId,
        about: &About,
        pieces: &PieceSet,
        class: Class,
        why: Why,
    ) -> Result<(), Fault> {
        let Some(run) = pieces.runs().next() else { return Ok(()) };
        let failed = |error: skimmer_cache::FetchError| {
            tracing::info!(blob = %about.blob.digest, error = error_chain(&error), "the origin failed");
            if error.blame == Blame::Refused { Fault::Refused } else { Fault::Gone }
        };
        let Range { start, end } = run.clone();
        let bytes = about.geometry.span(start).start..about.geometry.span(end - 1).end;
        let mut stream = self.origin.fetch(&about.blob, bytes, class).await.map_err(failed)?;
        let counted = self.metrics.origin.get_or_create_owned(&Because { why: why.code() });
        let mut rest = Bytes::new();
        for piece in run {
            let span = about.geometry.span(piece);
            let len = usize::try_from(span.end - span.start).unwrap_or(usize::MAX);
            let mut buffer = BytesMut::with_capacity(len);
            while buffer.len() < len {
                if rest.is_empty() {
                    let next = timeout(ORIGIN_STALL, stream.next()).await;
                    rest = next.map_err(|_| Fault::Slow)?.ok_or(Fault::Gone)?.map_err(failed)?;
                    counted.inc_by(rest.len() as u64);
                }
                let take = rest.len().min(len - buffer.len());
                buffer.extend_from_slice(&rest.split_to(take));
            }
            let bytes = buffer.freeze();
            self.vouch(task, about, piece, &bytes).await;
            self.deliver(id, task, Delivery { piece, bytes, via: Via::Origin }).await;
        }
        Ok(())
    }

    /// States the value of a piece that this node has taken from the origin.
    async fn vouch(self: &Arc<Self>, task: TaskId, about: &About, piece: u32, bytes: &Bytes) {
        if about.table.is_some() {
            return;
        }
        let Some(joined) = self.joined() else { return };
        let (bytes, geometry) = (bytes.clone(), about.geometry);
        let sign = move || joined.sign(task, piece, piece_value(geometry, piece, &bytes));
        if let Ok(signed) = spawn_blocking(sign).await
            && let Some(task) = self.state().tasks.get_mut(&task)
        {
            task.vouch(signed);
        }
    }

    /// Hands a piece to whoever ordered it. The planner hears of it only when its reader has room,
    /// and in the same step.
    async fn deliver(self: &Arc<Self>, request: RequestId, task: TaskId, delivery: Delivery) {
        let piece = delivery.piece;
        loop {
            let sink = self.state().tasks.get(&task).and_then(|task| task.sink(piece));
            let Some((order, sink)) = sink else { return };
            let Ok(room) = sink.reserve().await else { return };
            let mut state = self.state();
            // It may have ended meanwhile, and another may want the same.
            let Some(known) = state.tasks.get_mut(&task).filter(|task| task.is_owed(order, piece))
            else {
                continue;
            };
            known.delivered(piece);
            self.apply(state, Event::Received { request, piece });
            room.send(Ok(delivery));
            return;
        }
    }

    fn count_failure(&self, from: &'static str, fault: Fault) {
        let fault = match fault {
            Fault::Gone => "gone",
            Fault::Slow => "slow",
            Fault::Absent => "absent",
            Fault::Corrupt => "corrupt",
            Fault::Refused => "refused",
        };
        self.metrics.failures.get_or_create(&Failing { from, fault }).inc();
    }
}

impl Joined {
    /// This node's word for a piece.
    pub(super) fn sign(&self, task: TaskId, piece: u32, value: [u8; 32]) -> SignedValue {
        let credentials = &self.member.credentials;
        SignedValue::sign(credentials.key(), credentials.certificate(), task, piece, value)
    }
}

/// Checks a piece that came from a peer: against the signed value that came with it, unless there is
/// a table, against which the cache checks it.
async fn check(
    joined: &Arc<Joined>,
    about: &About,
    task: TaskId,
    piece: u32,
    bytes: &Bytes,
    signed: Option<SignedValue>,
) -> Result<Option<SignedValue>, Fault> {
    if about.table.is_some() {
        return Ok(None);
    }
    let signed = signed.filter(|signed| signed.task == task && signed.piece == piece);
    let signed = signed.ok_or(Fault::Corrupt)?;
    let (joined, geometry, bytes) = (Arc::clone(joined), about.geometry, bytes.clone());
    let job = move || {
        let value = piece_value(geometry, piece, &bytes);
        judge(signed, &value, &joined.member.trust, unix_now())
    };
    spawn_blocking(job).await.unwrap_or(Err(Fault::Gone)).map(Some)
}

/// What the word that came with a piece of `value` is worth at `now` (Unix seconds).
fn judge(
    signed: SignedValue,
    value: &[u8; 32],
    trust: &Trust,
    now: i64,
) -> Result<SignedValue, Fault> {
    if signed.value != *value {
        return Err(Fault::Corrupt);
    }
    match signed.check(trust, now) {
        Ok(_) => Ok(signed),
        // It was good when it was given: whoever passes it on is no liar.
        Err(trust::Error::Expired { .. } | trust::Error::Blocked { .. }) => Err(Fault::Absent),
        Err(_) => Err(Fault::Corrupt),
    }
}

fn is_about_rights(error: &transport::Error) -> bool {
    matches!(error, transport::Error::Refused { source, .. } if source.reason == Reason::Rights)
}

fn fault(error: &transport::Error) -> Fault {
    match error {
        transport::Error::Refused { source, .. } => match source.reason {
            Reason::Rights => Fault::Refused,
            Reason::Absent | Reason::Invalid => Fault::Absent,
            Reason::Busy => Fault::Slow,
            Reason::Broken => Fault::Gone,
        },
        transport::Error::Blocked { .. } => Fault::Refused,
        transport::Error::Crowded { .. } => Fault::Slow,
        transport::Error::Answer { .. } => Fault::Corrupt,
        transport::Error::Request { .. } => Fault::Absent,
        transport::Error::Connect { .. }
        | transport::Error::NoLink { .. }
        | transport::Error::Gone { .. } => Fault::Gone,
    }
}

#[cfg(test)]
mod tests {
    use skimmer_identity::{Authority, Key, Membership, Role};
    use skimmer_proto::Digest;

    use super::*;

    #[test]
    fn a_word_that_has_run_out_accuses_nobody() {
        let [authority, stranger] = [(); 2].map(|()| Authority::create("c", 0).unwrap());
        let trust = Trust::new(Duration::from_secs(10));
        trust.set_authority("c", authority.certificate_der()).unwrap();
        let signed = |authority: &Authority| {
            let key = Key::generate().unwrap();
            let (peer, cluster, zone) = (key.peer(), "c".to_owned(), String::new());
            let role = Role::Peer;
            let membership =
                Membership { peer, cluster, zone, role, not_before: 0, not_after: 100 };
            let certificate = authority.issue(&membership).unwrap().into();
            let task = TaskId::of(&Scope::Public, &Digest::of(b"blob"));
            (peer, SignedValue::sign(&key, certificate, task, 7, [9; 32]))
        };
        let (_, good) = signed(&authority);
        let (revoked, of_revoked) = signed(&authority);
        let (_, foreign) = signed(&stranger);
        trust.block(revoked);
        let forged = SignedValue { signature: [0; 64], ..good.clone() };
        for (signed, value, now, expected) in [
            (&good, [9; 32], 50, None),
            (&good, [9; 32], 110, None),
            (&good, [9; 32], 111, Some(Fault::Absent)),
            (&of_revoked, [9; 32], 50, Some(Fault::Absent)),
            (&good, [8; 32], 50, Some(Fault::Corrupt)),
            (&good, [8; 32], 111, Some(Fault::Corrupt)),
            (&forged, [9; 32], 50, Some(Fault::Corrupt)),
            (&forged, [9; 32], 111, Some(Fault::Corrupt)),
            (&foreign, [9; 32], 50, Some(Fault::Corrupt)),
        ] {
            let judged = judge(signed.clone(), &value, &trust, now);
            assert_eq!(judged.err(), expected, "{value:?} at {now}");
        }
    }
}
