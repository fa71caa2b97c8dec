//! What every transport does; the twin and the real one pass the same suite.

mod world;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use skimmer_cache::Class;
use skimmer_identity::SignedValue;
use skimmer_proto::{Digest, Geometry, PieceSet, Scope, TaskId};
use tokio::time::timeout;

use super::memory::Network;
use super::{Arrival, Call, Error, Haves, Incoming, Kind, Reason, Refusal, Reply, Request};
use world::World;
pub use world::{Shelf, blob, whole};

const LONG: Duration = Duration::from_secs(20);

fn part(blob: &Bytes, piece: u32) -> Bytes {
    let span = Geometry::of(blob.len() as u64).unwrap().span(piece);
    blob.slice(usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap())
}

async fn next(incoming: &mut Incoming) -> Option<Result<Arrival, Error>> {
    timeout(LONG, incoming.next()).await.expect("something in time")
}

/// Every arrival until the end, which must not be an error.
async fn all(mut incoming: Incoming) -> Vec<Arrival> {
    let mut arrivals = Vec::new();
    while let Some(arrival) = next(&mut incoming).await {
        arrivals.push(arrival.unwrap());
    }
    arrivals
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it never came to this: {what}");
}

const MIB: usize = 1 << 20;

async fn requests(world: World) {
    let data = blob(5 * MIB + 17);
    let shelf = Shelf { absent: [4].into(), ..Shelf::with(&Scope::Public, &data) };
    let shelf = Arc::new(shelf);
    let (a, b) = (world.node("one", Arc::default()).await, world.node("one", shelf.clone()).await);
    let request = Request { pieces: vec![20..21, 3..6], ..whole(&data, Class::PullThrough) };
    let statement = SignedValue::sign(
        b.credentials.key(),
        b.credentials.certificate(),
        request.task(),
        3,
        [7; 32],
    );
    shelf.signed.lock().unwrap().insert(3, statement.clone());

    let none = a.transport.pieces(&b.transport.peer(), request.clone()).await;
    assert!(matches!(none, Err(Error::NoLink { .. })));
    for _ in 0..2 {
        let met = a.connect(&b).await.unwrap();
        assert_eq!(met, b.credentials.membership());
    }
    let piece = |piece, signed| Arrival::Piece { piece, bytes: part(&data, piece), signed };
    let expected = [piece(20, None), piece(3, Some(statement)), Arrival::Absent(4), piece(5, None)];
    for class in Class::ALL {
        let request = Request { class, ..request.clone() };
        assert_eq!(all(a.pieces(&b, request).await).await, expected);
    }
    for senseless in [&[][..], &[1..1, 2..3], &[1..3, 2..4], &[0..1, 2..99]] {
        let request = Request { pieces: senseless.to_vec(), ..request.clone() };
        let refused = a.transport.pieces(&b.transport.peer(), request).await;
        assert!(matches!(refused, Err(Error::Request { .. })));
    }
    // The link works both ways, whoever dialled.
    shelf.open.store(0, Ordering::SeqCst);
    assert!(matches!(b.call(&a, Call::ShowGrant(Bytes::new())).await, Ok(Reply::Done)));
    let (mine, theirs) = (a.transport.links(), b.transport.links());
    assert_eq!((mine.len(), theirs.len()), (1, 1));
    assert_eq!(mine[0].membership, b.credentials.membership());
    assert_eq!(theirs[0].membership, a.credentials.membership());
    let bytes = 3 * (part(&data, 20).len() + 2 * (256 << 10)) as u64;
    assert_eq!(mine[0].received, bytes);
    // The sender counts what has left it, a moment after it may have come.
    until("all is counted", || b.transport.links()[0].sent == bytes).await;
}

async fn pipelining(world: World) {
    let blobs: Vec<_> = (1..=20).map(|n| blob(n * 300_000)).collect();
    let shelf = Shelf::default();
    for data in &blobs {
        shelf.blobs.lock().unwrap().insert(whole(data, Class::Fault).task(), data.clone());
    }
    let (a, b) =
        (world.node("one", Arc::default()).await, world.node("one", Arc::new(shelf)).await);
    a.connect(&b).await.unwrap();
    let mut under_way = Vec::new();
    for (data, class) in blobs.iter().zip(Class::ALL.into_iter().cycle()) {
        under_way.push(a.pieces(&b, whole(data, class)).await);
        a.call(&b, Call::ShowGrant(Bytes::from_static(b"grant"))).await.unwrap();
    }
    for (data, incoming) in blobs.iter().zip(under_way) {
        let arrivals = all(incoming).await;
        assert_eq!(arrivals.len(), data.len().div_ceil(256 << 10));
        for (piece, arrival) in (0..).zip(arrivals) {
            assert_eq!(arrival, Arrival::Piece { piece, bytes: part(data, piece), signed: None });
        }
    }
}

