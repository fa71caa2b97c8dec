//! A systemd newer than this machine's, process 1 of namespaces of its own.
//!
//! Facts it builds on: with Debian 13's `usr` laid over this machine's, its systemd finds its libraries and this
//! machine's programs go on working, as libraries only get newer. A control group of version 2 needs no controllers,
//! so it may be a branch of a hierarchy that this machine has beside those of version 1. `/run`, `/var/lib` and
//! `/usr/local/bin` are folders of the scenario, which is seen from inside and outside at the same path; mounts made
//! inside are not seen outside. The network is this machine's. The only units are those that it is given.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{self, PATIENCE, wait_for};
use crate::mounts::{self, Mounted};
use crate::process::Process;
use crate::scenario::Scenario;
use crate::{sweep, tools};

/// What it is given; files by their names.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    pub units: Vec<(&'static str, String)>,
    /// Units that are started when it starts.
    pub enabled: Vec<&'static str>,
    /// Below `/etc`.
    pub etc: Vec<(&'static str, String)>,
    /// Copied to `/usr/local/bin`.
    pub programs: Vec<PathBuf>,
}

/// A running systemd; whatever runs in its namespaces ends with it when it is dropped.
pub struct Systemd {
    process: Option<Process>,
    /// Of its process 1, outside.
    id: Pid,
    folder: PathBuf,
    groups: Groups,
}

/// What its units need to be there.
const TARGETS: [&str; 4] = ["sysinit.target", "basic.target", "shutdown.target", DEFAULT];
const DEFAULT: &str = "default.target";

const NAMESPACES: [&str; 9] = [
    "unshare",
    "--cgroup",
    "--ipc",
    "--mount",
    "--pid",
    "--uts",
    "--fork",
    "--kill-child",
    "--mount-proc",
];

/// Its arguments: the folder of this systemd, and Debian 13's `usr`. Mounts of other scenarios are not to last as long
/// as these namespaces.
const BOOT: &str = r#"
set -e
for at in $(cut -d ' ' -f 5 /proc/self/mountinfo); do
  case $at in "${1%/*}"/*) ;; */skit-*) umount -l "$at" 2>/dev/null || true ;; esac
done
mount -t overlay overlay -o "lowerdir=$2:/usr" /usr
mount -t overlay overlay -o "lowerdir=$1/etc:/etc" /etc
mount --bind "$1/bin" /usr/local/bin
mount --bind "$1/run" /run
mount --bind "$1/lib" /var/lib
mount --bind /dev/null /dev/console
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env -i PATH="$PATH" container=skimmer SYSTEMD_UNIT_PATH="/run/systemd/system:$1/units" \
  SYSTEMD_GENERATOR_PATH= /usr/lib/systemd/systemd
"#;

impl Systemd {
    /// Why there can't be one here, if so: a container may forbid what it needs.
    pub fn impossible() -> Option<String> {
        let tried = "mount -t overlay overlay -o lowerdir=/usr:/etc /usr && mount -t cgroup2 cgroup2 /sys/fs/cgroup";
        let mut call = Command::new(NAMESPACES[0]);
        call.args(&NAMESPACES[1..]).args(["sh", "-c", tried]);
        command::output_of(&mut call, PATIENCE).err().map(|error| format!("{error:#}"))
    }

    pub fn start(scenario: &Scenario, setup: &Setup) -> anyhow::Result<Self> {
        let folder = scenario.path("systemd");
        for name in ["bin", "etc", "lib", "run", "units"] {
            fs::create_dir_all(folder.join(name))?;
        }
        for target in TARGETS {
            fs::write(folder.join("units").join(target), "[Unit]\nDefaultDependencies=no\n")?;
        }
        for (below, files) in [("units", &setup.units), ("etc", &setup.etc)] {
            for (name, text) in files {
                let path = folder.join(below).join(name);
                fs::create_dir_all(path.parent().context("a file has no folder")?)?;
                fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            }
        }
        let wants = folder.join("units").join(format!("{DEFAULT}.wants"));
        fs::create_dir_all(&wants)?;
        for name in &setup.enabled {
            symlink(Path::new("..").join(name), wants.join(name))?;
        }
        for program in &setup.programs {
            let name = program.file_name().context("a program has no name")?;
            fs::copy(program, folder.join("bin").join(name))?;
        }
        let groups = Groups::new(scenario)?;
        let usr = tools::script("systemd")?.pop().context("there is no systemd")? + "/usr";
        let join = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", groups.own.display());
        let mut boot = Command::new("sh");
        boot.args(["-c", &join, "sh"]).args(NAMESPACES).args(["sh", "-c", BOOT, "sh"]);
        boot.arg(&folder).arg(usr);
        let mut process = Process::start("systemd", &boot, &scenario.logs())?;
        let children = format!("/proc/{0}/task/{0}/children", process.id());
        let id = process.wait_ready("systemd is forked", PATIENCE, || {
            fs::read_to_string(&children).ok()?.trim().parse().ok().map(Pid::from_raw)
        })?;
        let mut systemd = Self { process: None, id, folder, groups };
        let mut probe = systemd.command("systemctl");
        probe.args(["is-system-running"]);
        process.wait_ready("systemd runs", Duration::from_secs(30), || {
            command::output_of(&mut probe, PATIENCE).ok()
        })?;
        systemd.process = Some(process);
        Ok(systemd)
    }

