//! A hostile serving end: whatever it sends, the asking end neither panics nor takes what it didn't ask for.

use bytes::Bytes;
use futures::StreamExt as _;
use proptest::prelude::{any, prop_assert, proptest};
use skimmer_cache::Class;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::compat::TokioAsyncReadCompatExt as _;

use super::super::conformance::{blob, whole};
use super::*;

const LEN: usize = 600_000;

/// Asks for the three pieces of a blob, has the other end answer with `bytes`, and says how the stream ended.
async fn answered_with(bytes: Vec<u8>) -> (Vec<Result<Arrival, Error>>, String) {
    let (mine, mut theirs) = tokio::io::duplex(64 << 10);
    let peer = PeerId::from_public_key([1; 32]);
    let (asker, run) = Asker::start(peer, mine.compat(), Role::Bulk, Default::default());
    let run = tokio::spawn(run);
    let incoming = asker.pieces(whole(&blob(LEN), Class::Fault)).unwrap();
    let hello = Asked::Hello(Role::Bulk).encode();
    let mut said = vec![0; hello.len()];
    theirs.read_exact(&mut said).await.unwrap();
    assert_eq!(said, hello);
    // It may have hung up before the end.
    let _ = theirs.write_all(&bytes).await;
    drop(theirs);
    let reason = run.await.unwrap().to_string();
    (incoming.collect().await, reason)
}

fn piece(id: u32, piece: u32, signed: u32, rest: &[u8]) -> Vec<u8> {
    let payload = [&piece.to_le_bytes(), &signed.to_le_bytes(), rest].concat();
    frame::frame(What::Piece, id, &payload)
}

#[tokio::test]
async fn only_what_was_asked_for_is_taken() {
    let (full, last) = (vec![7; 256 << 10], vec![7; LEN - (512 << 10)]);
    let good = [piece(0, 2, 0, &last), piece(0, 0, 0, &full)].concat();
    let then = |next: Vec<u8>| [good.clone(), next].concat();
    let unasked = Broken::Unasked.to_string();
    for (what, bytes, taken, reason) in [
        ("good", good.clone(), 2, None),
        ("absent", then(frame::frame(What::Absent, 0, &1_u32.to_le_bytes())), 3, None),
        ("a cancelled request's", then(piece(9, 1, 0, &full)), 2, None),
        ("twice", then(piece(0, 0, 0, &full)), 2, Some(&unasked)),
        (
            "absent and then here",
            then(frame::frame(What::Absent, 0, &2_u32.to_le_bytes())),
            2,
            Some(&unasked),
        ),
        ("too short", then(piece(0, 1, 0, &last)), 2, Some(&unasked)),
        ("not of the blob", then(piece(0, 3, 0, &full)), 2, Some(&unasked)),
        ("statement longer than the frame", then(piece(0, 1, u32::MAX, &full)), 2, Some(&unasked)),
        (
            "statement too short",
            then(piece(0, 1, 5, &[&[0; 5], &full[..]].concat())),
            2,
            Some(&unasked),
        ),
        ("a part", then(frame::frame(What::Part, 0, b"part")), 2, Some(&unasked)),
        ("an end", then(frame::frame(What::End, 0, b"")), 2, Some(&unasked)),
        (
            "a request",
            then(Asked::Cancel { id: 0 }.encode()),
            2,
            Some(&frame::Error::Direction.to_string()),
        ),
    ] {
        let (arrivals, ended) = answered_with(bytes).await;
        assert_eq!(arrivals.iter().filter(|arrival| arrival.is_ok()).count(), taken, "{what}");
        // What is missing fails with the stream.
        let missing = arrivals.last().is_some_and(Result::is_err);
        assert_eq!(missing, taken < 3, "{what}: {arrivals:?}");
        if let Some(reason) = reason {
            assert!(ended.contains(reason.as_str()), "{what}: {ended}");
        }
    }
}

#[tokio::test]
async fn a_reply_is_bounded_by_its_call() {
    let (mine, mut theirs) = tokio::io::duplex(64 << 10);
    let peer = PeerId::from_public_key([1; 32]);
    let (asker, run) = Asker::start(peer, mine.compat(), Role::Bulk, Default::default());
    let run = tokio::spawn(run);
    let calling = tokio::spawn(async move { asker.call(Call::ShowGrant(Bytes::new())).await });
    let mut said = vec![0; 2 * HEADER + 8 + 1];
    theirs.read_exact(&mut said).await.unwrap();
    theirs.write_all(&frame::frame(What::Part, 0, b"more than nothing")).await.unwrap();
    assert!(run.await.unwrap().contains(&Broken::Unasked.to_string()));
    assert!(matches!(calling.await.unwrap(), Err(Error::Gone { .. })));
}

#[tokio::test]
async fn requests_under_way_are_bounded() {
    let (mine, _theirs) = tokio::io::duplex(64 << 10);
    let peer = PeerId::from_public_key([1; 32]);
    let (asker, _run) = Asker::start(peer, mine.compat(), Role::Bulk, Default::default());
    let request = whole(&blob(LEN), Class::Fault);
    let mut under_way: Vec<_> =
        (0..MAX_FLIGHTS).map(|_| asker.pieces(request.clone()).unwrap()).collect();
    assert!(matches!(asker.pieces(request.clone()), Err(Error::Crowded { .. })));
    under_way.pop();
    asker.pieces(request).unwrap();
}

proptest! {
    #[test]
    fn arbitrary_bytes_end_the_stream(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 16..23u8) {
        let framed = [&[kind, 0, 0, 0, 0, 0, 0, 0], &u32::try_from(bytes.len()).unwrap().to_le_bytes()[..], &bytes].concat();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for bytes in [bytes, framed] {
            let (arrivals, _) = runtime.block_on(answered_with(bytes));
            let piece = arrivals.iter().any(|arrival| matches!(arrival, Ok(Arrival::Piece { .. })));
            prop_assert!(!piece);
        }
    }
}
