//! What every store has to do: run against each implementation.

use std::collections::BTreeSet;

use crate::model::{
    Authority, Cluster, Enrolment, Event, Joined, Node, Refusal, Role, Scheduler, Token,
};
use crate::store::Store;

/// Runs every check on a fresh store; the second value is kept as long as the store.
pub async fn check<S: Store, K>(make: impl AsyncFn() -> (S, K)) {
    let (store, _kept) = make().await;
    root(&store).await;
    let (store, _kept) = make().await;
    clusters(&store).await;
    let (store, _kept) = make().await;
    enrolling(&store).await;
    let (store, _kept) = make().await;
    enrolling_again(&store).await;
    let (store, _kept) = make().await;
    nodes(&store).await;
    let (store, _kept) = make().await;
    events(&store).await;
    let (store, _kept) = make().await;
    schedulers(&store).await;
    let (store, _kept) = make().await;
    last_use_has_one_winner(store).await;
}

pub fn authority(n: u8) -> Authority {
    Authority { certificate: vec![n; 40], private_key: vec![0, n, 0xff] }
}

fn cluster(name: &str) -> Cluster {
    Cluster {
        id: format!("id-{name}"),
        name: name.to_owned(),
        authority: authority(9),
        repositories: Vec::new(),
        created: 5,
    }
}

fn token(n: u8, cluster: &str, uses_left: Option<u32>) -> Token {
    let cluster = format!("id-{cluster}");
    Token { hash: [n; 32], cluster, role: Role::Peer, expires: 100, uses_left }
}

fn asking(peer: &str) -> Enrolment {
    Enrolment { peer: peer.into(), name: format!("host-{peer}"), zone: "a".into(), expires: 60 }
}

fn joined(outcome: Joined) -> Node {
    match outcome {
        Joined::In(node) => node,
        Joined::Refused(refusal) => panic!("{refusal:?}"),
    }
}

async fn enrol(store: &impl Store, token: u8, peer: &str, now: i64) -> Joined {
    store.enrol(&[token; 32], &asking(peer), now).await.unwrap()
}

async fn root(store: &impl Store) {
    assert_eq!(store.root(authority(1)).await.unwrap(), authority(1));
    assert_eq!(store.root(authority(2)).await.unwrap(), authority(1), "the first stays");
}

async fn clusters(store: &impl Store) {
    assert_eq!(store.clusters().await.unwrap(), []);
    let mut b = cluster("b");
    b.repositories = vec!["docker.io/library/*".into(), "r.example:5000/a".into()];
    assert!(store.add_cluster(&b).await.unwrap());
    assert!(store.add_cluster(&cluster("a")).await.unwrap());
    let same_name = Cluster { id: "other".into(), ..cluster("a") };
    assert!(!store.add_cluster(&same_name).await.unwrap());
    let same_id = Cluster { name: "other".into(), ..cluster("a") };
    assert!(!store.add_cluster(&same_id).await.unwrap());
    assert_eq!(store.clusters().await.unwrap(), [cluster("a"), b.clone()]);

    assert!(store.set_repositories("id-a", &b.repositories).await.unwrap());
    assert!(store.set_repositories("id-b", &[]).await.unwrap());
    assert!(!store.set_repositories("a", &[]).await.unwrap(), "by id, not by name");
    let repositories: Vec<_> =
        store.clusters().await.unwrap().into_iter().map(|c| c.repositories).collect();
    assert_eq!(repositories, [b.repositories, vec![]]);
}

async fn enrolling(store: &impl Store) {
    store.add_cluster(&cluster("a")).await.unwrap();
    store.add_token(&token(1, "a", Some(2))).await.unwrap();
    store.add_token(&Token { role: Role::Seed, ..token(2, "a", None) }).await.unwrap();

    let node = joined(enrol(store, 1, "p", 7).await);
    let expected = Node {
        peer: "p".into(),
        cluster: "id-a".into(),
        name: "host-p".into(),
        zone: "a".into(),
        role: Role::Peer,
        token: [1; 32],
        enrolled: 7,
        expires: 60,
        revoked: None,
    };
    assert_eq!(node, expected);
    assert_eq!(store.node("p").await.unwrap(), Some(expected));

    joined(enrol(store, 1, "q", 99).await);
    for (token, now, refusal) in [
        (1, 99, Refusal::UsedToken),
        (1, 100, Refusal::ExpiredToken),
        (2, 100, Refusal::ExpiredToken),
        (3, 0, Refusal::UnknownToken),
    ] {
        assert_eq!(enrol(store, token, "r", now).await, Joined::Refused(refusal));
        assert_eq!(store.node("r").await.unwrap(), None, "nothing is left of a refusal");
    }
    for peer in ["s", "t", "u"] {
        assert_eq!(joined(enrol(store, 2, peer, 1).await).role, Role::Seed);
    }
    assert_eq!(store.drop_tokens(100).await.unwrap(), 0);
    assert_eq!(store.drop_tokens(101).await.unwrap(), 2);
    assert_eq!(enrol(store, 2, "v", 1).await, Joined::Refused(Refusal::UnknownToken));
}

