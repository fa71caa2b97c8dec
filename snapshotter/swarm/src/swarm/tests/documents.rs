//! Manifests and configurations between nodes: found by digest, under the same rights as blobs.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use skimmer_cache::Origin;
use skimmer_identity::Grant;
use skimmer_proto::Scope;

use super::super::*;
use super::bench::Bench;
use super::led::lead;
use crate::transport::{Call, Kind, Reason, Reply};

const MANIFEST: &[u8] = br#"{"schemaVersion":2}"#;

fn origin() -> Origin {
    Origin { host: "r".to_owned(), repository: "a".to_owned() }
}

fn sample(bench: &Bench) -> BlobRef {
    bench.blob(1000, 9).0
}

/// The document, asked for until it is there: the scheduler hears of it in its own time.
async fn found(bench: &Bench, node: usize, digest: Digest) -> Bytes {
    let swarm = &bench.nodes[node].swarm;
    bench
        .within(async {
            loop {
                if let Some(bytes) = swarm.find_document(&origin(), digest).await {
                    return bytes;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_one_node_read_is_had_from_it_by_digest() {
    let bench = Bench::with_nodes(2).await;
    let (digest, absent) = (Digest::of(MANIFEST), Digest::of(b"nobody has this"));
    let _led = lead(&bench).await;
    let documents = vec![(digest, Bytes::from_static(MANIFEST))];
    bench.nodes[0].swarm.keep_documents(&sample(&bench), documents).await;
    bench.origin.down.store(true, Ordering::Relaxed);
    assert_eq!(found(&bench, 1, digest).await, MANIFEST);
    assert_eq!(bench.nodes[1].swarm.find_document(&origin(), absent).await, None);
    let kept = bench.nodes[1].cache.documents().get(digest).unwrap().unwrap();
    assert_eq!(&kept.0[..], MANIFEST, "it is kept here too");
    assert!(kept.1.is_empty(), "but nobody else gets it before the origin was asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_stream_hears_of_the_documents_that_are_here() {
    let bench = Bench::with_nodes(2).await;
    let digest = Digest::of(MANIFEST);
    let documents = bench.nodes[0].cache.documents();
    documents.put(digest, MANIFEST, Some(&Scope::Public)).unwrap();
    let _led = lead(&bench).await;
    assert_eq!(found(&bench, 1, digest).await, MANIFEST);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_document_takes_a_grant_of_its_repository() {
    let bench = Bench::with_nodes(2).await;
    bench.link().await;
    let digest = Digest::of(MANIFEST);
    let scope = Scope::Repository("r/a".to_owned());
    let documents = bench.nodes[0].cache.documents();
    documents.put(digest, MANIFEST, Some(&scope)).unwrap();
    let (holder, reader) = (bench.nodes[0].member.peer(), &bench.nodes[1]);
    let transport = Arc::clone(&reader.swarm.inner.joined().unwrap().transport);
    let ask = async |scope: &Scope| {
        let (scope, kind) = (scope.clone(), Kind::Document);
        transport.call(&holder, Call::Get { scope, blob: digest, kind, object: digest }).await
    };
    let reason = |answer: Result<Reply, crate::transport::Error>| match answer {
        Err(crate::transport::Error::Refused { source, .. }) => source.reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(reason(ask(&scope).await), Reason::Rights);
    assert_eq!(reason(ask(&Scope::Public).await), Reason::Absent, "it isn't public");

    let expires_unix = unix_now() + 60;
    for (granted, expected) in [("r/b", false), ("r/a", true)] {
        let granted = Scope::Repository(granted.to_owned());
        let grant = Grant { peer: reader.member.peer(), scope: granted, expires_unix };
        let grant = grant.sign(&bench.authority).unwrap().into();
        transport.call(&holder, Call::ShowGrant(grant)).await.unwrap();
        let answer = ask(&scope).await;
        match expected {
            true => assert_eq!(answer.unwrap(), Reply::Object(Bytes::from_static(MANIFEST))),
            false => assert_eq!(reason(answer), Reason::Rights),
        }
    }
}