    /// The folder that is `/<name>`, `/var/<name>` or `/usr/local/<name>` for it.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// To begin the command line of a program that is to run inside.
    pub fn enter(&self) -> Vec<String> {
        ["nsenter", "--target", &self.id.to_string(), "--all", "--"].map(str::to_owned).to_vec()
    }

    /// A call of `program`, to run inside.
    pub fn command(&self, program: &str) -> Command {
        let enter = self.enter();
        let mut command = Command::new(&enter[0]);
        command.args(&enter[1..]).arg(program);
        command
    }

    /// Runs systemctl(1).
    pub fn systemctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut call = self.command("systemctl");
        command::output_of(call.arg("--no-pager").args(arguments), PATIENCE)
    }

    /// A property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> anyhow::Result<String> {
        let said = self.systemctl(&["show", "--value", "--property", name, "--", unit])?;
        Ok(said.trim().to_owned())
    }

    /// The processes of a service, by their ids outside.
    pub fn processes(&self, unit: &str) -> anyhow::Result<Vec<Pid>> {
        let path = self.groups.own.join("system.slice").join(unit).join("cgroup.procs");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        text.lines().map(|id| Ok(Pid::from_raw(id.parse()?))).collect()
    }

    /// What is mounted inside, below `folder`: lines of mountinfo.
    pub fn mounts(&self, folder: &Path) -> anyhow::Result<Vec<String>> {
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", self.id))?;
        let is_below = |line: &&str| {
            line.split(' ').nth(4).is_some_and(|path| Path::new(path).starts_with(folder))
        };
        Ok(table.lines().filter(is_below).map(str::to_owned).collect())
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // The kernel ends whatever is in the namespace before it lets go of process 1.
        let _ = kill(self.id, Signal::SIGKILL);
        let own = PathBuf::from(format!("/proc/{}", self.id));
        let _ = wait_for("systemd ends", Duration::from_secs(30), || (!own.exists()).then_some(()));
        self.process = None;
    }
}

/// Control groups below one of the scenario's name, in a hierarchy mounted in its folder.
struct Groups {
    own: PathBuf,
    _hierarchy: Mounted,
}

/// Where the hierarchy is mounted, in a scenario's folder.
const HIERARCHY: &str = "cgroup";

impl Groups {
    fn new(scenario: &Scenario) -> anyhow::Result<Self> {
        let hierarchy = mounts::mount("cgroup2", "cgroup2", &[], &scenario.path(HIERARCHY))?;
        let own = own_groups(scenario.folder());
        fs::create_dir(&own).with_context(|| format!("create {}", own.display()))?;
        Ok(Self { own, _hierarchy: hierarchy })
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        remove_groups(&self.own);
    }
}

fn own_groups(scenario: &Path) -> PathBuf {
    scenario.join(HIERARCHY).join(scenario.file_name().unwrap_or_default())
}

/// Removes the control groups that the scenario in `folder` made, if it did and their processes have ended.
pub(crate) fn sweep_groups(folder: &Path) {
    remove_groups(&own_groups(folder));
}

fn remove_groups(folder: &Path) {
    for child in sweep::children(folder).into_iter().filter(|child| child.is_dir()) {
        remove_groups(&child);
    }
    // What can't be removed is in use; the scenario says so.
    let _ = fs::remove_dir(folder);
}
