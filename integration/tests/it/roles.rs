//! The control plane in several processes over one store, and what watches over it.

use std::time::Duration;

use skimmer_integration::command::wait_for;
use skimmer_integration::control::{Control, Setup};
use skimmer_integration::http;
use skimmer_integration::member::{Member, Stream};
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_proto::control::scheduler_message::Message as Heard;
use tonic::Code;

/// For what another process has to notice, on a busy machine.
const NOTICE: Duration = Duration::from_secs(60);

/// A scheduler and a manager over the same SQLite file.
fn apart(scenario: &Scenario) -> anyhow::Result<(Control, Control)> {
    let setup = Setup { role: "scheduler", ..Setup::default() };
    let scheduler = Control::start_with(scenario, "scheduler", &setup, None)?;
    let setup = Setup { role: "manager", store: Some(scheduler.store()), ..Setup::default() };
    let manager = Control::start_with(scenario, "manager", &setup, None)?;
    Ok((manager, scheduler))
}

/// Attends, which takes a scheduler that has read of the cluster.
async fn attend(member: &Member) -> anyhow::Result<Stream> {
    let end = tokio::time::Instant::now() + NOTICE;
    loop {
        match member.attend().await {
            Ok(stream) => return Ok(stream),
            Err(error) if tokio::time::Instant::now() > end => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

#[test]
fn manager_and_scheduler_share_a_store() {
    scenario("roles", |scenario| {
        let (mut manager, mut scheduler) = apart(scenario)?;
        let runtime = tokio::runtime::Runtime::new()?;
        manager.create_cluster("prod")?;
        let token = manager.token("prod", "peer")?;
        let member = runtime.block_on(Member::enrol(&manager.manager(), &token, "z"))?;
        assert_eq!(member.membership.schedulers, [scheduler.scheduler()]);
        let mut stream = runtime.block_on(attend(&member))?;
        let welcome = stream.wait(|heard| matches!(heard, Heard::Welcome(_)).then_some(()));
        runtime.block_on(welcome)?;

        let nodes = scheduler.ask(&["node", "list"])?;
        assert_eq!(
            (&nodes[0]["peer"], &nodes[0]["connected"]),
            (&member.id().into(), &true.into())
        );
        scheduler.ask(&["task", "list"])?;
        let refusal = manager.refusal(&["task", "list"])?;
        assert!(refusal.contains("scheduler"), "the manager says who knows: {refusal}");

        // Said to the one, done by the other.
        manager.ask(&["node", "revoke", &member.id(), "--reason", "stolen"])?;
        assert_eq!(runtime.block_on(stream.end())?.code(), Code::PermissionDenied);

        // Either lives without the other.
        let token = manager.token("prod", "peer")?;
        scheduler.kill()?;
        let second = runtime.block_on(Member::enrol(&manager.manager(), &token, "z"))?;
        manager.terminate()?;
        scheduler.run()?;
        let stream = runtime.block_on(attend(&second))?;
        drop(stream);
        scheduler.terminate()
    });
}

#[test]
fn the_control_plane_says_how_it_is() {
    scenario("control-health", |scenario| {
        let control = Control::start(scenario)?;
        let get = |path: &str| http::get(&control.health(), path);
        let ready = || get("/ready").ok().filter(|answer| answer.starts_with("HTTP/1.1 200"));
        let ready = wait_for("it is ready", NOTICE, ready)?;
        assert!(ready.ends_with("ready\n"), "{ready}");
        let live = get("/live")?;
        assert!(live.starts_with("HTTP/1.1 200") && live.ends_with("live\n"), "{live}");
        assert!(get("/other")?.starts_with("HTTP/1.1 404"));

        control.create_cluster("prod")?;
        let token = control.token("prod", "peer")?;
        let runtime = tokio::runtime::Runtime::new()?;
        let member = runtime.block_on(Member::enrol(&control.manager(), &token, "z"))?;
        let _stream = runtime.block_on(attend(&member))?;
        let counted = || {
            let text = get("/metrics").ok()?;
            assert!(text.contains("openmetrics-text"), "{text}");
            assert!(text.ends_with("# EOF\n"), "{text}");
            let line = |line: &&str| line.starts_with("skimmer_control_") && line.contains("nodes");
            text.lines().filter(line).any(|line| line.ends_with(" 1")).then_some(())
        };
        wait_for("the node is counted", NOTICE, counted)
    });
}