async fn cancellation(world: World) {
    let data = blob(40 * MIB);
    let shelf = Arc::new(Shelf::with(&Scope::Public, &data));
    let (a, b) = (world.node("one", Arc::default()).await, world.node("one", shelf.clone()).await);
    a.connect(&b).await.unwrap();
    let mut incoming = a.pieces(&b, whole(&data, Class::Background)).await;
    assert!(next(&mut incoming).await.unwrap().is_ok());
    assert_eq!(shelf.open.load(Ordering::SeqCst), 1);
    drop(incoming);
    until("the server has closed the blob", || shelf.open.load(Ordering::SeqCst) == 0).await;
    let read = shelf.read.load(Ordering::SeqCst);
    assert!(read < 12 * MIB as u64, "{read} bytes were read for a cancelled request");
    assert_eq!(all(a.pieces(&b, whole(&data, Class::Fault)).await).await.len(), 160);
}

async fn refusals(world: World) {
    let shelf = Arc::new(Shelf::default());
    let (a, b) = (world.node("one", Arc::default()).await, world.node("one", shelf).await);
    a.connect(&b).await.unwrap();
    let data = blob(10);
    let secret = Scope::Repository("host/secret".to_owned());
    for (scope, reason) in [(secret, Reason::Rights), (Scope::Public, Reason::Absent)] {
        let mut incoming = a.pieces(&b, Request { scope, ..whole(&data, Class::Fault) }).await;
        match next(&mut incoming).await {
            Some(Err(Error::Refused { source, .. })) => assert_eq!(source.reason, reason),
            other => panic!("{other:?}"),
        }
        assert!(next(&mut incoming).await.is_none());
    }
}

async fn small_calls(world: World) {
    let (object, scope) = (blob(3 * MIB), Scope::Repository("host/a".to_owned()));
    let get = |object: Digest| {
        let (scope, blob) = (scope.clone(), Digest::of(b"blob"));
        Call::Get { scope, blob, kind: Kind::LayerIndex, object }
    };
    let honest = Arc::new(Shelf::with(&scope, &object));
    let liar = Arc::new(Shelf { lies: true, ..Shelf::with(&scope, &object) });
    let (a, b) = (world.node("one", Arc::default()).await, world.node("one", honest.clone()).await);
    let c = world.node("one", liar).await;
    a.connect(&b).await.unwrap();
    a.connect(&c).await.unwrap();
    let digest = Digest::of(&object);
    assert_eq!(a.call(&b, get(digest)).await.unwrap(), Reply::Object(object));
    assert!(matches!(a.call(&c, get(digest)).await, Err(Error::Answer { .. })));
    match a.call(&b, get(Digest::of(b"other"))).await {
        Err(Error::Refused { source, .. }) => {
            assert_eq!(source, Refusal::new(Reason::Absent, "no such object"));
        }
        other => panic!("{other:?}"),
    }
    for pieces in [PieceSet::new(), PieceSet::all(5), [1, 70_000].into_iter().collect()] {
        let task = TaskId::of(&scope, &digest);
        let haves = Haves { pieces, coming: PieceSet::all(9) };
        let call = Call::Haves { task, haves: haves.clone() };
        assert_eq!(a.call(&b, call).await.unwrap(), Reply::Haves(haves));
    }
    let grant = Bytes::from_static(b"grant");
    assert_eq!(a.call(&b, Call::ShowGrant(grant.clone())).await.unwrap(), Reply::Done);
    assert_eq!(*honest.grants.lock().unwrap(), [grant]);
}

async fn link_loss(world: World) {
    let data = blob(60 * MIB);
    let shelf = Shelf::with(&Scope::Public, &data);
    let shelf = Arc::new(Shelf { delay: Duration::from_millis(5), ..shelf });
    let (a, b) = (world.node("one", Arc::default()).await, world.node("one", shelf).await);
    a.connect(&b).await.unwrap();
    let mut incoming = a.pieces(&b, whole(&data, Class::PullThrough)).await;
    assert!(next(&mut incoming).await.unwrap().is_ok());
    let peer = b.transport.peer();
    world.kill(b);
    let last = loop {
        match next(&mut incoming).await {
            Some(Ok(_)) => {}
            last => break last,
        }
    };
    assert!(matches!(last, Some(Err(Error::Gone { .. }))), "{last:?}");
    until("the link is gone", || a.transport.links().is_empty()).await;
    let none = a.transport.pieces(&peer, whole(&data, Class::Fault)).await;
    assert!(matches!(none, Err(Error::NoLink { .. })));
}

