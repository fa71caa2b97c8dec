//! The control plane: joining, renewing, leaving, rights, and the scheduler's streams.

use std::time::Duration;

use anyhow::Context as _;
use skimmer_identity::{Authority, Key, PeerId, Trust, authority, statement};
use skimmer_integration::command::wait_for;
use skimmer_integration::control::{Control, Setup, holds};
use skimmer_integration::member::{Member, Stream, channel};
use skimmer_integration::registry::{Auth, Registry};
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::speech::{announce, assigned, lease, task, want};
use skimmer_proto::control::node_message::Message as Said;
use skimmer_proto::control::scheduler_message::Message as Heard;
use skimmer_proto::control::{self, Publish};
use skimmer_proto::{Digest, PieceSet, Scope, TaskId};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

const MIB: u64 = 1 << 20;

/// Runs a scenario that speaks gRPC.
fn scenario_async(name: &str, body: impl AsyncFnOnce(&Scenario) -> anyhow::Result<()>) {
    scenario(name, |scenario| {
        let runtime = tokio::runtime::Runtime::new()?;
        runtime.block_on(body(scenario))
    });
}

/// The status with which a call failed.
fn refused<T>(outcome: anyhow::Result<T>) -> anyhow::Result<Status> {
    match outcome {
        Ok(_) => anyhow::bail!("succeeded, but should have been refused"),
        Err(error) => match error.downcast::<Status>() {
            Ok(status) => Ok(status),
            Err(error) => Err(error.context("was refused, but not by an answer")),
        },
    }
}

async fn join(control: &Control, cluster: &str, role: &str, zone: &str) -> anyhow::Result<Member> {
    Member::enrol(&control.manager(), &control.token(cluster, role)?, zone).await
}

#[test]
fn nodes_enrol_renew_and_are_revoked() {
    scenario_async("nodes_enrol_renew_and_are_revoked", async |scenario| {
        let mut control = Control::start(scenario)?;
        let id = control.create_cluster("prod")?;
        let token = control.token("prod", "seed")?;
        let mut node = Member::enrol(&control.manager(), &token, "zone a").await?;
        assert_eq!(node.membership.cluster, id);
        assert_eq!(node.membership.schedulers, [control.scheduler()]);
        let member = node.credentials.membership();
        assert_eq!((member.zone.as_str(), member.role.name()), ("zone a", "seed"));

        let again = refused(Member::enrol(&control.manager(), &token, "").await)?;
        assert_eq!(again.code(), Code::PermissionDenied);
        assert!(again.message().contains("has been used"), "{again}");
        let other = Authority::create("other", 0)?;
        let foreign = skimmer_identity::JoinToken::generate(other.fingerprint())?.to_string();
        let error = Member::enrol(&control.manager(), &foreign, "").await.err();
        let error = format!("{:#}", error.context("a foreign token worked")?);
        assert!(error.contains("connect to"), "the token names another CA: {error}");

        let listed = control.ask(&["node", "list"])?;
        assert_eq!(listed[0]["peer"], node.id());
        assert_eq!(
            (&listed[0]["name"], &listed[0]["role"]),
            (&"host-zone a".into(), &"seed".into())
        );
        assert!(
            !holds(&control.store(), token.rsplit('.').next().unwrap_or(&token))?,
            "the secret is kept"
        );
        assert!(!control.log().contains(&token));

        // Nothing of this lives in the process alone.
        control.kill()?;
        control.run()?;
        node.renew().await?;
        let again = refused(Member::enrol(&control.manager(), &token, "").await)?;
        assert!(again.message().contains("has been used"), "{again}");

        let connected = node.manager().await?;
        control.ask(&["node", "revoke", &node.id(), "--reason", "stolen"])?;
        let csr = node.credentials.key().csr()?;
        let status = connected.clone().renew(control::RenewRequest { csr }).await.err();
        assert_eq!(status.context("a revoked node was renewed")?.code(), Code::PermissionDenied);
        assert!(node.renew().await.is_err(), "nor does a new connection help");
        let listed = control.ask(&["node", "list", "--cluster", "prod"])?;
        assert_eq!(listed[0]["revoked"], true);
        let newcomer = join(&control, "prod", "peer", "").await?;
        let out = PeerId::from_bytes(&newcomer.membership.blocked[0])?;
        assert_eq!(out.to_string(), node.id(), "newcomers are told who is out");
        let events = control.ask(&["event", "list"])?.to_string();
        for what in ["cluster prod created", "enrolled as seed", "revoked: stolen"] {
            assert!(events.contains(what), "{what}: {events}");
        }
        control.terminate()
    });
}

