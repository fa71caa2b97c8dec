//! A source that delivers any piece in any order, beside one of ranges.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use prometheus_client::registry::Registry;
use skimmer_cache::{
    Blame, Blob, BlobRef, Cache, Class, Delivery, FetchError, Order, PieceSource, PieceStream,
    Source, Sources, Urgent, Via,
};
use skimmer_proto::{Digest, PieceSet, PieceTable, Scope};
use tokio::sync::{Notify, mpsc};

use crate::twin::{Twin, bytes, config, pulled, table};

const MIB: usize = 1 << 20;

/// Delivers pieces backwards, as it is told.
#[derive(Default)]
struct Backwards {
    blobs: Mutex<BTreeMap<Digest, Bytes>>,
    /// Doesn't take blobs.
    closed: AtomicBool,
    /// Ends each stream after so many pieces, with an error.
    fails_after: Mutex<Option<usize>>,
    /// Flips a bit of this piece, once.
    corrupts: Mutex<Option<u32>>,
    /// Delivers nothing until told to.
    gate: Option<Arc<Notify>>,
    orders: Mutex<Vec<(PieceSet, Class)>>,
    urgent: Mutex<Vec<mpsc::UnboundedReceiver<Urgent>>>,
    told: Mutex<Vec<String>>,
}

impl Backwards {
    fn tell(&self, what: String) {
        self.told.lock().unwrap().push(what);
    }
}

#[async_trait]
impl PieceSource for Backwards {
    fn name(&self) -> &'static str {
        "backwards"
    }

    fn takes(&self, _: &BlobRef) -> bool {
        !self.closed.load(Ordering::Relaxed)
    }

    async fn fetch(&self, order: Order) -> Result<PieceStream, FetchError> {
        self.orders.lock().unwrap().push((order.pieces.clone(), order.class));
        self.urgent.lock().unwrap().push(order.urgent);
        if let Some(gate) = &self.gate {
            gate.notified().await;
        }
        let digest = order.blob.digest;
        let content = self.blobs.lock().unwrap()[&digest].clone();
        let corrupts = self.corrupts.lock().unwrap().take();
        let mut pieces: Vec<_> = order.pieces.iter().collect();
        pieces.reverse();
        let deliver = move |piece| {
            let span = order.geometry.span(piece);
            let range = usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap();
            let mut bytes = content[range].to_vec();
            if corrupts == Some(piece) {
                bytes[0] ^= 1;
            }
            Ok(Delivery { piece, bytes: bytes.into(), via: Via::Peer })
        };
        let mut parts: Vec<Result<_, FetchError>> = pieces.into_iter().map(deliver).collect();
        if let Some(after) = *self.fails_after.lock().unwrap() {
            parts.truncate(after);
            parts.push(Err(FetchError {
                digest,
                from: "backwards".to_owned(),
                blame: Blame::Local,
                retryable: true,
                source: "it was told to fail".into(),
            }));
        }
        Ok(futures::stream::iter(parts).boxed())
    }

    fn wrong(&self, _: &BlobRef, piece: u32) {
        // Were the next order made already, it would come meanwhile.
        tokio::task::block_in_place(|| std::thread::sleep(Duration::from_millis(20)));
        let order = self.orders.lock().unwrap().len();
        self.tell(format!("wrong {piece} of order {order}"));
    }

    fn arrived(&self, _: &Arc<Blob>, piece: u32) {
        self.tell(format!("arrived {piece}"));
    }

    fn proved(&self, blob: &Arc<Blob>, table: &Arc<PieceTable>) {
        assert_eq!(blob.digest(), table.blob);
        self.tell("proved".to_owned());
    }

    fn disproved(&self, _: &BlobRef) {
        self.tell("disproved".to_owned());
    }

    fn forgotten(&self, _: Digest) {
        self.tell("forgotten".to_owned());
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    source: Arc<Backwards>,
    twin: Arc<Twin>,
    cache: Cache,
    blob: Arc<Blob>,
    content: Vec<u8>,
}

fn bench(source: Backwards, len: usize) -> Bench {
    let (dir, twin, content) = (tempfile::tempdir().unwrap(), Twin::honest(), bytes(len, 7));
    let reference = twin.add(&content);
    source.blobs.lock().unwrap().insert(reference.digest, content.clone().into());
    let source = Arc::new(source);
    let sources = Sources {
        pieces: Some(Arc::clone(&source) as _),
        ranges: Arc::clone(&twin) as Arc<dyn Source>,
    };
    let cache = Cache::open(config(dir.path()), sources, &mut Registry::default()).unwrap();
    let blob = cache.blob(reference).unwrap();
    Bench { _dir: dir, source, twin, cache, blob, content }
}

