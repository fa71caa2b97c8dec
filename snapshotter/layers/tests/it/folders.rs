//! Folders of tests, and what is left of those whose process was killed.
//!
//! A test serves the mounts that it reads. Where its process is killed, whoever reads waits for a server that is no
//! more, and holds what would end the wait: somebody else must end it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};

use crate::lazy::with_index;
use crate::node::{noise, read};

/// Folders are `<temp>/skimmer-layers-<process>-<random>`.
const PREFIX: &str = "skimmer-layers-";

/// A folder of its own, removed when dropped.
pub struct Folder(PathBuf);

impl Folder {
    /// The first one sweeps up.
    pub fn new() -> Self {
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let prefix = format!("{PREFIX}{}-", std::process::id());
        Self(tempfile::Builder::new().prefix(&prefix).tempdir().unwrap().keep())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What ends in the background, as a store does, may still write to it.
        for _ in 0..200 {
            if fs::remove_dir_all(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Unmounts and removes what processes have left that no longer run.
fn sweep() {
    let entries = fs::read_dir(std::env::temp_dir()).unwrap().flatten();
    for left in entries.map(|entry| entry.path()).filter(|path| is_abandoned(path)) {
        for mount in mounts(&left).iter().rev() {
            // By force: this ends a FUSE connection, and with it the waiting for its server.
            let _ = umount2(mount, MntFlags::MNT_FORCE);
            let _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        if mounts(&left).is_empty() {
            let _ = fs::remove_dir_all(&left);
        }
    }
}

fn is_abandoned(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
    // A process that was killed and one of whose threads waits is still listed, but has no program.
    process.is_some_and(|process| fs::read_link(format!("/proc/{process}/exe")).is_err())
}

/// The mount points below `folder`, in the order in which they were mounted.
fn mounts(folder: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|point| point.starts_with(folder)).collect()
}

/// Set for the process that is killed.
const VICTIM: &str = "SKIMMER_TEST_VICTIM";

/// What the victim makes in its folder when its reader waits.
const WAITS: &str = "waits";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_process_leaves_is_swept_up() {
    if std::env::var_os(VICTIM).is_some() {
        return be_the_victim().await;
    }
    let name = "folders::what_a_killed_process_leaves_is_swept_up";
    let mut victim = Command::new(std::env::current_exe().unwrap());
    victim.args(["--exact", name]).env(VICTIM, "").stdout(Stdio::null()).stderr(Stdio::null());
    let mut victim = victim.spawn().unwrap();
    let folder = until("the victim's reader waits", || {
        let own = format!("{PREFIX}{}-", victim.id());
        let mut entries = fs::read_dir(std::env::temp_dir()).unwrap().flatten();
        let folder = entries.find(|entry| entry.file_name().to_string_lossy().starts_with(&own))?;
        folder.path().join(WAITS).exists().then(|| folder.path())
    })
    .await;
    assert!(!is_abandoned(&folder));
    victim.kill().unwrap();
    until("the victim has no program", || is_abandoned(&folder).then_some(())).await;
    assert!(!mounts(&folder).is_empty());
    sweep();
    until("the victim has ended", || Child::try_wait(&mut victim).unwrap()).await;
    assert!(!folder.exists());
}

/// Reads a file that never comes.
async fn be_the_victim() {
    let (node, spec) = with_index(&[("file", noise(8 << 20, 70))]).await;
    node.source.hangs.store(true, Ordering::Relaxed);
    let path = node.layers.begin(spec).mount().await.unwrap().path.join("file");
    let reader = tokio::spawn(async move { read(&path).await });
    until("the file is asked for", || (node.source.served() > 0).then_some(())).await;
    fs::write(node.directory.path().join(WAITS), "").unwrap();
    let _ = reader.await;
}

/// What `found` finds, within ten seconds.
async fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    for _ in 0..1000 {
        if let Some(found) = found() {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}
