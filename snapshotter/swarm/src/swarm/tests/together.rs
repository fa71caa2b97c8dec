//! Nodes together: bursts, a node that comes later, wrong words.

use std::sync::atomic::Ordering;

use futures::StreamExt;
use skimmer_cache::Class;
use skimmer_cache::source::memory::Memory;
use skimmer_identity::Role;
use skimmer_proto::control;
use skimmer_proto::control::node_message::Message as FromNode;
use skimmer_proto::{Geometry, PieceSet};

use super::super::*;
use super::bench::{Bench, CLAIMED, MIB, pulled, table};
use super::led::lead;

const QUICK: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_under_a_scheduler_takes_each_byte_from_the_origin_once() {
    let bench = Bench::with_nodes(5).await;
    let _led = lead(&bench).await;
    let (blob, content) = bench.blob(20 * MIB + 5, 1);
    bench.burst(&blob, &content).await;
    assert_eq!(bench.served(), content.len() as u64);
    for node in &bench.nodes {
        let blob = node.cache.blob(blob.clone()).unwrap();
        let [_, peers] = blob.fetched_via();
        assert!(peers > 0, "something came from peers");
        blob.prove(table(&content)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_later_needs_no_origin() {
    let mut bench = Bench::with_nodes(1).await;
    let (blob, content) = bench.blob(5 * MIB, 2);
    bench.one_has(&blob, &content).await;
    bench.origin.down.store(true, Ordering::Relaxed);
    bench.add(Role::Peer).await;
    let led = lead(&bench).await;
    bench.burst(&blob, &content).await;
    // A reader's fault, verified against a table that it trusts; and with the scheduler gone.
    for alone in [false, true] {
        let node = bench.add(Role::Peer).await;
        let lazy = node.cache.blob(blob.clone()).unwrap();
        if !alone {
            led.join(node).await;
        }
        bench.link().await;
        lazy.set_table(Arc::new(table(&content))).unwrap();
        let fault = lazy.ensure(MIB as u64..2 * MIB as u64, Class::Fault);
        bench.within(fault).await.unwrap();
        let mut read = vec![0; MIB];
        lazy.read_at(&mut read, MIB as u64).unwrap();
        assert!(read == content[MIB..2 * MIB]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_delivered_but_not_stored_is_delivered_again() {
    let mut bench = Bench::with_nodes(1).await;
    let (blob, content) = bench.blob(MIB, 6);
    bench.one_has(&blob, &content).await;
    bench.add(Role::Peer).await;
    let _led = lead(&bench).await;
    let swarm = &bench.nodes[1].swarm;
    let geometry = Geometry::of(blob.len).unwrap();
    let all = PieceSet::all(geometry.pieces());
    // As where the disk is full: the order ends, and what it was for is wanted again.
    for _ in 0..2 {
        let (_urgent, urgent) = mpsc::unbounded_channel();
        let (blob, pieces, class) = (blob.clone(), all.clone(), Class::Background);
        let order = Order { blob, geometry, pieces, class, table: None, urgent };
        let pieces = swarm.fetch(order).await.unwrap();
        let delivered = pieces.map(|delivery| delivery.unwrap().piece).collect::<Vec<u32>>();
        let delivered = tokio::time::timeout(QUICK, delivered).await;
        let delivered = delivered.expect("within less than the planner's patience");
        assert_eq!(delivered.into_iter().collect::<PieceSet>(), all);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_is_served_after_it_was_closed_and_after_a_restart() {
    let mut bench = Bench::new();
    let dir = tempfile::tempdir().unwrap();
    let first = bench.open(Role::Peer, Arc::clone(&bench.origin), dir.path().to_owned()).await;
    bench.nodes.push(first);
    let (blob, content) = bench.blob(3 * MIB, 7);
    bench.one_has(&blob, &content).await;
    bench.origin.down.store(true, Ordering::Relaxed);
    // No layer has its table: the cache knows it only while it has the blob open.
    let cache = bench.nodes[0].cache.clone();
    bench.until(|| cache.held(blob.digest).unwrap().unwrap().table.is_none()).await;
    bench.add(Role::Peer).await;
    bench.link().await;
    bench.all_right(vec![bench.nodes[1].pull(&blob)], &content).await;
    cache.drain().await.unwrap();
    let closed = cache.downgrade();
    drop(cache);
    bench.nodes.clear();
    bench.until(|| closed.upgrade().is_none()).await;
    let again = bench.open(Role::Peer, Arc::clone(&bench.origin), dir.path().to_owned()).await;
    bench.nodes.push(again);
    let led = lead(&bench).await;
    led.join(bench.add(Role::Peer).await).await;
    bench.all_right(vec![bench.nodes[1].pull(&blob)], &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_scheduler_nodes_share_the_stripes() {
    let bench = Bench::with_nodes(3).await;
    bench.link().await;
    let (blob, content) = bench.blob(16 * MIB, 3);
    bench.burst(&blob, &content).await;
    assert_eq!(bench.served(), content.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduler_that_goes_in_the_middle_is_not_missed() {
    let bench = Bench::with_nodes(3).await;
    bench.link().await;
    let led = lead(&bench).await;
    let (blob, content) = bench.blob(64 * MIB, 4);
    let burst = bench.burst(&blob, &content);
    let end = async {
        while bench.served() < 8 << 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(led);
    };
    futures::join!(burst, end);
    let most = content.len() as u64 * 5 / 4;
    assert!(bench.served() <= most, "{} of {}", bench.served(), content.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_vouches_for_wrong_bytes_is_found_out_and_the_blob_comes_right() {
    assert_eq!(told_of_wrong_bytes(None).await, Some(control::Fault::Corrupt));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_given_another_file_by_its_origin_is_no_liar() {
    assert_eq!(told_of_wrong_bytes(Some(CLAIMED)).await, Some(control::Fault::Absent));
}

/// What the scheduler is told of a node that vouched for wrong bytes of a blob in `repository`.
async fn told_of_wrong_bytes(repository: Option<&str>) -> Option<control::Fault> {
    let mut bench = Bench::with_nodes(1).await;
    let (liar, dir) = (Arc::new(Memory::default()), tempfile::tempdir().unwrap());
    let node = bench.open(Role::Peer, Arc::clone(&liar), dir.path().to_owned()).await;
    bench.nodes.push(node);
    let (mut blob, content) = bench.blob(MIB, 5);
    for origin in &mut blob.origins {
        repository.into_iter().for_each(|name| name.clone_into(&mut origin.repository));
    }
    liar.put(blob.digest, content.clone());
    liar.lies.store(true, Ordering::Relaxed);
    bench.link().await;
    // The liar has everything, and vouches for it.
    let wrong = pulled(&bench.nodes[1].cache, &blob).await;
    assert!(wrong != content);
    bench.origin.down.store(true, Ordering::Relaxed);
    let victim = &bench.nodes[0];
    let got = pulled(&victim.cache, &blob).await;
    assert!(got == wrong, "signed, so it is taken, unread until the whole matches");
    let held = victim.cache.blob(blob.clone()).unwrap();
    held.distrust().await.unwrap();
    bench.origin.down.store(false, Ordering::Relaxed);
    assert!(!victim.swarm.takes(&blob), "the origin alone is asked now");
    assert!(pulled(&victim.cache, &blob).await == content);
    let (outbox, mut told) = mpsc::channel(100);
    victim.swarm.inner.attach(&outbox);
    held.prove(table(&content)).unwrap();
    let accused = bench.nodes[1].member.peer().to_bytes().to_vec();
    while let Ok(message) = told.try_recv() {
        if let Some(FromNode::Failed(failed)) = message.message
            && failed.parent == accused
        {
            return Some(failed.fault());
        }
    }
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_believed_from_a_seed_or_two_nodes() {
    let bench = {
        let mut bench = Bench::with_nodes(3).await;
        bench.add(Role::Seed).await;
        bench
    };
    let (blob, content) = bench.blob(MIB, 6);
    let table = table(&content);
    let digest = Digest::of(&table.encode());
    let record = |n: usize| {
        let credentials = &bench.nodes[n].member.credentials;
        let certificate = credentials.certificate();
        skimmer_identity::statement::sign_index(
            credentials.key(),
            &certificate,
            &blob.digest,
            &digest,
        )
    };
    let inner = &bench.nodes[0].swarm.inner;
    for (signers, expected) in [
        (vec![], false),
        (vec![1], false),
        (vec![1, 1], false),
        (vec![1, 2], true),
        (vec![3], true),
    ] {
        let records: Vec<_> = signers.iter().map(|n| record(*n)).collect();
        let believed = inner.believable(&blob, &records).map(|(table, _)| table);
        assert_eq!(believed, expected.then_some(digest), "{signers:?}");
    }
    let mut forged = record(3);
    forged.table = vec![0; 32];
    assert_eq!(inner.believable(&blob, &[forged]), None);
}
