//! Certificates end: what was signed with one is signed anew by whoever signed it, and passed on by
//! nobody else.

use skimmer_cache::Class;
use skimmer_identity::{Membership, SignedValue};
use skimmer_proto::control::node_message::Message as FromNode;
use skimmer_proto::{PieceSet, Scope};

use super::super::*;
use super::bench::{Bench, MIB, Node, table};
use crate::transport::{Held, Request};

/// A node's certificate, with another end.
fn certificate(bench: &Bench, node: &Node, not_after: i64) -> Vec<u8> {
    let membership = node.member.credentials.membership();
    let membership = Membership { not_before: not_after - 3600, not_after, ..membership };
    bench.authority.issue(&membership).unwrap()
}

/// What `node` answers `child` who asks for the first piece of a blob.
async fn found(node: &Node, child: &Node, blob: &BlobRef) -> Held {
    let (scope, class) = (Scope::Public, Class::PullThrough);
    let pieces = PieceSet::all(1).runs().collect();
    let request = Request { scope, blob: blob.digest, len: blob.len, pieces, class };
    let child = child.member.credentials.membership();
    let reader = serve::Server::of(node.inner()).open(&child, &request).await;
    let Ok(mut reader) = reader else { panic!("refused") };
    reader.find(0).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_has_run_out_is_signed_anew_by_its_signer_and_passed_on_by_nobody() {
    let bench = Bench::with_nodes(2).await;
    let [node, other] = &bench.nodes[..] else { panic!("two nodes") };
    let (blob, content) = bench.blob(MIB, 1);
    let _open = node.cache.blob(blob.clone()).unwrap();
    bench.all_right(vec![node.pull(&blob)], &content).await;
    let task = TaskId::of(&Scope::Public, &blob.digest);
    bench.until(|| node.inner().state().tasks.contains_key(&task)).await;
    let Held::Here(Some(signed)) = found(node, other, &blob).await else { panic!("not here") };
    let now = unix_now();
    for (signer, not_after, expected) in
        [(node, now - 60, Some(node)), (other, now + 60, Some(other)), (other, now - 60, None)]
    {
        let key = signer.member.credentials.key();
        let certificate = certificate(&bench, signer, not_after).into();
        let value = SignedValue::sign(key, certificate, task, 0, signed.value);
        node.inner().state().tasks.get_mut(&task).unwrap().vouch(value);
        let word = match found(node, other, &blob).await {
            Held::Here(word) => word,
            Held::Absent => None,
        };
        let by = word.map(|word| word.check(&other.member.trust, unix_now()).unwrap().peer);
        assert_eq!(by, expected.map(Node::peer));
    }
}

/// The blob and the certificate of an index record.
fn record(message: NodeMessage) -> Option<(Vec<u8>, Vec<u8>)> {
    let Some(FromNode::Publish(publish)) = message.message else { return None };
    publish.record.map(|record| (record.blob, record.certificate))
}

/// The index records of which a new stream is told that has room for one message.
async fn announced(node: &Node) -> Vec<(Vec<u8>, Vec<u8>)> {
    let (outbox, mut messages) = mpsc::channel(1);
    tokio::spawn(attend::announce_all(Arc::clone(node.inner()), outbox));
    let mut records = Vec::new();
    while let Some(message) = messages.recv().await {
        records.extend(record(message));
    }
    records.sort();
    records
}

#[tokio::test(flavor = "multi_thread")]
async fn index_records_bear_the_certificate_of_the_day_until_the_blob_is_gone() {
    let bench = Bench::with_nodes(1).await;
    let node = &bench.nodes[0];
    let credentials = &node.member.credentials;
    let blobs: Vec<(BlobRef, Vec<u8>)> = (0..20).map(|n| bench.blob(1000, n)).collect();
    for (blob, content) in &blobs {
        node.swarm.publish_index(blob, &table(content)).await;
    }
    let signed_now = |blobs: &[(BlobRef, Vec<u8>)]| {
        let certificate = credentials.certificate();
        let blobs = blobs.iter().map(|(blob, _)| blob.digest.as_bytes().to_vec());
        let mut records: Vec<_> = blobs.map(|blob| (blob, certificate.to_vec())).collect();
        records.sort();
        records
    };
    assert_eq!(announced(node).await, signed_now(&blobs));
    credentials.set_certificate(&certificate(&bench, node, unix_now() + 7200)).unwrap();
    assert_eq!(announced(node).await, signed_now(&blobs));
    node.inner().forgotten(blobs[0].0.digest);
    assert_eq!(announced(node).await, signed_now(&blobs[1..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_has_the_node_say_again_what_it_vouches_for() {
    let bench = Bench::with_nodes(1).await;
    let node = &bench.nodes[0];
    let credentials = &node.member.credentials;
    let (blob, content) = bench.blob(1000, 1);
    let (outbox, mut told) = mpsc::channel(100);
    node.inner().attach(&outbox);
    node.swarm.publish_index(&blob, &table(&content)).await;
    for hours in 2..4 {
        let said = async {
            loop {
                if let Some(record) = told.recv().await.and_then(record) {
                    return record;
                }
            }
        };
        let expected = (blob.digest.as_bytes().to_vec(), credentials.certificate().to_vec());
        assert_eq!(bench.within(said).await, expected);
        let renewed = certificate(&bench, node, unix_now() + hours * 3600);
        credentials.set_certificate(&renewed).unwrap();
        node.members.send_replace(Some(node.member.clone()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_enrols_anew_in_its_cluster_keeps_its_transport() {
    let bench = Bench::with_nodes(1).await;
    let node = &bench.nodes[0];
    let joined = || node.inner().joined().unwrap();
    let before = joined();
    node.members.send_replace(None);
    let anew = Member { authority: [1; 32], ..node.member.clone() };
    node.members.send_replace(Some(anew));
    bench.until(|| joined().member.authority == [1; 32]).await;
    assert!(Arc::ptr_eq(&joined().transport, &before.transport));
}
