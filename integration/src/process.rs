//! A long-running program of a test: its output goes to a file, and it never outlives its owner.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::wait_for;

/// A running program; killed when dropped, or by the kernel when the thread that started it ends.
pub struct Process {
    name: String,
    child: Child,
    stderr: PathBuf,
}

impl Process {
    /// Starts `command`, its standard output in `<logs>/<name>.out`, its standard error in `<logs>/<name>.log`;
    /// both are appended to, so that a restarted program keeps the log of its earlier life.
    pub fn start(name: &str, command: &Command, logs: &Path) -> anyhow::Result<Self> {
        let stderr = logs.join(format!("{name}.log"));
        let open = |path: &Path| -> anyhow::Result<File> {
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("open {}", path.display()))
        };
        // setpriv asks for the death signal and then becomes the program, so the process id is the program's.
        let mut wrapped = Command::new("setpriv");
        wrapped
            .args(["--pdeathsig", "KILL", "--"])
            .arg(command.get_program())
            .args(command.get_args());
        for (key, value) in command.get_envs() {
            wrapped.env(key, value.unwrap_or(OsStr::new("")));
        }
        let child = wrapped
            .stdin(Stdio::null())
            .stdout(open(&logs.join(format!("{name}.out")))?)
            .stderr(open(&stderr)?)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self { name: name.to_owned(), child, stderr })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to standard error so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.stderr)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Waits until `ready` gives a value, which it never will once the program has ended.
    pub fn wait_ready<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut ready: impl FnMut() -> Option<T>,
    ) -> anyhow::Result<T> {
        let mut ended = None;
        let result = wait_for(what, limit, || {
            ended = self.child.try_wait().ok().flatten();
            if ended.is_some() { Some(None) } else { ready().map(Some) }
        });
        match (result, ended) {
            (Ok(Some(value)), _) => Ok(value),
            (_, Some(status)) => {
                anyhow::bail!("{} ended ({status}) before {what}:\n{}", self.name, self.tail())
            }
            (Err(error), _) => Err(error.context(format!("{} says:\n{}", self.name, self.tail()))),
            (Ok(None), None) => anyhow::bail!("{} is neither running nor ended", self.name),
        }
    }

    /// Kills it at once, as a crash would.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().with_context(|| format!("kill {}", self.name))?;
        self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }

    /// Kills it `after` some time, wherever it is by then; it mustn't have ended by itself.
    pub fn kill_after(&mut self, after: Duration) -> anyhow::Result<()> {
        std::thread::sleep(after);
        let ended = self.child.try_wait().with_context(|| format!("look at {}", self.name))?;
        if let Some(status) = ended {
            anyhow::bail!("{} ended by itself ({status}):\n{}", self.name, self.tail());
        }
        self.kill()
    }

    /// Asks it to end and waits for that.
    pub fn terminate(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let id = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(id, Signal::SIGTERM).with_context(|| format!("terminate {}", self.name))?;
        let name = self.name.clone();
        wait_for(&format!("{name} ends after SIGTERM"), limit, || {
            self.child.try_wait().ok().flatten()
        })
        .with_context(|| format!("{name} says:\n{}", self.tail()))
    }

    fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A process that has ended already is what was wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
