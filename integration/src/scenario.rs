//! One system test: a folder of its own, one at a time, and nothing left behind.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;

use crate::{mounts, sweep, tools};

/// What a scenario works in.
pub struct Scenario {
    folder: PathBuf,
    checks: Mutex<Vec<Check>>,
}

type Check = Box<dyn FnOnce() -> anyhow::Result<()>>;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Runs `body` as the scenario `name`, alone, and fails the calling test with its error.
///
/// Where root or a needed program is missing, the scenario is skipped with a message, unless `SKIMMER_REQUIRE_TOOLS` is set.
pub fn scenario(name: &str, body: impl FnOnce(&Scenario) -> anyhow::Result<()>) {
    if let Some(missing) = tools::missing() {
        assert!(!tools::required(), "{name}: {missing}");
        eprintln!("{name} skipped: {missing}");
        return;
    }
    if let Err(error) = run(name, body) {
        panic!("{name}: {error:?}");
    }
}

/// Runs `body` as the scenario `name`, alone, and returns what it does.
///
/// # Errors
/// Those of `body`, and what it left behind. Its logs are then kept in `<cache>/logs/<name>` and their ends printed.
pub fn run<T>(name: &str, body: impl FnOnce(&Scenario) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    sweep::abandoned(&std::env::temp_dir());
    let scenario = Scenario::new()?;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        body(&scenario).and_then(|value| scenario.run_checks().map(|()| value))
    }));
    if let Ok(Err(error)) = &outcome {
        // Before the logs, which are long; whoever gets the error prints it after them.
        eprintln!("{name}: {error:#}");
    }
    if !matches!(outcome, Ok(Ok(_))) {
        scenario.keep_logs(name);
    }
    let cleaned = scenario.clean();
    match outcome {
        Err(panic) => resume_unwind(panic),
        Ok(Err(error)) => Err(error),
        Ok(Ok(value)) => cleaned.context("something was left behind").map(|()| value),
    }
}

impl Scenario {
    fn new() -> anyhow::Result<Self> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Short: unix sockets below it have at most 107 bytes.
        let folder =
            std::env::temp_dir().join(format!("{}{}-{number}", sweep::PREFIX, std::process::id()));
        std::fs::create_dir_all(folder.join("logs"))
            .with_context(|| format!("create {}", folder.display()))?;
        std::fs::create_dir_all(folder.join("hosts"))?;
        Ok(Self { folder, checks: Mutex::default() })
    }

    /// The scenario's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path below the scenario's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Where programs log to.
    pub fn logs(&self) -> PathBuf {
        self.folder.join("logs")
    }

    /// containerd's `certs.d` of this scenario; each registry adds itself.
    pub fn hosts(&self) -> PathBuf {
        self.folder.join("hosts")
    }

    /// Has `check` decide, after the scenario's body passed, whether it really did.
    pub fn check_at_end(&self, check: impl FnOnce() -> anyhow::Result<()> + 'static) {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(check));
    }

    fn run_checks(&self) -> anyhow::Result<()> {
        let checks =
            std::mem::take(&mut *self.checks.lock().unwrap_or_else(PoisonError::into_inner));
        checks.into_iter().try_for_each(|check| check())
    }

    fn keep_logs(&self, name: &str) {
        let kept = tools::cache().join("logs").join(name);
        let _ = std::fs::remove_dir_all(&kept);
        if std::fs::create_dir_all(&kept).is_err() {
            return;
        }
        for entry in std::fs::read_dir(self.logs()).into_iter().flatten().flatten() {
            let _ = std::fs::copy(entry.path(), kept.join(entry.file_name()));
            let text = std::fs::read(entry.path()).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            if !lines.is_empty() {
                eprintln!("--- {} (end)", kept.join(entry.file_name()).display());
                eprintln!("{}", lines[lines.len().saturating_sub(25)..].join("\n"));
            }
        }
    }

    /// Whatever the fixtures didn't take away themselves is an error, and is taken away here.
    fn clean(self) -> anyhow::Result<()> {
        let processes = sweep::processes_naming(&self.folder);
        let mounted = mounts::below(&self.folder);
        sweep::folder(&self.folder);
        sweep::remove(&self.folder)?;
        anyhow::ensure!(processes.is_empty(), "processes {processes:?}");
        anyhow::ensure!(mounted.is_empty(), "mounts {mounted:?}");
        Ok(())
    }
}
