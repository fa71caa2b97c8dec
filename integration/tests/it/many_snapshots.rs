//! A thousand snapshots, removed and cleaned up while containers start.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use skimmer_integration::command::wait_for;
use skimmer_integration::scenario::scenario;
use skimmer_integration::skimmerd::{Setup, Skimmerd};
use skimmer_integration::snapshots::Snapshots;

const SNAPSHOTS: usize = 1000;
/// Of files in each of them.
const FILES: usize = 100;
/// For one Prepare or Remove on a busy machine: removal of a hundred thousand files takes far longer.
const PROMPT: Duration = Duration::from_secs(2);

#[test]
fn removing_a_thousand_snapshots_stalls_nobody() {
    scenario("many-snapshots", |scenario| {
        let nobody = scenario.path("no-containerd.sock");
        let skimmerd = Skimmerd::start(scenario, "skimmerd", &nobody, &Setup::default())?;
        let connect = || Snapshots::connect(&skimmerd.address(), "skimmer");
        let mut snapshots = connect()?;
        for number in 0..SNAPSHOTS {
            let mounts = snapshots.prepare(&format!("s-{number}"), "", HashMap::new())?;
            let folder = Path::new(&mounts.first().context("no mounts")?.source);
            for file in 0..FILES {
                std::fs::write(folder.join(file.to_string()), "")?;
            }
        }
        let longest = std::thread::scope(|scope| {
            let remover = scope.spawn(|| -> anyhow::Result<Duration> {
                let mut snapshots = connect()?;
                let mut longest = Duration::ZERO;
                for number in 0..SNAPSHOTS {
                    let began = Instant::now();
                    snapshots.remove(&format!("s-{number}"))?;
                    longest = longest.max(began.elapsed());
                }
                snapshots.cleanup()?;
                Ok(longest)
            });
            let mut longest = Duration::ZERO;
            let mut number = 0;
            while !remover.is_finished() {
                let began = Instant::now();
                let key = format!("new-{number}");
                snapshots.prepare(&key, "", HashMap::new())?;
                snapshots.stat(&key)?;
                longest = longest.max(began.elapsed());
                number += 1;
            }
            let removed = remover.join().map_err(|_| anyhow::anyhow!("the remover panicked"))??;
            anyhow::ensure!(removed < PROMPT, "a Remove took {removed:?}");
            anyhow::ensure!(number > 10, "only {number} snapshots were made meanwhile");
            Ok(longest)
        })?;
        anyhow::ensure!(longest < PROMPT, "a Prepare took {longest:?}");
        // What Cleanup has answered for is gone.
        let removed = skimmerd.root().join("snapshots/removed");
        wait_for("nothing is left", Duration::from_secs(30), || {
            (std::fs::read_dir(&removed).ok()?.count() == 0).then_some(())
        })
    });
}