#[test]
fn certificates_end() {
    scenario_async("certificates_end", async |scenario| {
        let setup = Setup {
            certificate_lifetime: Duration::from_secs(2),
            grace: Duration::from_secs(6),
            ..Setup::default()
        };
        let control = Control::start_with(scenario, "control", &setup, None)?;
        control.create_cluster("prod")?;
        control.ask(&["cluster", "policy", "prod", "--repository", "r.io/*"])?;
        let (mut kept, mut lost) =
            (join(&control, "prod", "peer", "").await?, join(&control, "prod", "peer", "").await?);
        kept.grant("r.io", "a", "").await?;
        let end = tokio::time::Instant::now() + Duration::from_secs(30);
        let ended = loop {
            match kept.grant("r.io", "a", "").await {
                Ok(_) => anyhow::ensure!(tokio::time::Instant::now() < end, "it never ends"),
                Err(error) => break error.downcast::<Status>()?,
            }
        };
        assert_eq!(ended.code(), Code::Unauthenticated, "{ended}");
        assert!(ended.message().contains("renew"), "{ended}");
        let stream = kept.attend().await;
        assert_eq!(refused(stream)?.code(), Code::Unauthenticated);
        // Within the grace period it is only good for another.
        kept.renew().await?;
        kept.grant("r.io", "a", "").await?;
        // The other certificate may be a second younger: it is good at first, then in its grace period,
        // and at last not even heard.
        let heard = |answer: anyhow::Result<_>| match answer {
            Ok(_) => true,
            Err(error) => error
                .downcast_ref::<Status>()
                .is_some_and(|status| status.code() == Code::Unauthenticated),
        };
        while heard(lost.grant("r.io", "a", "").await) {
            anyhow::ensure!(tokio::time::Instant::now() < end, "the grace period never ends");
        }
        assert!(lost.renew().await.is_err(), "past the grace period it is good for nothing");
        Ok(())
    });
}

#[test]
fn clusters_never_meet() {
    scenario_async("clusters_never_meet", async |scenario| {
        let control = Control::start(scenario)?;
        control.create_cluster("a")?;
        let b_id = control.create_cluster("b")?;
        let (one, two) =
            (join(&control, "a", "peer", "").await?, join(&control, "b", "peer", "").await?);
        let blob = Digest::of(b"blob");
        let trust = Trust::new(Duration::ZERO);
        trust.set_authority(&b_id, &two.membership.cluster_ca)?;
        assert!(
            trust.check(&one.credentials.certificate(), 0).is_err(),
            "b's CA knows nobody of a"
        );

        let (mut first, mut second) = (one.attend().await?, two.attend().await?);
        announce(&first, &blob, 4).await?;
        want(&second, &blob, 4).await?;
        assert!(!second.wait(lease).await?.is_empty(), "nobody of b has it");
        let record = index_record(&one, &blob, b"table");
        let mine = task(&blob, MIB);
        first
            .say(Said::Publish(Publish { task: mine.clone(), record: Some(record.clone()) }))
            .await?;
        first.say(Said::Find(control::Find { task: mine.clone() })).await?;
        assert_eq!(first.wait(found).await?.0.len(), 1);
        // Nor does its word count there.
        second.say(Said::Publish(Publish { task: mine.clone(), record: Some(record) })).await?;
        second.say(Said::Find(control::Find { task: mine })).await?;
        assert_eq!(second.wait(found).await?, (vec![], vec![]));
        let tasks = control.ask(&["task", "list", "--cluster", "b"])?;
        assert_eq!((&tasks[0]["peers"], &tasks[0]["cluster"]), (&1.into(), &"b".into()));
        assert_eq!(control.ask(&["task", "list"])?.as_array().map(Vec::len), Some(2));
        assert!(control.refusal(&["task", "show", &blob.to_string()])?.contains("2 tasks"));

        control.ask(&["node", "revoke", &one.id()])?;
        assert_eq!(first.end().await?.code(), Code::PermissionDenied);
        let newcomer = join(&control, "b", "peer", "").await?;
        assert!(newcomer.membership.blocked.is_empty(), "b isn't told who is out of a");
        assert!(control.refusal(&["node", "list", "--cluster", "c"])?.contains("no cluster"));
        Ok(())
    });
}

