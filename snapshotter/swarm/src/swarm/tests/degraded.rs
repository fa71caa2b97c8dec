//! What goes wrong in a swarm, and doesn't stop it: each way for a node with a scheduler and without.

use std::sync::atomic::Ordering;

use skimmer_cache::Class;
use skimmer_identity::{PeerId, Role};

use super::super::*;
use super::bench::{Bench, MIB, Manner, table};
use super::led::{Led, lead};

const ROGUES: [Manner; 5] =
    [Manner::Stalls, Manner::Garbles, Manner::Closes, Manner::Boasts, Manner::Dawdles];

/// Nodes that all know of each other; with a scheduler if `led`.
async fn gathered(bench: &Bench, led: bool) -> Option<Led> {
    bench.link().await;
    if led { Some(lead(bench).await) } else { None }
}

/// A node wants what one honest and one other node have.
async fn beside(manner: Manner, led: bool) {
    let bench = Bench::hasty(3).await;
    let (blob, content) = bench.blob(12 * MIB, 1);
    for node in &bench.nodes[..2] {
        bench.all_right(vec![node.pull(&blob)], &content).await;
        node.cache.blob(blob.clone()).unwrap().prove(table(&content)).unwrap();
    }
    bench.origin.down.store(true, Ordering::Relaxed);
    bench.nodes[1].behave(manner);
    let _led = gathered(&bench, led).await;
    bench.all_right(vec![bench.nodes[2].pull(&blob)], &content).await;
}

/// A node wants what nobody has but a node that is of no use, and the origin.
async fn before_the_origin(manner: Manner, led: bool) {
    let bench = Bench::hasty(2).await;
    let (blob, content) = bench.blob(4 * MIB, 2);
    if manner != Manner::Boasts {
        bench.one_has(&blob, &content).await;
    }
    bench.nodes[0].behave(manner);
    let led = gathered(&bench, led).await;
    if let Some(led) = led.as_ref().filter(|_| manner == Manner::Boasts) {
        led.boast(&bench.nodes[0], &blob);
    }
    bench.all_right(vec![bench.nodes[1].pull(&blob)], &content).await;
    // And a reader's fault.
    let lazy = bench.blob(4 * MIB, 3);
    if manner != Manner::Boasts {
        bench.nodes[0].behave(Manner::Honest);
        bench.one_has(&lazy.0, &lazy.1).await;
        bench.nodes[0].behave(manner);
    }
    let blob = bench.nodes[1].cache.blob(lazy.0).unwrap();
    blob.set_table(Arc::new(table(&lazy.1))).unwrap();
    bench.within(blob.ensure(MIB as u64..3 * MIB as u64, Class::Fault)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_misbehaves_beside_an_honest_one() {
    let all = ROGUES.iter().flat_map(|manner| [true, false].map(|led| beside(*manner, led)));
    futures::future::join_all(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_misbehaves_and_is_the_only_one() {
    let all =
        ROGUES.iter().flat_map(|manner| [true, false].map(|led| before_the_origin(*manner, led)));
    futures::future::join_all(all).await;
}

/// A pull by all nodes; when the origin has served `after` bytes, some of them are gone.
async fn killed(mut bench: Bench, led: bool, gone: usize) {
    let (blob, content) = bench.blob(48 * MIB, 4);
    let led = gathered(&bench, led).await;
    let mut pulls: Vec<_> = bench.nodes.iter().map(|node| node.pull(&blob)).collect();
    bench.until(|| bench.served() > 6 << 20).await;
    for _ in 0..gone {
        let peer = bench.nodes[0].peer();
        pulls.remove(0).abort();
        bench.kill(0);
        if let Some(led) = &led {
            led.lose(&peer);
        }
    }
    bench.all_right(pulls, &content).await;
    assert!(bench.served() <= at_most(led.is_some(), &content), "{}", bench.served());
}

/// What the origin may serve of a blob: leases are lost with their holders, and a busy machine makes
/// peers look as if they stalled. Without a scheduler nodes agree less often.
fn at_most(led: bool, content: &[u8]) -> u64 {
    content.len() as u64 * if led { 2 } else { 3 }
}

#[tokio::test(flavor = "multi_thread")]
async fn half_of_the_nodes_are_killed() {
    for led in [true, false] {
        killed(Bench::hasty(6).await, led, 3).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_peer_is_killed() {
    for led in [true, false] {
        let mut bench = Bench::hasty(0).await;
        bench.add(Role::Seed).await;
        for _ in 0..3 {
            bench.add(Role::Peer).await;
        }
        killed(bench, led, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_leaves_two_swarms_that_finish() {
    for led in [true, false] {
        let bench = Bench::hasty(6).await;
        let (blob, content) = bench.blob(32 * MIB, 5);
        let _led = gathered(&bench, led).await;
        let pulls = bench.nodes.iter().map(|node| node.pull(&blob)).collect();
        bench.until(|| bench.served() > 4 << 20).await;
        let peers: Vec<PeerId> = bench.nodes.iter().map(super::bench::Node::peer).collect();
        bench.network.part(&peers[..3], &peers[3..]);
        bench.all_right(pulls, &content).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_join_in_the_middle() {
    for led in [true, false] {
        let mut bench = Bench::hasty(2).await;
        let (blob, content) = bench.blob(48 * MIB, 6);
        let led = gathered(&bench, led).await;
        let mut pulls: Vec<_> = bench.nodes.iter().map(|node| node.pull(&blob)).collect();
        for n in 1..4 {
            bench.until(|| bench.served() > n * (6 << 20)).await;
            let node = bench.add(Role::Peer).await;
            if let Some(led) = &led {
                led.join(node).await;
            }
            bench.link().await;
            pulls.push(bench.nodes.last().unwrap().pull(&blob));
        }
        bench.all_right(pulls, &content).await;
        assert!(bench.served() <= at_most(led.is_some(), &content), "{}", bench.served());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn links_that_break_are_made_again() {
    for led in [true, false] {
        let bench = Bench::hasty(2).await;
        let (blob, content) = bench.blob(12 * MIB, 7);
        bench.one_has(&blob, &content).await;
        bench.origin.down.store(true, Ordering::Relaxed);
        let _led = gathered(&bench, led).await;
        let [one, other] = [bench.nodes[0].peer(), bench.nodes[1].peer()];
        bench.network.cut(&one, &other);
        bench.all_right(vec![bench.nodes[1].pull(&blob)], &content).await;
    }
}
#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_hangs_is_done_without() {
    for led in [true, false] {
        let mut bench = Bench::hasty(2).await;
        let (blob, content) = bench.blob(8 * MIB, 8);
        let led = gathered(&bench, led).await;
        bench.origin.hangs.store(true, Ordering::Relaxed);
        let waiting = bench.nodes[1].pull(&blob);
        bench.until(|| bench.served() > 0).await;
        // A third node has it all, and comes only now.
        let dir = tempfile::tempdir().unwrap();
        let good = Arc::new(skimmer_cache::source::memory::Memory::default());
        good.put(blob.digest, content.clone());
        let node = bench.open(Role::Peer, good, dir.path().to_owned()).await;
        bench.nodes.push(node);
        let holder = &bench.nodes[2];
        bench.all_right(vec![holder.pull(&blob)], &content).await;
        holder.cache.blob(blob.clone()).unwrap().prove(table(&content)).unwrap();
        if let Some(led) = &led {
            led.join(holder).await;
        }
        bench.link().await;
        bench.all_right(vec![waiting], &content).await;
        drop(dir);
    }
}