async fn slow_reader(world: World) {
    let data = blob(80 * MIB);
    let shelf = Arc::new(Shelf::with(&Scope::Public, &data));
    let (a, b) = (world.node("one", Arc::default()).await, world.node("one", shelf.clone()).await);
    a.connect(&b).await.unwrap();
    let stuck = a.pieces(&b, whole(&data, Class::PullThrough)).await;
    until("something was sent", || shelf.read.load(Ordering::SeqCst) >= MIB as u64).await;
    // Behind it on the same link, all else works.
    let request = Request { pieces: vec![70..75, 75..80], ..whole(&data, Class::Background) };
    assert_eq!(all(a.pieces(&b, request).await).await.len(), 10);
    let read = shelf.read.load(Ordering::SeqCst);
    assert!(read <= 15 * MIB as u64, "{read} bytes were read for one who doesn't take them");
    // Nothing was lost by the wait.
    let arrivals = all(stuck).await;
    assert_eq!(arrivals.len(), 80);
}

async fn big_run(world: World) {
    let data = blob(200 * MIB + 1);
    let shelf = Arc::new(Shelf::with(&Scope::Public, &data));
    let (a, b) = (world.node("one", Arc::default()).await, world.node("one", shelf).await);
    a.connect(&b).await.unwrap();
    let mut incoming = a.pieces(&b, whole(&data, Class::PullThrough)).await;
    let mut expected = 0;
    while let Some(arrival) = next(&mut incoming).await {
        let Arrival::Piece { piece, bytes, .. } = arrival.unwrap() else { panic!("a piece") };
        assert_eq!(piece, expected);
        assert!(bytes == part(&data, piece), "piece {piece}");
        expected += 1;
    }
    assert_eq!(expected, 201);
}

async fn faults_overtake(world: World) {
    let data = blob(60 * MIB);
    let shelf = Shelf::with(&Scope::Public, &data);
    let shelf = Arc::new(Shelf { delay: Duration::from_millis(5), ..shelf });
    let (a, b) = (world.node("one", Arc::default()).await, world.node("one", shelf).await);
    a.connect(&b).await.unwrap();
    let bulk = a.pieces(&b, whole(&data, Class::PullThrough)).await;
    // Nobody takes it in, so it can't be over before the faults are.
    for piece in 200..210 {
        let one = Request {
            pieces: std::iter::once(piece..piece + 1).collect(),
            ..whole(&data, Class::Fault)
        };
        assert_eq!(all(a.pieces(&b, one).await).await.len(), 1);
    }
    assert_eq!(all(bulk).await.len(), 240);
}

async fn blocked(world: World) {
    let (a, b) = (world.node("one", Arc::default()).await, world.node("one", Arc::default()).await);
    a.connect(&b).await.unwrap();
    b.transport.block(&a.transport.peer());
    until("the link is gone", || a.transport.links().is_empty()).await;
    assert!(b.transport.links().is_empty());
    assert!(matches!(b.connect(&a).await, Err(Error::Blocked { .. })));
    assert!(matches!(a.connect(&b).await, Err(Error::Connect { .. })));
    assert!(a.transport.links().is_empty() && b.transport.links().is_empty());
    b.transport.unblock(&a.transport.peer());
    b.connect(&a).await.unwrap();
}

async fn other_cluster(world: World) {
    let (a, b) = (world.node("one", Arc::default()).await, world.node("two", Arc::default()).await);
    for (from, to) in [(&a, &b), (&b, &a)] {
        assert!(matches!(from.connect(to).await, Err(Error::Connect { .. })));
        let call = from.call(to, Call::ShowGrant(Bytes::new())).await;
        assert!(matches!(call, Err(Error::NoLink { .. })));
    }
    assert!(a.transport.links().is_empty() && b.transport.links().is_empty());
}

async fn reconnecting(world: World) {
    let (a, b) = (world.node("one", Arc::default()).await, world.node("one", Arc::default()).await);
    // Both ends at once.
    let (one, other) = tokio::join!(a.connect(&b), b.connect(&a));
    one.unwrap();
    other.unwrap();
    for _ in 0..3 {
        a.transport.disconnect(&b.transport.peer());
        assert!(a.transport.links().is_empty());
        until("the other end has noticed", || b.transport.links().is_empty()).await;
        a.connect(&b).await.unwrap();
        assert_eq!(a.transport.links().len(), 1);
        a.call(&b, Call::ShowGrant(Bytes::new())).await.unwrap();
    }
}

macro_rules! conformance {
    ($($case:ident)*) => {
        mod memory {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case(super::World::new(Some(super::Network::new()))).await;
                }
            )*
        }
        mod wire {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case(super::World::new(None)).await;
                }
            )*
        }
    };
}

conformance! {
    requests pipelining cancellation refusals small_calls link_loss slow_reader big_run
    faults_overtake blocked other_cluster reconnecting
}