#[test]
fn rights_follow_the_policy_or_the_registry() {
    scenario_async("rights_follow_the_policy_or_the_registry", async |scenario| {
        let auth = Auth::Basic { user: "alice", password: "wonderland" };
        let registry = Registry::start_with(scenario, "registry", &auth, None)?;
        let image = crate::fixtures::small(scenario, "team/app")?;
        registry.add(&image)?;
        let host = registry.address();
        let setup = Setup { plain_http: vec![host.to_owned()], ..Setup::default() };
        let control = Control::start_with(scenario, "control", &setup, None)?;
        let cluster = control.create_cluster("prod")?;
        let node = join(&control, "prod", "peer", "").await?;
        let trust = Trust::new(Duration::ZERO);
        trust.set_authority(&cluster, &node.membership.cluster_ca)?;
        let now = node.credentials.membership().not_before;
        let holder = node.credentials.key().peer();
        let covers = |grant: Vec<u8>, name: &str| -> anyhow::Result<bool> {
            let grant = trust.check_grant(&cluster, &grant, now)?;
            Ok(grant.covers(&holder, &Scope::Repository(format!("{host}/{name}")), now))
        };

        // "alice:wonderland" and "mallory:wonderland"
        let (alice, mallory) = ("YWxpY2U6d29uZGVybGFuZA==", "bWFsbG9yeTp3b25kZXJsYW5k");
        let grant = node.grant(host, "team/app", &format!("Basic {alice}")).await?;
        assert!(covers(grant, "team/app")?);
        for (repository, authorization, code) in [
            ("team/app", format!("Basic {mallory}"), Code::PermissionDenied),
            ("team/app", "Bearer forged".to_owned(), Code::PermissionDenied),
            ("team/app", String::new(), Code::PermissionDenied),
            ("team/other", format!("Basic {alice}"), Code::PermissionDenied),
            ("team/../app", format!("Basic {alice}"), Code::InvalidArgument),
        ] {
            let status = refused(node.grant(host, repository, &authorization).await)?;
            assert_eq!(status.code(), code, "{repository}: {status}");
        }
        for secret in [alice, mallory, "wonderland", "forged"] {
            assert!(!control.log().contains(secret), "{secret} is in the log");
            assert!(!holds(&control.store(), secret)?, "{secret} is in the store");
        }
        let asked = registry.requests().len();
        control.ask(&["cluster", "policy", "prod", "--repository", &format!("{host}/team/*")])?;
        assert!(covers(node.grant(host, "team/app", "").await?, "team/app")?);
        assert_eq!(registry.requests().len(), asked, "the policy is enough");
        control.ask(&["cluster", "policy", "prod", "--none"])?;
        let status = refused(node.grant(host, "team/app", "").await)?;
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        assert!(
            control
                .refusal(&["cluster", "policy", "prod", "--repository", "a"])?
                .contains("pattern")
        );
        Ok(())
    });
}

