//! skimmerd and containerd as services of a systemd.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::wait_for;
use skimmer_integration::containerd::{self, Version};
use skimmer_integration::ctr::Ctr;
use skimmer_integration::log_check::LogCheck;
use skimmer_integration::node;
use skimmer_integration::scenario::Scenario;
use skimmer_integration::skimmer::Skimmer;
use skimmer_integration::skimmerd::MountMode;
use skimmer_integration::systemd::{self, Systemd};
use skimmer_integration::tools;

use crate::units::unit;

pub const UNIT: &str = "skimmerd.service";
const HOLD: &str = "skimmer-hold.service";
/// containerd's folder, inside: beside skimmer's, as on any node, so that blobs can be linked.
const CONTAINERD: &str = "/var/lib/containerd";

/// How skimmerd is a service.
pub struct Service {
    pub mode: MountMode,
    /// Whether the holder keeps descriptors, and not systemd.
    pub holder: bool,
    /// Whether it starts with systemd.
    pub enabled: bool,
    /// Added to its configuration.
    pub more: String,
    pub containerd: containerd::Setup,
}

impl Service {
    /// It starts with systemd, which keeps its descriptors.
    pub fn new(mode: MountMode) -> Self {
        Self {
            mode,
            holder: false,
            enabled: true,
            more: String::new(),
            containerd: containerd::Setup::default(),
        }
    }
}

/// Both daemons as services; they end when this is dropped.
pub struct Daemons {
    pub systemd: Systemd,
    pub skimmer: Skimmer,
    pub containerd: Ctr,
}

impl Daemons {
    /// skimmerd serves, and containerd is to be started.
    pub fn start(scenario: &Scenario, service: &Service) -> anyhow::Result<Self> {
        let systemd = Systemd::start(scenario, &setup(scenario, service)?)?;
        let folder = systemd.folder("lib").join("containerd");
        let daemons = Self {
            skimmer: Skimmer::at(systemd.folder("run").join("skimmer/skimmerd.sock")),
            containerd: Ctr::new(Version::V2, folder, scenario.hosts()).inside(systemd.enter()),
            systemd,
        };
        LogCheck::of(scenario, "skimmerd");
        if service.holder {
            LogCheck::of(scenario, "skimmer-hold");
            daemons.hold()?;
        }
        if !service.enabled {
            daemons.systemd.systemctl(&["start", UNIT])?;
        }
        daemons.wait_serving("0")?;
        Ok(daemons)
    }

    /// Starts containerd, and waits until it reaches skimmerd.
    pub fn start_containerd(&self) -> anyhow::Result<()> {
        // It would make its folder for root alone: the root of a container has to get through.
        std::fs::create_dir_all(self.containerd.folder().join("cni"))?;
        self.systemd.systemctl(&["start", "containerd.service"])?;
        node::wait_connected(&self.containerd.address())
    }

    /// Starts the holder, and waits until it listens.
    fn hold(&self) -> anyhow::Result<()> {
        self.systemd.systemctl(&["start", HOLD])?;
        let address = self.systemd.folder("run").join("skimmer/hold.sock");
        wait_for("the holder listens", Duration::from_secs(10), || address.exists().then_some(()))
    }

    /// Everything that skimmerd keeps.
    pub fn root(&self) -> PathBuf {
        self.systemd.folder("lib").join("skimmer")
    }

    /// skimmerd's process, inside; `0` if there is none.
    pub fn main(&self) -> anyhow::Result<String> {
        self.systemd.property(UNIT, "MainPID")
    }

    /// `kill -9` of skimmerd.
    pub fn kill(&self) -> anyhow::Result<()> {
        self.systemd.systemctl(&["kill", "--signal=KILL", "--kill-whom=main", UNIT]).map(drop)
    }