#[tokio::test]
async fn a_whole_blob_is_one_order_and_comes_out_in_order() {
    // More than the read-ahead window and than one segment.
    let b = bench(Backwards::default(), 70 * MIB);
    assert!(pulled(&b.blob).await.unwrap() == b.content);
    let orders = b.source.orders.lock().unwrap().clone();
    assert_eq!(orders, [(PieceSet::all(70), Class::PullThrough)]);
    assert!(b.twin.requests().is_empty(), "the registry wasn't asked");
    assert_eq!(b.blob.fetched_via(), [0, 70 << 20]);
    b.blob.prove(table(&b.content)).unwrap();
    let told = b.source.told.lock().unwrap();
    assert_eq!((told[0].as_str(), told.len()), ("arrived 69", 71));
    assert_eq!(told.last().map(String::as_str), Some("proved"));
}

#[tokio::test]
async fn ranges_serve_what_the_source_of_pieces_does_not_take_or_fails_at() {
    let b = bench(Backwards::default(), 5 * MIB);
    b.source.closed.store(true, Ordering::Relaxed);
    assert!(pulled(&b.blob).await.unwrap() == b.content);
    assert!(b.source.orders.lock().unwrap().is_empty());
    assert_eq!((b.twin.bytes_asked(), b.blob.fetched_via()), (5 << 20, [5 << 20, 0]));
    assert_eq!(b.source.told.lock().unwrap().len(), 20, "it hears of all arrivals");

    let b = bench(Backwards { fails_after: Mutex::new(Some(15)), ..Backwards::default() }, 5 * MIB);
    assert!(pulled(&b.blob).await.unwrap() == b.content);
    assert_eq!(b.twin.bytes_asked(), 5 << 18, "only the rest");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_piece_is_reported_and_asked_for_again() {
    let b = bench(Backwards { corrupts: Mutex::new(Some(3)), ..Backwards::default() }, 2 * MIB);
    b.blob.set_table(Arc::new(table(&b.content))).unwrap();
    b.blob.ensure(0..u64::MAX, Class::Background).await.unwrap();
    assert_eq!(pulled(&b.blob).await.unwrap(), b.content);
    assert!(b.source.told.lock().unwrap().contains(&"wrong 3 of order 1".to_owned()));
    let orders: Vec<_> = b.source.orders.lock().unwrap().iter().map(|o| o.0.clone()).collect();
    assert_eq!(orders, [PieceSet::all(8), std::iter::once(3).collect()]);
}

#[tokio::test]
async fn a_fault_makes_an_order_in_flight_more_urgent_and_a_dropped_wait_ends_it() {
    let gate = Arc::new(Notify::new());
    let b = bench(Backwards { gate: Some(Arc::clone(&gate)), ..Backwards::default() }, 4 * MIB);
    b.blob.set_table(Arc::new(table(&b.content))).unwrap();
    let blob = Arc::clone(&b.blob);
    let all = tokio::spawn(async move { blob.ensure(0..u64::MAX, Class::Background).await });
    let ordered = async || {
        while b.source.urgent.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    ordered().await;
    let mut urgent = b.source.urgent.lock().unwrap().remove(0);
    let fault = b.blob.ensure(MIB as u64..MIB as u64 + 1, Class::Fault);
    tokio::select! {
        _ = fault => panic!("nothing can have come"),
        told = urgent.recv() => {
            let pieces = std::iter::once(4).collect();
            assert_eq!(told, Some(Urgent { pieces, class: Class::Fault }));
        }
    }
    all.abort();
    assert!(urgent.recv().await.is_none(), "the order ends when nobody waits for it");
    let blob = Arc::clone(&b.blob);
    let again = tokio::spawn(async move { blob.ensure(0..1, Class::Fault).await });
    ordered().await;
    gate.notify_one();
    again.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_held_is_found_by_digest_with_its_scopes() {
    let b = bench(Backwards::default(), 3 * MIB);
    b.blob.set_table(Arc::new(table(&b.content))).unwrap();
    b.blob.ensure(0..1, Class::Fault).await.unwrap();
    let scopes = [Scope::Public, Scope::Repository("docker.io/library/debian".to_owned())];
    for scope in &scopes {
        b.blob.allow(scope).unwrap();
    }
    let held = b.cache.held(b.blob.digest()).unwrap().unwrap();
    assert_eq!(held.blob.verified(held.table.as_ref().unwrap()), PieceSet::all(1));
    assert_eq!(held.blob.present(), PieceSet::all(1));
    assert_eq!(held.blob.read_piece(0).unwrap().unwrap(), b.content[..256 << 10]);
    assert!(held.blob.read_piece(1).unwrap().is_none());
    assert!(b.cache.held(Digest::of(b"another")).unwrap().is_none());
    assert_eq!(b.cache.inventory().await.unwrap(), [b.blob.digest()]);
    b.cache.drain().await.unwrap();
    let again = Cache::open(
        config(b._dir.path()),
        Sources::only(Arc::clone(&b.twin) as _),
        &mut Registry::default(),
    )
    .unwrap();
    let held = again.held(b.blob.digest()).unwrap().unwrap();
    assert_eq!(held.blob.scopes(), scopes.into_iter().collect());
}
