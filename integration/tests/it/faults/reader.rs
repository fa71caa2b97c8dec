//! A container that reads every byte of its image's files, over and over, and compares them with what they should be.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use skimmer_integration::command;
use skimmer_integration::ctr::Ctr;
use skimmer_integration::skimmerd::MountMode;

use super::images::Known;
use super::load::COMMAND_LIMIT;

/// How it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through the page cache, which [`Reader::forget`] empties.
    Cached,
    /// Past the page cache: every read is the file system's. EROFS over files, as the kernel's mounts are, refuses to open
    /// files so: where the kernel serves all, reads go through it.
    Direct,
}

/// What it runs. `/said` is the host's: `sums` says what to find, `go` lets it begin, `rounds` counts what it has read from end
/// to end, `wrong` says what shouldn't be. Its own disk may be full.
const SCRIPT: &str = r#"
set -o pipefail
say() { echo "$*" >>/said/wrong; }
while [ ! -e /said/go ]; do sleep 0.05; done
rounds=0
while :; do
  while read -r sum path; do
    if found=$({ READ; } 2>/said/errors); then
      [ "${found%% *}" = "$sum" ] || say "$path: $found INSTEAD $sum"
    else
      say "$path: $(cat /said/errors)"
    fi
  done </said/sums
  rounds=$((rounds + 1))
  if echo $rounds >/tmp/new 2>/dev/null && busybox mv /tmp/new /tmp/own; then
    [ "$(cat /tmp/own)" = $rounds ] || say "its own file lost $rounds"
  fi
  echo $rounds >/said/rounds.new
  busybox mv /said/rounds.new /said/rounds
  sleep 0.05
done
"#;

/// What it says between bytes that it found and those that should be there.
const INSTEAD: &str = "instead of";

const CACHED: &str = "busybox sha256sum <$path";

impl Way {
    fn script(self) -> String {
        let read = match self {
            Self::Cached => CACHED,
            Self::Direct if MountMode::of_this_run() == MountMode::Kernel => CACHED,
            Self::Direct => "dd if=$path bs=1M iflag=direct | busybox sha256sum",
        };
        SCRIPT.replace("READ", read).replace("INSTEAD", INSTEAD)
    }
}

/// A container, started and not removed.
pub struct Reader {
    id: String,
    /// The host's side of its `/said`.
    said: PathBuf,
    sums: String,
}

impl Reader {
    /// Starts the container `id` of an image that was pulled. It begins to read when it is [told](Self::go).
    pub fn start(
        ctr: &Ctr,
        known: &Known,
        id: &str,
        way: Way,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let said = folder.join(id);
        fs::create_dir_all(&said)?;
        let sums = known.sums();
        fs::write(said.join("sums"), &sums)?;
        let mut call = ctr.ctr()?;
        call.args(["run", "--detach", "--null-io", "--snapshotter", "skimmer", "--runc-root"]);
        call.arg(ctr.runc_root());
        let shared = format!("type=bind,src={},dst=/said,options=rbind:rw", said.display());
        call.args(["--mount", &shared, &known.reference, id, "sh", "-c", &way.script()]);
        command::output_of(&mut call, COMMAND_LIMIT)?;
        Ok(Self { id: id.to_owned(), said, sums })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Lets it begin.
    pub fn go(&self) -> anyhow::Result<()> {
        fs::write(self.said.join("go"), "").context("let a reader begin")
    }

    /// How often it has read everything.
    pub fn rounds(&self) -> u64 {
        let text = fs::read_to_string(self.said.join("rounds")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// Fails if it found other bytes, or was told of an error.
    pub fn check(&self) -> anyhow::Result<()> {
        let wrong = self.wrong();
        anyhow::ensure!(wrong.is_empty(), "{} found:\n{wrong}", self.id);
        Ok(())
    }

    fn wrong(&self) -> String {
        fs::read_to_string(self.said.join("wrong")).unwrap_or_default()
    }

    /// Whether it was told of errors, or died of one; fails if it found other bytes.
    pub fn was_told(&self, ctr: &Ctr) -> anyhow::Result<bool> {
        let wrong = self.wrong();
        only_errors(&wrong).with_context(|| self.id.clone())?;
        Ok(!wrong.is_empty() || self.task(ctr)?.last().is_none_or(|status| status != "RUNNING"))
    }

    /// Waits until it has read everything once, or fails as [`check`](Self::check) does.
    pub fn wait_round(&self, limit: Duration) -> anyhow::Result<()> {
        command::wait_for("a container has read its files", limit, || {
            (self.rounds() > 0 || self.check().is_err()).then_some(())
        })?;
        self.check()
    }

    /// The files that it reads, opened in its own file system.
    pub fn open(&self, ctr: &Ctr) -> anyhow::Result<Vec<File>> {
        let root = format!("/proc/{}/root", self.process(ctr)?);
        let paths = self.sums.lines().filter_map(|line| line.split(' ').nth(1));
        paths
            .map(|path| File::open(format!("{root}{path}")).with_context(|| format!("open {path}")))
            .collect()
    }

    /// The process id of its program.
    fn process(&self, ctr: &Ctr) -> anyhow::Result<u32> {
        let task = self.task(ctr)?;
        task.get(1).context("a task without a process")?.parse().context("a process id")
    }

    /// What containerd lists of it: its id, its process and its status.
    fn task(&self, ctr: &Ctr) -> anyhow::Result<Vec<String>> {
        let tasks = command::output_of(ctr.ctr()?.args(["task", "list"]), COMMAND_LIMIT)?;
        let words = |line: &str| line.split_ascii_whitespace().map(str::to_owned).collect();
        let mut lines = tasks.lines().map(words);
        let own = |words: &Vec<String>| words.first() == Some(&self.id);
        lines.find(own).with_context(|| format!("{} is not in {tasks}", self.id))
    }
}

/// Fails if, of what readers said, anything is about bytes.
pub fn only_errors(said: &str) -> anyhow::Result<()> {
    anyhow::ensure!(!said.contains(INSTEAD), "other bytes:\n{said}");
    Ok(())
}

/// Has the kernel forget what it has of open files, so that the next read is the file system's.
pub fn forget(files: &[File]) {
    for file in files {
        // What is being read at the moment stays.
        let _ = posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}
