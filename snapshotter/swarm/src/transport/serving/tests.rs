//! A hostile asking end, and upload shaping at work.

use std::time::Instant;

use proptest::prelude::{any, prop_assert, proptest};
use skimmer_identity::{Key, Role as Rank};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio_util::compat::TokioAsyncReadCompatExt as _;

use super::super::Scope;
use super::super::conformance::{Shelf, blob, whole};
use super::*;

fn desk(shelf: Shelf, upload: Arc<Upload>) -> Desk {
    let from = Membership {
        peer: Key::generate().unwrap().peer(),
        cluster: "c".to_owned(),
        zone: String::new(),
        role: Rank::Peer,
        not_before: 0,
        not_after: 0,
    };
    Desk { serve: Arc::new(shelf), upload, from, counters: Arc::default() }
}

/// A stream that is being served, and how that ends.
fn served(desk: Desk) -> (DuplexStream, tokio::task::JoinHandle<Broken>) {
    let (mine, theirs) = tokio::io::duplex(64 << 10);
    (mine, tokio::spawn(serve(theirs.compat(), desk, |_| {})))
}

async fn ends_with(bytes: Vec<u8>) -> String {
    let (mut stream, ended) = served(desk(Shelf::default(), Upload::new(None)));
    // It may have hung up before the end.
    let _ = stream.write_all(&bytes).await;
    drop(stream);
    timeout(Duration::from_secs(20), ended).await.unwrap().unwrap().to_string()
}

#[tokio::test]
async fn senseless_streams_end() {
    let hello = Asked::Hello(Role::Bulk).encode();
    let ask = |id| Asked::Ask { id, request: whole(&blob(10), Class::Fault) }.encode();
    for (what, bytes, reason) in [
        ("no hello", ask(1), frame::Error::Hello.to_string()),
        ("two hellos", [hello.clone(), hello.clone()].concat(), frame::Error::Hello.to_string()),
        ("garbage", vec![0xff; 100], frame::Error::Kind(0xff).to_string()),
        (
            "a piece",
            [&hello[..], &[17, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0]].concat(),
            frame::Error::Direction.to_string(),
        ),
        (
            "a huge frame",
            [&hello[..], &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]].concat(),
            "bytes".to_owned(),
        ),
        (
            "an id twice",
            [hello.clone(), Asked::Credit { id: 1, bytes: 9 }.encode(), vec![9; 12]].concat(),
            frame::Error::Kind(9).to_string(),
        ),
    ] {
        let ended = ends_with(bytes).await;
        assert!(ended.contains(&reason), "{what}: {ended}");
    }
}

#[tokio::test]
async fn a_greedy_asker_is_cut_off() {
    let data = blob(30 << 20);
    let (mut stream, ended) = served(desk(Shelf::with(&Scope::Public, &data), Upload::new(None)));
    stream.write_all(&Asked::Hello(Role::Bulk).encode()).await.unwrap();
    for id in 0..2000 {
        let ask = Asked::Ask { id, request: whole(&data, Class::Background) }.encode();
        if stream.write_all(&ask).await.is_err() {
            break;
        }
    }
    let ended = timeout(Duration::from_secs(20), ended).await.unwrap().unwrap();
    assert!(matches!(ended, Broken::Greedy), "{ended}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upload_keeps_to_its_rate() {
    let data = blob(3 << 20);
    let upload = Upload::new(Some(4 << 20));
    let granting = tokio::spawn({
        let upload = Arc::clone(&upload);
        async move { upload.run().await }
    });
    let (mut stream, _ended) = served(desk(Shelf::with(&Scope::Public, &data), upload));
    stream.write_all(&Asked::Hello(Role::Bulk).encode()).await.unwrap();
    let ask = Asked::Ask { id: 0, request: whole(&data, Class::Background) }.encode();
    let start = Instant::now();
    stream.write_all(&ask).await.unwrap();
    let mut bytes = vec![0; data.len() + 12 * (HEADER + PIECE_PREFIX)];
    timeout(Duration::from_secs(20), stream.read_exact(&mut bytes)).await.unwrap().unwrap();
    // 3 MiB at 4 MiB/s, less the burst of 512 KiB and a slice.
    assert!(start.elapsed() > Duration::from_millis(500), "{:?}", start.elapsed());
    granting.abort();
}

proptest! {
    #[test]
    fn arbitrary_bytes_end_the_stream(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0..7u8) {
        let hello = Asked::Hello(Role::Faults).encode();
        let head = [kind, 0, 0, 0, 1, 0, 0, 0];
        let framed = [&hello[..], &head, &u32::try_from(bytes.len()).unwrap().to_le_bytes(), &bytes].concat();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for bytes in [[hello, bytes.clone()].concat(), bytes, framed] {
            prop_assert!(!runtime.block_on(ends_with(bytes)).is_empty());
        }
    }
}
