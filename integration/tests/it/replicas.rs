//! Several schedulers on one store: they share the tasks, and one may die.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::wait_for;
use skimmer_integration::control::{Control, Setup};
use skimmer_integration::member::{Member, Stream};
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::speech::{announce, arrived, want};
use skimmer_proto::control::scheduler_message::Message as Heard;
use skimmer_proto::{Digest, Scope, TaskId};

const PATIENCE: Duration = Duration::from_secs(60);
/// So many that each of two schedulers owns some, but for one run in 2¹⁵.
const BLOBS: usize = 16;
const PIECES: u32 = 4;

struct Fleet {
    manager: Control,
    schedulers: [Control; 2],
    /// One attends at each scheduler.
    nodes: [Member; 2],
}

impl Fleet {
    async fn start(scenario: &Scenario) -> anyhow::Result<Self> {
        let manager = Setup { role: "manager", ..Setup::default() };
        let manager = Control::start_with(scenario, "manager", &manager, None)?;
        let setup = Setup { role: "scheduler", store: Some(manager.store()), ..Setup::default() };
        let start = |name| Control::start_with(scenario, name, &setup, None);
        let schedulers = [start("first")?, start("second")?];
        manager.create_cluster("prod")?;
        let enrol = async || {
            let token = manager.token("prod", "peer")?;
            Member::enrol(&manager.manager(), &token, "").await
        };
        let mut nodes = [enrol().await?, enrol().await?];
        let running = schedulers.each_ref().map(Control::scheduler);
        for (node, own) in nodes.iter_mut().zip(&running) {
            let told: BTreeSet<_> = node.membership.schedulers.iter().collect();
            assert_eq!(told, running.iter().collect(), "nodes are told of both");
            node.membership.schedulers = vec![own.clone()];
        }
        wait_for("the schedulers know each other", PATIENCE, || {
            let know = |s: &Control| s.log().contains("the schedulers have changed");
            (know(&schedulers[0]) || know(&schedulers[1])).then_some(())
        })?;
        Ok(Self { manager, schedulers, nodes })
    }