    /// Waits until skimmerd serves, as another process than `before`.
    pub fn wait_serving(&self, before: &str) -> anyhow::Result<()> {
        let served = wait_for("the unit serves", Duration::from_secs(20), || {
            let is_new = self.main().is_ok_and(|main| main != "0" && main != before);
            is_new.then(|| UnixStream::connect(self.skimmer.address()).ok()).flatten()
        });
        served.map(drop).with_context(|| {
            let state = self.systemd.systemctl(&["show", UNIT]);
            let of_interest = |line: &&str| {
                ["Active", "Result", "Exec", "NRestarts"]
                    .iter()
                    .any(|start| line.starts_with(start))
            };
            let state = state.unwrap_or_else(|error| format!("{error:#}"));
            state.lines().filter(of_interest).collect::<Vec<_>>().join("\n")
        })
    }

    /// How many descriptors systemd keeps.
    pub fn descriptors(&self) -> anyhow::Result<usize> {
        Ok(self.systemd.property(UNIT, "NFileDescriptorStore")?.parse()?)
    }

    /// How many FUSE mounts the holder keeps.
    pub fn held(&self) -> anyhow::Result<usize> {
        let mut held = 0;
        for process in self.systemd.processes(HOLD)? {
            let open = std::fs::read_dir(format!("/proc/{process}/fd"))?.flatten();
            let files = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
            held += files.filter(|file| file.ends_with("dev/fuse")).count();
        }
        Ok(held)
    }
}

/// docker's `config.json` of skimmerd.
pub fn docker_config(scenario: &Scenario) -> PathBuf {
    scenario.path("config.json")
}

/// The units as they are installed; apart from where they log to, and from the holder's `/tmp`,
/// nothing of them is changed.
fn setup(scenario: &Scenario, service: &Service) -> anyhow::Result<systemd::Setup> {
    let logs = scenario.logs();
    let log = |name: &str| {
        let path = logs.join(name).display().to_string();
        format!("StandardOutput=append:{path}.out\nStandardError=append:{path}.log\n")
    };
    let programs = Version::V2.folder()?.join("usr/bin").display().to_string();
    Ok(systemd::Setup {
        units: vec![
            (UNIT, std::fs::read_to_string(unit(UNIT))?),
            ("skimmerd.service.d/log.conf", format!("[Service]\n{}", log("skimmerd"))),
            (HOLD, std::fs::read_to_string(unit(HOLD))?),
            (
                "skimmer-hold.service.d/log.conf",
                // A folder that is made for it alone would outlive a systemd that is killed.
                format!("[Service]\nPrivateTmp=no\n{}", log("skimmer-hold")),
            ),
            (
                "containerd.service",
                format!(
                    "[Service]\n\
                     ExecStart={programs}/containerd --config /etc/containerd/config.toml\n\
                     Delegate=yes\nEnvironment=PATH={programs}:/usr/sbin:/usr/bin\n{}",
                    log("containerd"),
                ),
            ),
        ],
        enabled: if service.enabled { vec![UNIT] } else { Vec::new() },
        etc: vec![
            ("skimmer/skimmerd.toml", skimmerd_configuration(scenario, service)),
            ("containerd/config.toml", containerd_configuration(scenario, service)),
        ],
        programs: vec![tools::built("skimmerd")?],
    })
}

/// skimmerd's configuration.
fn skimmerd_configuration(scenario: &Scenario, service: &Service) -> String {
    format!(
        "[containerd]\naddress = '{CONTAINERD}/c.sock'\n\
         [registry]\nconfig_path = '{hosts}'\ndocker_config = '{docker}'\n\
         [index]\nmin_layer_bytes = 0\n[mount]\nmode = '{mode}'\nkeeper = '{keeper}'\n\
         [background]\nenabled = false\n[metrics]\naddress = ''\n[log]\nformat = 'json'\n{more}",
        hosts = scenario.hosts().display(),
        docker = docker_config(scenario).display(),
        mode = service.mode.name(),
        keeper = if service.holder { "holder" } else { "auto" },
        more = service.more,
    )
}

/// containerd's configuration.
fn containerd_configuration(scenario: &Scenario, service: &Service) -> String {
    let setup = containerd::Setup {
        skimmer: Some("/run/skimmer/skimmerd.sock".into()),
        ..service.containerd.clone()
    };
    let folder = Path::new(CONTAINERD);
    containerd::configuration(Version::V2, folder, &scenario.hosts(), &setup)
}
