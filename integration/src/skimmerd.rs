//! The node daemon under test, and the `skimmer` command that asks it.

use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use skimmer_proto::Digest;

use crate::command::{self, PATIENCE};
use crate::image::Image;
use crate::log_check::LogCheck;
use crate::network::{self, Host};
use crate::process::Process;
use crate::scenario::Scenario;
use crate::skimmer::Skimmer;
use crate::tools;

/// What differs from the configuration that tests use.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Smaller layers are always pulled through. Zero here, so that tiny test layers are lazy too.
    pub min_layer_bytes: u64,
    pub trust_toc: bool,
    pub quota_bytes: u64,
    /// Whether lazily mounted layers are completed; off, so that what was fetched is what was needed.
    pub background: Option<Duration>,
    pub prepare_wait: Duration,
    pub deadline: Duration,
    pub docker_config: Option<PathBuf>,
    /// The folder where it finds credential helpers, before those of this machine.
    pub helpers: Option<PathBuf>,
    /// kubelet's CredentialProviderConfig, and the folder of its programs.
    pub credential_providers: Option<(PathBuf, PathBuf)>,
    /// Whether CRI's image service is served, and how.
    pub images: Option<ImageService>,
    /// Complete images are put into containerd's content store.
    pub materialize: bool,
    /// What it logs.
    pub log_level: &'static str,
    /// Stands alone if there is none.
    pub cluster: Option<Join>,
    /// Where it serves its metrics; empty: nowhere.
    pub metrics: String,
    /// What it may do of what root may (capabilities(7), without `CAP_`), if not everything.
    pub capabilities: Option<Vec<String>>,
    /// The `cgroup.procs` of the cgroup that it runs in, if not its starter's.
    pub memory: Option<PathBuf>,
    /// Whether a holder keeps the descriptors of its mounts.
    pub holder: bool,
    /// Who serves its mounts, if that isn't left to the whole run of tests (`SKIMMER_TEST_MOUNT_MODE`).
    pub mounts: Option<MountMode>,
    /// Whether the kernel may be asked to send again what a dead daemon left unanswered.
    pub resend: bool,
}

/// CRI's image service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageService {
    /// Blobs are brought into containerd before it pulls.
    pub full: bool,
    /// The credentials of pulls are remembered.
    pub remembers: bool,
}

impl ImageService {
    pub const FULL: Self = Self { full: true, remembers: true };
}

impl Default for ImageService {
    fn default() -> Self {
        Self { full: false, remembers: true }
    }
}

/// `mount.mode`, as far as it makes a difference here: no systemd keeps descriptors in tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountMode {
    /// skimmerd serves incomplete layers, the kernel complete ones.
    Auto,
    /// skimmerd serves all.
    Fuse,
    /// The kernel serves all, incomplete ones too. A holder keeps what it needs.
    Kernel,
}

impl MountMode {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fuse => "fuse",
            Self::Kernel => "kernel",
        }
    }

    /// What the run of tests is about: `SKIMMER_TEST_MOUNT_MODE`, `auto` if it isn't set.
    pub fn of_this_run() -> Self {
        match std::env::var("SKIMMER_TEST_MOUNT_MODE").as_deref() {
            Ok("kernel") => Self::Kernel,
            Ok("fuse") => Self::Fuse,
            _ => Self::Auto,
        }
    }
}

impl Setup {
    fn mount_mode(&self) -> MountMode {
        self.mounts.unwrap_or_else(MountMode::of_this_run)
    }

    /// In the kernel's mode nothing starts without.
    fn has_holder(&self) -> bool {
        self.holder || self.mount_mode() == MountMode::Kernel
    }
}

/// How a node joins a cluster.
#[derive(Clone, Debug)]
pub struct Join {
    /// The manager's `host:port`.
    pub control_plane: String,
    pub token: String,
    pub zone: String,
    /// A multiaddr.
    pub listen: String,
    pub grace: Duration,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            min_layer_bytes: 0,
            trust_toc: false,
            quota_bytes: 0,
            background: None,
            prepare_wait: Duration::from_secs(60),
            deadline: Duration::from_secs(20),
            docker_config: None,
            helpers: None,
            credential_providers: None,
            images: None,
            materialize: false,
            log_level: "info",
            cluster: None,
            metrics: String::new(),
            capabilities: None,
            memory: None,
            holder: false,
            mounts: None,
            resend: true,
        }
    }
}