#[test]
fn the_scheduler_brings_nodes_together() {
    scenario_async("the_scheduler_brings_nodes_together", async |scenario| {
        let control = Control::start(scenario)?;
        control.create_cluster("prod")?;
        let (has, wants) = (
            join(&control, "prod", "peer", "z").await?,
            join(&control, "prod", "peer", "z").await?,
        );
        let blob = Digest::of(b"blob");
        let (mut parent, mut child) = (has.attend().await?, wants.attend().await?);
        let epoch = parent.wait(|heard| match heard {
            Heard::Welcome(welcome) => Some(welcome.epoch),
            _ => None,
        });
        assert!(epoch.await? > 0);
        announce(&parent, &blob, 4).await?;
        want(&child, &blob, 4).await?;
        let id = TaskId::of(&Scope::Public, &blob);
        let mut got = 0;
        while got < 4 {
            let (assigned, from) = child.wait(assigned).await?;
            assert_eq!((assigned.task.as_slice(), from.zone.as_str()), (&id.as_bytes()[..], "z"));
            assert_eq!(from.addresses, [format!("/memory/{}", has.id())]);
            let pieces = assigned.pieces.context("an assignment of nothing")?;
            got += PieceSet::from_wire(&pieces.runs)?.len();
            let pieces = Some(pieces);
            child
                .say(Said::Arrived(control::Arrived { task: id.as_bytes().to_vec(), pieces }))
                .await?;
        }
        let shown = wait_for("both nodes are complete", Duration::from_secs(10), || {
            let shown = control.ask(&["task", "show", &id.to_string()[..8]]).ok()?;
            (shown["complete"] == 2).then_some(shown)
        })?;
        assert_eq!((&shown["peers"], &shown["origin_bytes"]), (&2.into(), &0.into()));
        assert_eq!((&shown["swarm_bytes"], &shown["pieces"]), (&MIB.into(), &4.into()));
        let decision = &shown["decisions"][0];
        assert_eq!(decision["node"], wants.id());
        assert!(decision["what"].as_str().is_some_and(|what| what.contains(&has.id())), "{shown}");
        assert!(decision["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{shown}");

        // A second stream of a node replaces the first.
        let again = has.attend().await?;
        assert_eq!(parent.end().await?.code(), Code::Aborted);
        drop(again);
        wait_for("the node is gone", Duration::from_secs(10), || {
            let nodes = control.ask(&["node", "list"]).ok()?;
            let node = nodes.as_array()?.iter().find(|node| node["peer"] == has.id())?;
            (node["connected"] == false).then_some(())
        })?;
        want(&child, &Digest::of(b"other"), 4).await?;
        assert!(!child.wait(lease).await?.is_empty(), "one node alone goes to the origin");

        // A node that talks nonsense is shown the door; others stay.
        let mut nonsense = has.attend().await?;
        nonsense.say(Said::Withdraw(control::Withdraw { task: vec![1], pieces: None })).await?;
        assert_eq!(nonsense.end().await?.code(), Code::InvalidArgument);
        control.ask(&["node", "revoke", &has.id()])?;
        let out = child.wait(|heard| match heard {
            Heard::Blocked(blocked) => Some(blocked.peers),
            _ => None,
        });
        assert_eq!(out.await?, [PeerId::to_bytes(&has.credentials.key().peer()).to_vec()]);
        Ok(())
    });
}

#[test]
fn a_silent_node_is_gone_within_seconds() {
    scenario_async("a_silent_node_is_gone_within_seconds", async |scenario| {
        let control = Control::start(scenario)?;
        control.create_cluster("prod")?;
        let mut node = join(&control, "prod", "peer", "").await?;
        let (address, freeze) = freezable(control.scheduler()).await?;
        node.membership.schedulers = vec![address];
        let _stream = node.attend().await?;
        let connected = || Some(control.ask(&["node", "list"]).ok()?[0]["connected"] == true);
        wait_for("the node is there", Duration::from_secs(10), || connected()?.then_some(()))?;
        freeze.cancel();
        let since = std::time::Instant::now();
        wait_for("the node is gone", Duration::from_secs(10), || (!connected()?).then_some(()))?;
        println!("a silent node was gone after {:.1} s", since.elapsed().as_secs_f64());
        Ok(())
    });
}

/// An address that leads to `to`, until it is frozen: then nothing moves, and nothing is closed.
async fn freezable(to: String) -> anyhow::Result<(String, CancellationToken)> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let freeze = CancellationToken::new();
    let frozen = freeze.clone();
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await?;
        let mut far = tokio::net::TcpStream::connect(to).await?;
        let copy = tokio::io::copy_bidirectional(&mut near, &mut far);
        if frozen.run_until_cancelled(copy).await.is_none() {
            std::future::pending::<()>().await;
        }
        std::io::Result::Ok(())
    });
    Ok((address, freeze))
}