    /// Both streams, once the schedulers are linked: a node that came before has to come again.
    async fn attend(&self) -> anyhow::Result<[Stream; 2]> {
        let [first, second] = &self.nodes;
        for node in [first, second] {
            // The scheduler reads of the new cluster within a second.
            let known = async {
                while let Err(error) = node.attend().await {
                    println!("not yet: {error:#}");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            };
            tokio::time::timeout(PATIENCE, known).await?;
        }
        wait_for("the schedulers are linked", PATIENCE, || {
            self.schedulers.iter().all(|s| s.log().contains("linked")).then_some(())
        })?;
        Ok([first.attend().await?, second.attend().await?])
    }
}

fn blobs(what: &str) -> Vec<Digest> {
    (0..BLOBS).map(|n| Digest::of(format!("{what} {n}").as_bytes())).collect()
}

fn id(blob: &Digest) -> Vec<u8> {
    TaskId::of(&Scope::Public, blob).as_bytes().to_vec()
}

/// Pieces of tasks.
type Set = BTreeSet<(Vec<u8>, u32)>;

fn whole(blobs: &[Digest]) -> Set {
    let pieces = |blob| (0..PIECES).map(move |piece| (id(blob), piece));
    blobs.iter().flat_map(pieces).collect()
}

/// Does at once what a node is told to: what it fetched, and whether from the origin.
async fn obey(stream: &Stream, message: Heard) -> anyhow::Result<Option<(Set, bool)>> {
    let (task, pieces, origin) = match message {
        Heard::Lease(lease) => (lease.task, lease.pieces, true),
        Heard::Assign(assign) => (assign.task, assign.pieces, false),
        _ => return Ok(None),
    };
    let runs = pieces.clone().context("told to fetch no pieces")?.runs;
    let pieces_of = |run: &[u32]| run[0]..run[0] + run[1];
    let fetched = runs.chunks(2).flat_map(pieces_of).map(|piece| (task.clone(), piece)).collect();
    arrived(stream, task, pieces).await?;
    Ok(Some((fetched, origin)))
}

/// Waits until the schedulers know that somebody has `blobs`.
fn wait_known(schedulers: &[Control], blobs: &[Digest]) -> anyhow::Result<()> {
    let names: BTreeSet<_> = blobs.iter().map(ToString::to_string).collect();
    wait_for("the schedulers know who has what", PATIENCE, || {
        let tasks = schedulers.iter().filter_map(|scheduler| scheduler.ask(&["task", "list"]).ok());
        let tasks: Vec<_> = tasks.flat_map(|list| list.as_array().cloned()).flatten().collect();
        let held = tasks.iter().filter(|task| task["complete"].as_u64() > Some(0));
        let known = held.filter_map(|task| task["digest"].as_str()).map(str::to_owned);
        known.collect::<BTreeSet<_>>().is_superset(&names).then_some(())
    })
}

/// Waits until the child has all of `blobs`, none of it from the origin.
async fn wait_fetched(child: &mut Stream, blobs: &[Digest]) -> anyhow::Result<()> {
    let mut missing = whole(blobs);
    while !missing.is_empty() {
        let message = child.next().await?.context("the stream ended")?;
        if let Some((fetched, origin)) = obey(child, message).await? {
            let new = fetched.is_subset(&missing);
            missing = &missing - &fetched;
            anyhow::ensure!(!new || !origin, "a piece that a node has was leased");
        }
    }
    Ok(())
}

#[test]
fn schedulers_share_the_tasks_and_one_may_die() {
    scenario("schedulers_share_the_tasks_and_one_may_die", |scenario| {
        tokio::runtime::Runtime::new()?.block_on(check(scenario))
    });
}

async fn check(scenario: &Scenario) -> anyhow::Result<()> {
    let mut fleet = Fleet::start(scenario).await?;
    let [mut first, mut second] = fleet.attend().await?;

    // Whatever both want is leased once, to one or the other.
    let wanted = blobs("wanted");
    for blob in &wanted {
        want(&first, blob, PIECES).await?;
        want(&second, blob, PIECES).await?;
    }
    let (mut leased, mut have) = (Set::new(), [Set::new(), Set::new()]);
    while have.iter().any(|have| *have != whole(&wanted)) {
        let (message, stream, have) = tokio::select! {
            message = first.next() => (message, &first, &mut have[0]),
            message = second.next() => (message, &second, &mut have[1]),
        };
        let message = message?.context("the stream ended")?;
        let Some((fetched, origin)) = obey(stream, message).await? else { continue };
        if origin {
            anyhow::ensure!(leased.is_disjoint(&fetched), "pieces were leased twice");
            leased.extend(fetched.clone());
        }
        have.extend(fetched);
    }
    anyhow::ensure!(leased == whole(&wanted), "each piece was leased");
    let shares = fleet.schedulers.each_ref().map(|scheduler| {
        let tasks = scheduler.ask(&["task", "list"])?;
        anyhow::Ok(tasks.as_array().map_or(0, Vec::len))
    });
    let [one, other] = shares;
    let (one, other) = (one?, other?);
    anyhow::ensure!(one > 0 && other > 0 && one + other == BLOBS, "{one} and {other} tasks");

    // What one has, the other is told of, whoever owns the task.
    let held = blobs("held");
    for blob in &held {
        announce(&first, blob, PIECES).await?;
    }
    wait_known(&fleet.schedulers, &held)?;
    for blob in &held {
        want(&second, blob, PIECES).await?;
    }
    wait_fetched(&mut second, &held).await?;

    // The tasks of who dies move to who is left, which learns of them from the nodes.
    fleet.schedulers[1].kill()?;
    second.end().await?;
    first.end().await?;
    let [has, wants] = &mut fleet.nodes;
    wants.membership.schedulers = vec![fleet.schedulers[0].scheduler()];
    let (first, mut second) = (has.attend().await?, wants.attend().await?);
    for blob in &held {
        announce(&first, blob, PIECES).await?;
    }
    wait_known(&fleet.schedulers[..1], &held)?;
    for blob in &held {
        want(&second, blob, PIECES).await?;
    }
    wait_fetched(&mut second, &held).await?;
    fleet.manager.terminate()
}