/// A running skimmerd, and [its client](Skimmer). The scenario fails if it logs a warning or an error that wasn't [expected](Self::expect_log).
pub struct Skimmerd {
    process: Option<Process>,
    holder: Option<Process>,
    client: Skimmer,
    metrics: String,
    has_images: bool,
    helpers: Option<PathBuf>,
    folder: PathBuf,
    logs: PathBuf,
    program: Vec<String>,
    expected: LogCheck,
}

/// Where the skimmerd called `name` of `scenario` listens, before it runs.
pub fn address_of(scenario: &Scenario, name: &str) -> PathBuf {
    scenario.path(name).join("s.sock")
}

impl Skimmerd {
    /// A daemon called `name` that works for the containerd at `containerd`, which may start later.
    pub fn start(
        scenario: &Scenario,
        name: &str,
        containerd: &Path,
        setup: &Setup,
    ) -> anyhow::Result<Self> {
        Self::start_on(scenario, name, containerd, setup, None)
    }

    /// The same, on `host` if given.
    pub fn start_on(
        scenario: &Scenario,
        name: &str,
        containerd: &Path,
        setup: &Setup,
        host: Option<&Host>,
    ) -> anyhow::Result<Self> {
        let folder = scenario.path(name);
        std::fs::create_dir_all(&folder)?;
        let mut text = configuration(&folder, &scenario.hosts(), containerd, setup);
        if let Some(images) = setup.images {
            text += &image_service(&folder, images);
        }
        if let Some(join) = &setup.cluster {
            std::fs::write(folder.join("token"), &join.token)?;
            text += &cluster(&folder, join);
        }
        std::fs::write(folder.join("config.toml"), text)?;
        let mut program =
            network::program_on(host, &tools::built("skimmerd")?.display().to_string());
        if let Some(capabilities) = &setup.capabilities {
            program.splice(0..0, confined(capabilities));
        }
        if let Some(members) = &setup.memory {
            program.splice(0..0, member_of(members));
        }
        let mut daemon = Self {
            process: None,
            holder: None,
            client: Skimmer::at(folder.join("s.sock")),
            metrics: setup.metrics.clone(),
            has_images: setup.images.is_some(),
            helpers: setup.helpers.clone(),
            folder,
            logs: scenario.logs(),
            program,
            expected: LogCheck::of(scenario, name),
        };
        if setup.has_holder() {
            daemon.hold()?;
        }
        daemon.run()?;
        Ok(daemon)
    }

    /// Warnings and errors that contain `part` are part of what is tested.
    pub fn expect_log(&self, part: &str) {
        self.expected.expect(part);
    }

    /// Where it serves CRI's image service, if it does.
    pub fn images(&self) -> PathBuf {
        self.folder.join("cri.sock")
    }

    /// Where it serves its metrics, if it does.
    pub fn metrics(&self) -> &str {
        &self.metrics
    }

    /// Everything it keeps.
    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// Its process id, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// The process id of its holder, while that runs.
    pub fn holder_id(&self) -> Option<u32> {
        self.holder.as_ref().map(Process::id)
    }

    /// What it logged, over all its lives.
    pub fn log(&self) -> String {
        let name = self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        std::fs::read_to_string(self.logs.join(format!("{name}.log"))).unwrap_or_default()
    }

