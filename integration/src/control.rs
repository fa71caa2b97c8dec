//! The control plane under test, and the `skimmer` command that administers it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

use crate::command::{self, PATIENCE};
use crate::log_check::LogCheck;
use crate::network::{self, Host};
use crate::process::Process;
use crate::scenario::Scenario;
use crate::tools;

/// What differs from the configuration that tests use.
#[derive(Clone, Debug)]
pub struct Setup {
    pub certificate_lifetime: Duration,
    pub grace: Duration,
    /// Registries that are asked without TLS.
    pub plain_http: Vec<String>,
    /// As the command line has it.
    pub role: &'static str,
    /// The folder of the store, shared with another control plane; its own by default.
    pub store: Option<PathBuf>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            certificate_lifetime: Duration::from_secs(3600),
            grace: Duration::from_secs(24 * 3600),
            plain_http: Vec::new(),
            role: "all",
            store: None,
        }
    }
}

/// A running skimmer-control. The scenario fails if it logs a warning or an error that wasn't
/// [expected](Self::expect_log).
pub struct Control {
    process: Option<Process>,
    name: String,
    folder: PathBuf,
    logs: PathBuf,
    program: Vec<String>,
    address: String,
    setup: Setup,
    ports: Ports,
    expected: LogCheck,
}

#[derive(Clone, Copy, Debug, Default)]
struct Ports {
    manager: u16,
    scheduler: u16,
    metrics: u16,
}

impl Control {
    pub fn start(scenario: &Scenario) -> anyhow::Result<Self> {
        Self::start_with(scenario, "control", &Setup::default(), None)
    }

    /// A control plane called `name` within the scenario, on `host` if given.
    pub fn start_with(
        scenario: &Scenario,
        name: &str,
        setup: &Setup,
        host: Option<&Host>,
    ) -> anyhow::Result<Self> {
        let folder = scenario.path(name);
        std::fs::create_dir_all(&folder)?;
        let program = tools::built("skimmer-control")?.display().to_string();
        let mut control = Self {
            process: None,
            name: name.to_owned(),
            folder,
            logs: scenario.logs(),
            program: network::program_on(host, &program),
            address: host.map_or("127.0.0.1".to_owned(), |host| host.address().to_string()),
            setup: setup.clone(),
            ports: Ports::default(),
            expected: LogCheck::of(scenario, name),
        };
        control.run()?;
        Ok(control)
    }

    /// Warnings and errors that contain `part` are part of what is tested.
    pub fn expect_log(&self, part: &str) {
        self.expected.expect(part);
    }

    /// `host:port` where nodes enrol; it stays when it is started again.
    pub fn manager(&self) -> String {
        format!("{}:{}", self.address, self.ports.manager)
    }

    /// `host:port` where nodes attend.
    pub fn scheduler(&self) -> String {
        format!("{}:{}", self.address, self.ports.scheduler)
    }

    /// Where `/metrics`, `/ready` and `/live` are.
    pub fn health(&self) -> String {
        format!("{}:{}", self.address, self.ports.metrics)
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.join("s.sock")
    }

    /// Where everything is that it keeps.
    pub fn store(&self) -> PathBuf {
        self.setup.store.clone().unwrap_or_else(|| self.folder.join("store"))
    }