async fn enrolling_again(store: &impl Store) {
    store.add_cluster(&cluster("a")).await.unwrap();
    store.add_cluster(&cluster("b")).await.unwrap();
    for (n, name) in [(1, "a"), (2, "a"), (3, "b")] {
        store.add_token(&token(n, name, Some(1))).await.unwrap();
    }
    joined(enrol(store, 1, "p", 1).await);
    joined(enrol(store, 1, "p", 2).await);
    assert_eq!(enrol(store, 1, "q", 3).await, Joined::Refused(Refusal::UsedToken));
    assert_eq!(joined(enrol(store, 2, "p", 4).await).token, [2; 32], "a fresh token counts");
    let elsewhere = Refusal::OtherCluster("id-a".into());
    assert_eq!(enrol(store, 3, "p", 5).await, Joined::Refused(elsewhere));
    store.revoke("p", "lied").await.unwrap();
    let out = Refusal::Revoked("lied".into());
    assert_eq!(enrol(store, 2, "p", 6).await, Joined::Refused(out));
    joined(enrol(store, 3, "q", 7).await);
}

async fn nodes(store: &impl Store) {
    store.add_cluster(&cluster("a")).await.unwrap();
    store.add_cluster(&cluster("b")).await.unwrap();
    store.add_token(&token(1, "a", None)).await.unwrap();
    store.add_token(&token(2, "b", None)).await.unwrap();
    for (token, peer) in [(2, "z"), (1, "y"), (1, "x")] {
        joined(enrol(store, token, peer, 1).await);
    }
    let names = async |cluster: Option<&str>| {
        let nodes = store.nodes(cluster).await.unwrap();
        nodes.into_iter().map(|node| node.peer).collect::<Vec<_>>().concat()
    };
    assert_eq!(names(None).await, "xyz");
    assert_eq!(names(Some("id-a")).await, "xy");
    assert_eq!(names(Some("id-c")).await, "");

    assert_eq!(store.renew("x", 200).await.unwrap().unwrap().expires, 200);
    assert_eq!(store.renew("nobody", 200).await.unwrap(), None);
    let revoked = store.revoke("x", "stolen").await.unwrap().unwrap();
    assert_eq!(revoked.revoked.as_deref(), Some("stolen"));
    assert_eq!(store.revoke("x", "again").await.unwrap(), None);
    assert_eq!(store.revoke("nobody", "").await.unwrap(), None);
    assert_eq!(store.renew("x", 300).await.unwrap(), None, "revoked nodes aren't renewed");
    assert_eq!(store.node("x").await.unwrap(), Some(revoked.clone()));
    assert_eq!(store.revoked(199).await.unwrap(), [revoked]);
    assert_eq!(store.revoked(200).await.unwrap(), [], "its certificate has ended");
}

async fn events(store: &impl Store) {
    let event = |at: i64, cluster: &str| Event { at, cluster: cluster.into(), what: "w".into() };
    for (at, cluster) in [(3, "a"), (1, ""), (2, "b"), (4, "a")] {
        store.add_event(&event(at, cluster)).await.unwrap();
    }
    let times = async |cluster: Option<&str>, limit| {
        let found = store.events(cluster, limit).await.unwrap();
        found.into_iter().map(|event| event.at).collect::<Vec<_>>()
    };
    assert_eq!(times(None, 10).await, [3, 1, 2, 4], "in the order of writing");
    assert_eq!(times(None, 2).await, [2, 4]);
    assert_eq!(times(Some("a"), 10).await, [3, 4]);
    assert_eq!(times(Some("a"), 1).await, [4]);
}

async fn schedulers(store: &impl Store) {
    let scheduler = |id: &str| Scheduler { id: id.into(), address: format!("{id}.example:8002") };
    let live = async |since| store.schedulers(since).await.unwrap();
    assert_eq!(live(0).await, []);
    let (a, b) = (scheduler("a"), scheduler("b"));
    assert_eq!(store.beat(&b, 1_000, 0).await.unwrap(), std::slice::from_ref(&b));
    assert_eq!(store.beat(&a, 2_000, 0).await.unwrap(), [a.clone(), b.clone()]);
    assert_eq!(live(1_000).await, [a.clone(), b.clone()]);
    assert_eq!(live(1_001).await, std::slice::from_ref(&a));
    let moved = Scheduler { address: "elsewhere:1".into(), ..a };
    assert_eq!(store.beat(&moved, 3_000, 1_500).await.unwrap(), std::slice::from_ref(&moved));
    assert_eq!(live(0).await, std::slice::from_ref(&moved), "who was silent is forgotten");
    let restarted = Scheduler { id: "c".into(), ..moved };
    assert_eq!(store.beat(&restarted, 3_001, 0).await.unwrap(), std::slice::from_ref(&restarted));
    store.retire("c").await.unwrap();
    store.retire("nobody").await.unwrap();
    assert_eq!(live(0).await, []);
}

async fn last_use_has_one_winner(store: impl Store) {
    store.add_cluster(&cluster("a")).await.unwrap();
    store.add_token(&token(1, "a", Some(3))).await.unwrap();
    let store = std::sync::Arc::new(store);
    let mut jobs = tokio::task::JoinSet::new();
    for n in 0..12 {
        let store = std::sync::Arc::clone(&store);
        jobs.spawn(async move {
            let outcome = store.enrol(&[1; 32], &asking(&format!("p{n}")), 1).await.unwrap();
            matches!(outcome, Joined::In(_)).then_some(n)
        });
    }
    let outcomes = jobs.join_all().await;
    let winners: BTreeSet<_> = outcomes.into_iter().flatten().collect();
    assert_eq!(winners.len(), 3, "{winners:?}");
    assert_eq!(store.nodes(None).await.unwrap().len(), 3);
}