    /// `kill -9`. Where nobody keeps its mounts the next one names the containers that lost theirs.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        if self.holder.is_none() {
            self.expect_log("nobody kept the mounts of its layers");
        }
        self.process.take().map_or(Ok(()), |mut process| process.kill())
    }

    /// SIGTERM, and its exit status has to be 0.
    pub fn terminate(&mut self) -> anyhow::Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        let status = process.terminate(Duration::from_secs(30))?;
        anyhow::ensure!(status.success(), "skimmerd ended with {status} after SIGTERM");
        Ok(())
    }

    /// The file of its configuration.
    pub fn config(&self) -> PathBuf {
        self.folder.join("config.toml")
    }

    /// Sets a key of its configuration, written as in TOML, for its next start.
    pub fn configure(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let text = std::fs::read_to_string(self.config())?;
        let is_key = |line: &str| line.split(' ').next() == Some(key);
        let count = text.lines().filter(|line| is_key(line)).count();
        anyhow::ensure!(count == 1, "the configuration has {count} lines of {key}");
        let line = |line: &str| {
            if is_key(line) { format!("{key} = {value}\n") } else { format!("{line}\n") }
        };
        std::fs::write(self.config(), text.lines().map(line).collect::<String>())?;
        Ok(())
    }

    /// The program with its configuration; a task may follow.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]).arg("--config").arg(self.config());
        if let Some(helpers) = &self.helpers {
            let path = std::env::var("PATH").unwrap_or_default();
            command.env("PATH", format!("{}:{path}", helpers.display()));
        }
        command
    }

    /// Starts the holder of its mounts' descriptors.
    pub fn hold(&mut self) -> anyhow::Result<()> {
        let mut command = self.command();
        command.arg("hold");
        let mut process = Process::start("holder", &command, &self.logs)?;
        let address = self.folder.join("hold.sock");
        process.wait_ready("the holder listens", Duration::from_secs(10), || {
            address.exists().then_some(())
        })?;
        self.holder = Some(process);
        Ok(())
    }

    /// `kill -9` of the holder.
    pub fn kill_holder(&mut self) -> anyhow::Result<()> {
        let killed = self.holder.take().map_or(Ok(()), |mut process| process.kill());
        // The next one is there when its socket is.
        std::fs::remove_file(self.folder.join("hold.sock"))?;
        killed
    }

    /// Starts it, again or for the first time.
    pub fn run(&mut self) -> anyhow::Result<()> {
        let mut process = self.begin()?;
        let sockets: Vec<PathBuf> =
            std::iter::once(self.address()).chain(self.has_images.then(|| self.images())).collect();
        process.wait_ready("skimmerd serves", Duration::from_secs(30), || {
            let connect = |socket| UnixStream::connect(socket).ok();
            sockets.iter().map(connect).collect::<Option<Vec<_>>>()
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// From its next start on its program is another file, as after an upgrade.
    pub fn replace_program(&mut self) -> anyhow::Result<()> {
        let own = self.program.last_mut().context("skimmerd has no program")?;
        let (new, next) = (self.folder.join("skimmerd"), self.folder.join("skimmerd.next"));
        std::fs::copy(&*own, &next).with_context(|| format!("copy {own}"))?;
        std::fs::rename(&next, &new)?;
        *own = new.display().to_string();
        Ok(())
    }

    /// Starts it and kills it `after` that, which may be before it serves.
    pub fn run_briefly(&mut self, after: Duration) -> anyhow::Result<()> {
        self.begin()?.kill_after(after)
    }

    fn begin(&self) -> anyhow::Result<Process> {
        let name = self.folder.file_name().context("skimmerd has no name")?;
        Process::start(&name.to_string_lossy(), &self.command(), &self.logs)
    }

    /// Forgets everything that was fetched and indexed; not running meanwhile.
    pub fn wipe(&mut self) -> anyhow::Result<()> {
        crate::mounts::unmount_below(&self.root());
        command::run("rm", ["-rf".as_ref(), self.root().as_os_str()])?;
        Ok(())
    }

    /// Writes the indexes of an image's layers, which it has, into `folder`.
    pub fn export_indexes(&self, image: &Image, folder: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder)?;
        for layer in &image.layers {
            let file = index_file(folder, &layer.blob.digest);
            let mut call = self.skimmer(&["index", "export", &layer.blob.digest.to_string()])?;
            command::output_of(call.arg(&file), PATIENCE)?;
        }
        Ok(())
    }
}

/// Where [`Skimmerd::export_indexes`] puts the index of the layer `blob`.
pub fn index_file(folder: &Path, blob: &Digest) -> PathBuf {
    folder.join(format!("{}.index", blob.hex()))
}

impl Deref for Skimmerd {
    type Target = Skimmer;

    fn deref(&self) -> &Skimmer {
        &self.client
    }
}

impl Drop for Skimmerd {
    fn drop(&mut self) {
        self.process = None;
        self.holder = None;
        // Its mounts outlive it by design.
        crate::mounts::unmount_below(&self.folder);
    }
}

/// setpriv(1), to begin the command line of a program that may do so much and gains nothing by programs it starts.
fn confined(capabilities: &[String]) -> Vec<String> {
    let kept: String =
        capabilities.iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
    [
        "setpriv",
        "--no-new-privs",
        "--bounding-set",
        &format!("-all{kept}"),
        "--inh-caps",
        "-all",
        "--",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// To begin the command line of a program that is to run in a cgroup.
fn member_of(members: &Path) -> Vec<String> {
    let script = format!("echo $$ >{} && exec \"$@\"", members.display());
    ["sh", "-c", &script, "sh"].map(str::to_owned).to_vec()
}

fn configuration(folder: &Path, hosts: &Path, containerd: &Path, setup: &Setup) -> String {
    let base = folder.display();
    let seconds = |time: Duration| format!("{}ms", time.as_millis());
    let materialize = if setup.materialize { "on-complete" } else { "never" };
    let (providers, programs) = setup.credential_providers.clone().unwrap_or_default();
    let docker =
        setup.docker_config.clone().unwrap_or_else(|| folder.join("no-docker-config.json"));
    format!(
        "root = '{base}/root'\n\
         [snapshots]\naddress = '{base}/s.sock'\nprepare_wait = '{prepare_wait}'\n\
         [containerd]\naddress = '{containerd}'\nmaterialize = '{materialize}'\n\
         [registry]\nconfig_path = '{hosts}'\ndocker_config = '{docker}'\n\
         credential_provider_config = '{providers}'\ncredential_provider_bin_dir = '{programs}'\n\
         [cache]\nquota_bytes = {quota}\n\
         [index]\nmin_layer_bytes = {min_layer}\ntrust_toc = {trust_toc}\n\
         [fetch]\ndeadline = '{deadline}'\n\
         [mount]\nmode = '{mode}'\nkeeper = '{keeper}'\nholder_address = '{base}/hold.sock'\n\
         [fuse]\nresend = {resend}\n\
         [background]\nenabled = {background}\ndelay = '{delay}'\n\
         [metrics]\naddress = '{metrics}'\n\
         [log]\nlevel = '{level}'\nformat = 'json'\n",
        mode = setup.mount_mode().name(),
        keeper = if setup.has_holder() { "holder" } else { "none" },
        resend = setup.resend,
        prepare_wait = seconds(setup.prepare_wait),
        containerd = containerd.display(),
        hosts = hosts.display(),
        docker = docker.display(),
        providers = providers.display(),
        programs = programs.display(),
        level = setup.log_level,
        metrics = setup.metrics,
        quota = setup.quota_bytes,
        min_layer = setup.min_layer_bytes,
        trust_toc = setup.trust_toc,
        deadline = seconds(setup.deadline),
        background = setup.background.is_some(),
        delay = seconds(setup.background.unwrap_or(Duration::from_secs(3600))),
    )
}

fn image_service(folder: &Path, images: ImageService) -> String {
    let ImageService { full, remembers } = images;
    let remembered = if remembers { "1day" } else { "0s" };
    format!(
        "[cri]\naddress = '{base}/cri.sock'\nfull = {full}\nremember_credentials = '{remembered}'\n",
        base = folder.display(),
    )
}

fn cluster(folder: &Path, join: &Join) -> String {
    let Join { control_plane, zone, listen, grace, .. } = join;
    format!(
        "[control_plane]\naddress = '{control_plane}'\ntoken_file = '{base}/token'\n\
         [node]\nzone = '{zone}'\nname = '{name}'\n\
         [identity]\ngrace = '{grace}ms'\n\
         [swarm]\nlisten = '{listen}'\n",
        base = folder.display(),
        name = folder.file_name().unwrap_or_default().to_string_lossy(),
        grace = grace.as_millis(),
    )
}
