//! A private containerd of one of three versions.
//!
//! Facts it builds on: no systemd is needed; with cgroup v1 or v2, `ctr run` and CRI put their cgroups at
//! `/<namespace>/<id>` and runc makes them. The shim is found on `PATH`, so its own version's folder comes first
//! there. runc's state would be in `/run/containerd/runc` for everyone: it is told to keep it in the scenario.
//! A pod on the host's network needs no CNI configuration; containerd logs one error about that at start.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;

use crate::ctr::Ctr;
use crate::network::{self, Host};
use crate::process::Process;
use crate::scenario::Scenario;
use crate::{command, sweep, tools};

/// The versions of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// Debian 12's 1.6
    V1_6,
    /// Debian 13's 1.7
    V1_7,
    /// Debian sid's 2.x, at least 2.1
    V2,
}

/// All of them.
pub const VERSIONS: [Version; 3] = [Version::V1_6, Version::V1_7, Version::V2];

impl Version {
    /// Its folder, with `usr/bin` below.
    pub fn folder(self) -> anyhow::Result<&'static Path> {
        let folders = tools::containerds()?;
        folders
            .get(self as usize)
            .map(PathBuf::as_path)
            .with_context(|| format!("no containerd {self:?}"))
    }

    /// Its number, such as `1.6.20`.
    pub fn number(self) -> anyhow::Result<String> {
        let name = self
            .folder()?
            .file_name()
            .context("containerd has no folder")?
            .to_string_lossy()
            .into_owned();
        Ok(name.trim_start_matches("containerd-").to_owned())
    }

    /// Whether `ctr image pull` goes through the transfer service unless told otherwise.
    pub fn has_transfer_service(self) -> bool {
        self == Self::V2
    }
}

/// How a containerd is set up.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// skimmerd's snapshot socket, registered as the snapshotter `skimmer`.
    pub skimmer: Option<PathBuf>,
    /// CRI is on, with this pause image.
    pub pause_image: Option<String>,
    /// CRI uses skimmer and hands image annotations to it, and the transfer service does too.
    pub annotations: bool,
    /// skimmer maps the ids of containers in user namespaces: containerd leaves them to it.
    pub remap_ids: bool,
    /// CRI uses overlayfs, skimmer or not.
    pub plain_pods: bool,
    /// Added to the generated configuration.
    pub more: String,
    /// This configuration instead of a generated one.
    pub configuration: Option<String>,
}

/// A running containerd, and [its client](Ctr).
pub struct Containerd {
    process: Option<Process>,
    client: Ctr,
    logs: PathBuf,
    program: Vec<String>,
}

/// Where a containerd called `name` of `scenario` listens, before it runs.
pub fn address_of(scenario: &Scenario, name: &str) -> PathBuf {
    scenario.path(name).join("c.sock")
}

impl Containerd {
    /// A containerd with its own snapshotters only.
    pub fn start(scenario: &Scenario, version: Version) -> anyhow::Result<Self> {
        Self::start_with(scenario, "containerd", version, &Setup::default())
    }

    pub fn start_with(
        scenario: &Scenario,
        name: &str,
        version: Version,
        setup: &Setup,
    ) -> anyhow::Result<Self> {
        Self::start_on(scenario, name, version, setup, None)
    }

    /// The same, on `host` if given.
    pub fn start_on(
        scenario: &Scenario,
        name: &str,
        version: Version,
        setup: &Setup,
        host: Option<&Host>,
    ) -> anyhow::Result<Self> {
        let folder = scenario.path(name);
        std::fs::create_dir_all(folder.join("cni"))?;
        let text = match &setup.configuration {
            Some(text) => text.clone(),
            None => configuration(version, &folder, &scenario.hosts(), setup) + &setup.more,
        };
        std::fs::write(folder.join("config.toml"), text)?;
        let program = version.folder()?.join("usr/bin/containerd").display().to_string();
        let mut containerd = Self {
            process: None,
            client: Ctr::new(version, folder, scenario.hosts()),
            logs: scenario.logs(),
            program: network::program_on(host, &program),
        };
        containerd.run()?;
        Ok(containerd)
    }

    /// What it logged.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// Kills it; containers go on.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.take().map_or(Ok(()), |mut process| process.kill())
    }

    /// Starts it, again or for the first time.
    pub fn run(&mut self) -> anyhow::Result<()> {
        let mut process = self.begin()?;
        let address = self.address();
        process.wait_ready("containerd serves", Duration::from_secs(30), || {
            // `version` answers only once every plugin is up.
            let mut probe = self.ctr().ok()?;
            address
                .exists()
                .then(|| command::output_of(probe.arg("version"), Duration::from_secs(5)).ok())
                .flatten()
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Starts it and kills it `after` that, which may be before it serves.
    pub fn run_briefly(&mut self, after: Duration) -> anyhow::Result<()> {
        self.begin()?.kill_after(after)
    }

    fn begin(&self) -> anyhow::Result<Process> {
        let programs = self.version().folder()?.join("usr/bin");
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]).arg("--config").arg(self.folder().join("config.toml"));
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", programs.display()));
        let name = self.folder().file_name().context("containerd has no name")?;
        Process::start(&name.to_string_lossy(), &command, &self.logs)
    }
}