#[test]
fn a_lying_index_is_purged_and_its_signer_revoked() {
    scenario_async("a_lying_index_is_purged_and_its_signer_revoked", async |scenario| {
        let control = Control::start(scenario)?;
        control.create_cluster("prod")?;
        let blob = Digest::of(b"layer");
        let mut nodes: Vec<(Member, Stream)> = Vec::new();
        for role in ["seed", "peer", "peer"] {
            let member = join(&control, "prod", role, "").await?;
            let stream = member.attend().await?;
            nodes.push((member, stream));
        }
        let [(liar, lies), (one, first), (two, second)] = &mut nodes[..] else {
            anyhow::bail!("three")
        };
        let task = task(&blob, MIB);
        let publish = |member: &Member, table: &[u8]| {
            let record = Some(index_record(member, &blob, table));
            Said::Publish(Publish { task: task.clone(), record })
        };
        lies.say(publish(liar, b"wrong")).await?;
        // As it comes: found after the liar's word has arrived, or told of it then.
        first.say(Said::Find(control::Find { task: task.clone() })).await?;
        let (tables, holders) =
            first.wait(|heard| found(heard).filter(|(t, _)| !t.is_empty())).await?;
        assert_eq!((tables, holders), (vec![Digest::of(b"wrong")], vec![liar.id()]));

        first.say(publish(one, b"right")).await?;
        let mut purged = Vec::new();
        for stream in [&mut *lies, &mut *first, &mut *second] {
            purged.push(stream.wait(purge).await?);
        }
        assert!(purged.iter().all(|reason| reason == "nodes disagree on it"), "{purged:?}");
        second.say(publish(two, b"right")).await?;
        assert_eq!(lies.end().await?.code(), Code::PermissionDenied);
        let told = first.wait(|heard| found(heard).filter(|(t, _)| t.len() == 2)).await?;
        assert_eq!(told, (vec![Digest::of(b"right"); 2], vec![two.id()]));
        wait_for("the signer is revoked", Duration::from_secs(10), || {
            let events = control.ask(&["event", "list"]).ok()?.to_string();
            let known = events.contains("nodes disagree on how blob");
            (known && events.contains("signed a wrong piece table")).then_some(())
        })?;
        assert!(liar.renew().await.is_err());
        Ok(())
    });
}

#[test]
fn strangers_are_turned_away() {
    scenario_async("strangers_are_turned_away", async |scenario| {
        let control = Control::start(scenario)?;
        control.create_cluster("prod")?;
        let member = join(&control, "prod", "peer", "").await?;
        let root = control.token("prod", "peer")?.parse::<skimmer_identity::JoinToken>()?;
        let connection = channel(&control.scheduler(), root.fingerprint, None).await?;
        let mut stranger =
            skimmer_proto::control::scheduler_client::SchedulerClient::new(connection);
        let nothing = tokio_stream::iter(Vec::<control::NodeMessage>::new());
        let status = stranger.attend(nothing).await.err().context("a stranger attends")?;
        assert_eq!(status.code(), Code::Unauthenticated);

        // A certificate by a CA of the same name isn't one of the cluster.
        let key = Key::generate()?;
        let forged =
            skimmer_identity::Membership { peer: key.peer(), ..member.credentials.membership() };
        let forger = Authority::create("skimmer cluster prod", 0)?;
        let credentials = skimmer_identity::Credentials::new(key, &forger.issue(&forged)?)?;
        let manager = control.manager();
        let connected = channel(&manager, root.fingerprint, Some(credentials));
        let refused = match connected.await {
            Err(_) => true,
            // TLS 1.3: the client may be done before the server has said no.
            Ok(connection) => {
                let mut manager =
                    skimmer_proto::control::manager_client::ManagerClient::new(connection);
                manager.grant(control::GrantRequest::default()).await.is_err()
            }
        };
        assert!(refused);
        assert_ne!(authority::fingerprint(&member.membership.cluster_ca), root.fingerprint);
        let socket = std::fs::metadata(control.socket())?;
        assert_eq!(std::os::unix::fs::MetadataExt::mode(&socket) & 0o777, 0o600);
        Ok(())
    });
}

fn index_record(member: &Member, blob: &Digest, table: &[u8]) -> control::IndexRecord {
    let certificate = member.credentials.certificate();
    statement::sign_index(member.credentials.key(), &certificate, blob, &Digest::of(table))
}

/// Tables and the ids of holders.
fn found(heard: Heard) -> Option<(Vec<Digest>, Vec<String>)> {
    let Heard::Found(found) = heard else { return None };
    let tables = found.records.into_iter().map(|record| record.table.try_into().ok());
    let holders = found.holders.iter().map(|peer| PeerId::from_bytes(&peer.id).ok());
    Some((
        tables.map(|table| table.map(Digest::from_bytes)).collect::<Option<_>>()?,
        holders.map(|peer| peer.map(|peer| peer.to_string())).collect::<Option<_>>()?,
    ))
}

fn purge(heard: Heard) -> Option<String> {
    match heard {
        Heard::Purge(purge) => Some(purge.reason),
        _ => None,
    }
}