    /// What it logged, over all its lives.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// Its process id, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.take().map_or(Ok(()), |mut process| process.kill())
    }

    /// SIGTERM, and its exit status has to be 0.
    pub fn terminate(&mut self) -> anyhow::Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        let status = process.terminate(Duration::from_secs(30))?;
        anyhow::ensure!(status.success(), "skimmer-control ended with {status} after SIGTERM");
        Ok(())
    }

    /// Starts it, again or for the first time.
    pub fn run(&mut self) -> anyhow::Result<()> {
        let already = self.log().len();
        let mut process = self.begin()?;
        let socket = self.socket();
        let log = self.log_file();
        self.ports =
            process.wait_ready("skimmer-control serves", Duration::from_secs(30), || {
                std::os::unix::net::UnixStream::connect(&socket).ok()?;
                let text = std::fs::read_to_string(&log).ok()?;
                text.get(already..).and_then(|new| ports(new, self.setup.role))
            })?;
        self.process = Some(process);
        Ok(())
    }

    /// Starts it and kills it `after` that, which may be before it serves.
    pub fn run_briefly(&mut self, after: Duration) -> anyhow::Result<()> {
        self.begin()?.kill_after(after)
    }

    fn begin(&self) -> anyhow::Result<Process> {
        let config = self.folder.join("config.toml");
        std::fs::write(&config, self.configuration())?;
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]).arg("--config").arg(config);
        command.args(["--role", self.setup.role]);
        Process::start(&self.name, &command, &self.logs)
    }

    /// A call of the `skimmer` command with JSON output.
    pub fn skimmer(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(tools::built("skimmer")?);
        command.args(["--output", "json"]).args(arguments);
        command.arg("--control-socket").arg(self.socket());
        Ok(command)
    }

    /// What `skimmer` prints with JSON output.
    pub fn ask(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = command::output_of(&mut self.skimmer(arguments)?, PATIENCE)?;
        if text.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).with_context(|| format!("skimmer {arguments:?} printed {text}"))
    }

    /// What `skimmer` says when it must fail.
    pub fn refusal(&self, arguments: &[&str]) -> anyhow::Result<String> {
        command::failure_of(&mut self.skimmer(arguments)?, PATIENCE)
    }

    /// Creates a cluster and returns its id.
    pub fn create_cluster(&self, name: &str) -> anyhow::Result<String> {
        let created = self.ask(&["cluster", "create", name])?;
        Ok(created[0]["id"].as_str().context("a cluster without an id")?.to_owned())
    }

    /// A join token for one node, of role `peer` or `seed`.
    pub fn token(&self, cluster: &str, role: &str) -> anyhow::Result<String> {
        let made = self.ask(&["token", "create", "--cluster", cluster, "--role", role])?;
        Ok(made["token"].as_str().context("no token was printed")?.to_owned())
    }

    fn log_file(&self) -> PathBuf {
        self.logs.join(format!("{}.log", self.name))
    }

    fn configuration(&self) -> String {
        let Self { address, ports, setup, .. } = self;
        let base = self.folder.display();
        let plain_http: Vec<String> =
            setup.plain_http.iter().map(|host| format!("'{host}'")).collect();
        format!(
            "[store]\npath = '{store}/control.db'\nrefresh = '1s'\n\
             [admin]\naddress = '{base}/s.sock'\n\
             [manager]\naddress = '{address}:{manager}'\n\
             [scheduler]\naddress = '{address}:{scheduler}'\n\
             [identity]\ncertificate_lifetime = '{lifetime}ms'\ngrace = '{grace}ms'\n\
             [grants]\nplain_http = [{plain_http}]\n\
             [metrics]\naddress = '{address}:{metrics}'\n\
             [log]\nlevel = 'info'\nformat = 'json'\n",
            store = self.store().display(),
            manager = ports.manager,
            scheduler = ports.scheduler,
            metrics = ports.metrics,
            lifetime = setup.certificate_lifetime.as_millis(),
            grace = setup.grace.as_millis(),
            plain_http = plain_http.join(", "),
        )
    }
}

/// Where a control plane of `role` listens, once it said so.
fn ports(log: &str, role: &str) -> Option<Ports> {
    let of = |key: &str| {
        let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let line = lines.find(|line| line["fields"]["key"] == key)?;
        let address = line["fields"]["address"].as_str()?;
        address.rsplit_once(':')?.1.parse().ok()
    };
    let unless = |other, key| if role == other { Some(0) } else { of(key) };
    let manager = unless("scheduler", "manager.address")?;
    let scheduler = unless("manager", "scheduler.address")?;
    Some(Ports { manager, scheduler, metrics: of("metrics.address")? })
}

/// Whether a file below `folder` holds `text`.
pub fn holds(folder: &Path, text: &str) -> anyhow::Result<bool> {
    for entry in std::fs::read_dir(folder)? {
        let bytes = std::fs::read(entry?.path())?;
        if bytes.windows(text.len()).any(|window| window == text.as_bytes()) {
            return Ok(true);
        }
    }
    Ok(false)
}