impl Deref for Containerd {
    type Target = Ctr;

    fn deref(&self) -> &Ctr {
        &self.client
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.process = None;
        // Containers and shims outlive containerd; they name its socket or live below its folder.
        sweep::folder(self.folder());
    }
}

/// containerd's configuration, which differs between versions (see containerd's `docs/cri/config.md`).
pub fn configuration(version: Version, folder: &Path, hosts: &Path, setup: &Setup) -> String {
    let base = folder.display();
    let common = format!(
        "root = '{base}/root'\nstate = '{base}/state'\n\
         {disabled}\n\
         [grpc]\naddress = '{base}/c.sock'\n\
         [plugins.'io.containerd.internal.v1.opt']\npath = '{base}/opt'\n\
         [plugins.'io.containerd.gc.v1.scheduler']\nstartup_delay = '100ms'\n",
        disabled = disabled(version, setup),
    );
    let specific = match version {
        Version::V1_6 | Version::V1_7 => configuration_1(base, hosts, setup),
        Version::V2 => configuration_2(base, hosts, setup),
    };
    let number = if version == Version::V2 { 3 } else { 2 };
    format!("version = {number}\n{common}{specific}")
}

fn disabled(version: Version, setup: &Setup) -> String {
    let names: &[&str] = match (version, setup.pause_image.is_some()) {
        (_, true) => &[],
        (Version::V2, false) => &[
            "io.containerd.grpc.v1.cri",
            "io.containerd.cri.v1.images",
            "io.containerd.cri.v1.runtime",
        ],
        (_, false) => &["io.containerd.grpc.v1.cri"],
    };
    format!("disabled_plugins = {names:?}")
}

fn proxy_plugin(socket: &Path, setup: &Setup) -> String {
    let address = socket.display();
    let capabilities = if setup.remap_ids { "capabilities = ['remap-ids']\n" } else { "" };
    format!("[proxy_plugins.skimmer]\ntype = 'snapshot'\naddress = '{address}'\n{capabilities}")
}

fn cri_snapshotter(setup: &Setup) -> &'static str {
    if setup.skimmer.is_some() && !setup.plain_pods { "skimmer" } else { "overlayfs" }
}

fn configuration_1(base: std::path::Display<'_>, hosts: &Path, setup: &Setup) -> String {
    let mut text = String::new();
    if let Some(socket) = &setup.skimmer {
        text += &proxy_plugin(socket, setup);
    }
    if let Some(pause) = &setup.pause_image {
        text += &format!(
            "[plugins.'io.containerd.grpc.v1.cri']\n\
             sandbox_image = '{pause}'\ndisable_apparmor = true\nrestrict_oom_score_adj = true\n\
             [plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '{hosts}'\n\
             [plugins.'io.containerd.grpc.v1.cri'.cni]\nconf_dir = '{base}/cni'\n\
             [plugins.'io.containerd.grpc.v1.cri'.containerd]\n\
             snapshotter = '{snapshotter}'\ndisable_snapshot_annotations = {quiet}\n\
             [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
             [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]\nRoot = '{base}/runc'\n",
            hosts = hosts.display(),
            snapshotter = cri_snapshotter(setup),
            quiet = !setup.annotations,
        );
    }
    text
}

fn configuration_2(base: std::path::Display<'_>, hosts: &Path, setup: &Setup) -> String {
    let mut text = "[plugins.'io.containerd.nri.v1.nri']\ndisable = true\n".to_owned();
    let mut snapshotters = vec!["overlayfs"];
    if let Some(socket) = &setup.skimmer {
        text += &proxy_plugin(socket, setup);
        if setup.annotations {
            text +=
                "[proxy_plugins.skimmer.exports]\nenable_remote_snapshot_annotations = 'true'\n";
        }
        snapshotters.push("skimmer");
    }
    for name in snapshotters {
        text += &format!(
            "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n\
             platform = 'linux/amd64'\nsnapshotter = '{name}'\ndiffer = ''\n"
        );
    }
    if let Some(pause) = &setup.pause_image {
        text += &format!(
            "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = '{snapshotter}'\n\
             [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = '{pause}'\n\
             [plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '{hosts}'\n\
             [plugins.'io.containerd.cri.v1.runtime']\ndisable_apparmor = true\nrestrict_oom_score_adj = true\n\
             [plugins.'io.containerd.cri.v1.runtime'.cni]\nconf_dir = '{base}/cni'\n\
             [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
             [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]\nRoot = '{base}/runc'\n",
            hosts = hosts.display(),
            snapshotter = cri_snapshotter(setup),
        );
    }
    text
}
