//! Many nodes: a switch, a control plane, a registry, and on every other host a node of a cluster.
//!
//! Each program is in the network namespace of its host and sees nothing else; each node has its own root and socket.
//! Registry and nodes have links of the same speed; the control plane's isn't limited.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::Value;
use skimmer_proto::Digest;

use crate::command::wait_for;
use crate::containerd::{self, Containerd, Version};
use crate::control::{self, Control};
use crate::image::Image;
use crate::network::Host;
use crate::registry::{Auth, Registry};
use crate::scenario::Scenario;
use crate::skimmerd::{self, ImageService, Join, Skimmerd};
use crate::switch::Switch;

/// The cluster that nodes join unless told otherwise.
pub const CLUSTER: &str = "fleet";

/// How long a fleet may take to get ready, on a busy machine.
const READY: Duration = Duration::from_secs(60);

/// No layer is as long, so all are read to their ends, whatever other nodes say of them. Of what TOML has numbers for.
pub const NEVER_LAZY: u64 = 1 << 62;

const METRICS: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 4002);

/// What differs between fleets.
pub struct Setup {
    /// Of each link, both ways; none: as fast as it goes.
    pub bits_per_second: Option<u64>,
    pub zones: u32,
    pub auth: Auth,
    pub control: control::Setup,
    /// Of every node, but for what makes it a member.
    pub skimmerd: skimmerd::Setup,
    /// How long nodes accept certificates after their end.
    pub grace: Duration,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            bits_per_second: None,
            zones: 1,
            auth: Auth::Anyone,
            control: control::Setup::default(),
            skimmerd: skimmerd::Setup {
                min_layer_bytes: NEVER_LAZY,
                deadline: Duration::from_secs(180),
                ..skimmerd::Setup::default()
            },
            grace: Duration::from_secs(24 * 3600),
        }
    }
}

/// What differs between the nodes of a fleet.
#[derive(Clone, Copy, Debug)]
pub struct Spec<'a> {
    pub cluster: &'a str,
    /// `peer` or `seed`
    pub role: &'a str,
    pub zone: u32,
    /// Whether it has a containerd.
    pub containerd: bool,
    /// Whether that has CRI, whose pulls go through skimmerd's image service and are containerd's own.
    pub cri: bool,
    /// A token that was made before.
    pub token: Option<&'a str>,
    /// Credentials for the registry.
    pub docker_config: Option<&'a Path>,
}

impl Default for Spec<'_> {
    fn default() -> Self {
        Self {
            cluster: CLUSTER,
            role: "peer",
            zone: 0,
            containerd: false,
            cri: false,
            token: None,
            docker_config: None,
        }
    }
}

/// Everything, running. Dropped in this order: nodes before what they talk to, programs before their networks.
pub struct Fleet<'a> {
    pub machines: Vec<Machine>,
    pub control: Control,
    pub registry: Registry,
    scenario: &'a Scenario,
    setup: Setup,
    registry_host: Host,
    _control_host: Host,
    switch: Switch,
}

/// A host and its node.
pub struct Machine {
    // Containers first, then what serves their files.
    pub containerd: Option<Containerd>,
    pub skimmerd: Skimmerd,
    pub host: Host,
}

impl<'a> Fleet<'a> {
    /// A fleet without nodes.
    pub fn start(scenario: &'a Scenario, setup: Setup) -> anyhow::Result<Self> {
        let switch = Switch::new()?;
        for zone in 1..setup.zones {
            switch.add_zone(zone)?;
        }
        let registry_host = switch.host(0, setup.bits_per_second)?;
        let control_host = switch.host(0, None)?;
        let registry =
            Registry::start_with(scenario, "registry", &setup.auth, Some(&registry_host))?;
        let plain_http = vec![registry.address().to_owned()];
        let control_setup = control::Setup { plain_http, ..setup.control.clone() };
        let control =
            Control::start_with(scenario, "control", &control_setup, Some(&control_host))?;
        control.create_cluster(CLUSTER)?;
        let machines = Vec::new();
        let _control_host = control_host;
        Ok(Self {
            machines,
            control,
            registry,
            scenario,
            setup,
            registry_host,
            _control_host,
            switch,
        })
    }

    /// A fleet of `count` nodes that all attend.
    pub fn of(scenario: &'a Scenario, setup: Setup, count: usize) -> anyhow::Result<Self> {
        let mut fleet = Self::start(scenario, setup)?;
        for _ in 0..count {
            fleet.add(&Spec::default())?;
        }
        fleet.wait_attending()?;
        Ok(fleet)
    }

    /// Starts one more node and returns its number; it joins meanwhile.
    pub fn add(&mut self, spec: &Spec<'_>) -> anyhow::Result<usize> {
        let number = self.machines.len();
        let host = self.switch.host(spec.zone, self.setup.bits_per_second)?;
        let mut daemon = self.setup.skimmerd.clone();
        daemon.metrics = format!("{}:{}", METRICS.0, METRICS.1);
        daemon.docker_config = spec.docker_config.map(Path::to_owned);
        daemon.images = spec.cri.then(ImageService::default);
        daemon.cluster = Some(Join {
            control_plane: self.control.manager(),
            token: match spec.token {
                Some(token) => token.to_owned(),
                None => self.control.token(spec.cluster, spec.role)?,
            },
            zone: format!("zone{}", spec.zone),
            listen: "/ip4/0.0.0.0/tcp/4001".to_owned(),
            grace: self.setup.grace,
        });
        let name = format!("c{number}");
        let address = containerd::address_of(self.scenario, &name);
        let skimmerd = Skimmerd::start_on(
            self.scenario,
            &format!("n{number}"),
            &address,
            &daemon,
            Some(&host),
        )?;
        let containerd = if spec.containerd {
            let setup = containerd::Setup {
                skimmer: Some(skimmerd.address()),
                // It runs no pods.
                pause_image: spec.cri.then(|| "pause:none".to_owned()),
                plain_pods: spec.cri,
                ..containerd::Setup::default()
            };
            let version = Version::V2;
            Some(Containerd::start_on(self.scenario, &name, version, &setup, Some(&host))?)
        } else {
            None
        };
        self.machines.push(Machine { containerd, skimmerd, host });
        Ok(number)
    }

    /// Waits until every node has a stream to the scheduler.
    pub fn wait_attending(&self) -> anyhow::Result<()> {
        for (number, machine) in self.machines.iter().enumerate() {
            wait_for(&format!("node {number} attends"), READY, || {
                machine.skimmerd.is_attending().then_some(())
            })?;
        }
        Ok(())
    }

    /// Cuts the nodes of a zone off from all others, from the registry and from the control plane.
    pub fn set_zone(&self, zone: u32, connected: bool) -> anyhow::Result<()> {
        self.switch.set_trunk(zone, connected)
    }

    /// A host without a node, on a link like the nodes'.
    pub fn spare_host(&self) -> anyhow::Result<Host> {
        self.switch.host(0, self.setup.bits_per_second)
    }

    /// Every node's host, and the registry's.
    pub fn hosts(&self) -> Vec<&Host> {
        let nodes = self.machines.iter().map(|machine| &machine.host);
        nodes.chain([&self.registry_host]).collect()
    }

    /// Has all nodes build the index of `reference` at once, hence read every blob to its end and check it; returns
    /// how long the last one took.
    pub fn build_everywhere(&self, reference: &str, limit: Duration) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let builds: anyhow::Result<Vec<Build>> =
            self.machines.iter().map(|machine| machine.build(reference)).collect();
        for (number, build) in builds?.into_iter().enumerate() {
            build.wait(limit).with_context(|| format!("node {number}"))?;
        }
        Ok(start.elapsed())
    }

    /// Makes sure that every blob of the image is whole and right on every one of `machines`.
    pub fn check_blobs(&self, image: &Image, machines: &[usize]) -> anyhow::Result<()> {
        for number in machines {
            for layer in &image.layers {
                let found = self.machines[*number].digest_of(&layer.blob.digest)?;
                anyhow::ensure!(
                    found == layer.blob.digest,
                    "node {number} has other bytes of {}",
                    layer.blob.digest
                );
            }
        }
        Ok(())
    }
}

impl Machine {
    /// Its containerd.
    pub fn containerd(&self) -> anyhow::Result<&Containerd> {
        self.containerd.as_ref().context("this machine has no containerd")
    }

    /// The same, to be killed or started.
    pub fn containerd_mut(&mut self) -> anyhow::Result<&mut Containerd> {
        self.containerd.as_mut().context("this machine has no containerd")
    }

    /// Begins to run `skimmer` with these arguments.
    pub fn begin(&self, arguments: &[&str]) -> anyhow::Result<Build> {
        Build::start(self.skimmerd.skimmer(arguments)?, self.output())
    }

    /// Where other nodes reach it, as a multiaddr.
    pub fn multiaddr(&self) -> String {
        format!("/ip4/{}/tcp/4001", self.host.address())
    }

    /// Its peer id.
    pub fn peer(&self) -> anyhow::Result<String> {
        let status = self.skimmerd.ask(&["peers"])?;
        Ok(status["peer"].as_str().context("a node without a peer id")?.to_owned())
    }

    /// The peer ids of the nodes that it is linked with.
    pub fn linked(&self) -> anyhow::Result<Vec<String>> {
        let status = self.skimmerd.ask(&["peers"])?;
        let peers = status["peers"].as_array().context("no peers are shown")?;
        Ok(peers.iter().filter_map(|peer| peer["id"].as_str().map(str::to_owned)).collect())
    }

    /// Begins to read every layer of an image from end to end.
    pub fn build(&self, reference: &str) -> anyhow::Result<Build> {
        self.begin(&["index", "build", reference])
    }

    fn output(&self) -> PathBuf {
        self.skimmerd.root().with_extension(format!("call-{}", crate::ctr::unique()))
    }

    /// The sum of a metric over its labels.
    pub fn metric(&self, name: &str) -> anyhow::Result<u64> {
        let lines = self.metric_lines(name)?;
        let values = lines.iter().filter_map(|line| line.rsplit(' ').next());
        values.map(|value| value.parse::<u64>().context("a metric that is no number")).sum()
    }

    /// A metric with its labels, a line for each set of them.
    pub fn metric_lines(&self, name: &str) -> anyhow::Result<Vec<String>> {
        let text = self.host.inside(|| -> anyhow::Result<String> {
            let mut stream = TcpStream::connect(METRICS).context("reach the metrics")?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })??;
        let of_name =
            |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
        Ok(text.lines().filter(of_name).map(str::to_owned).collect())
    }

    /// Bytes of pieces that it got from other nodes since it started.
    pub fn from_peers(&self) -> anyhow::Result<u64> {
        self.metric("skimmer_swarm_received_bytes_total")
    }

    /// Waits until it has `bytes` of the blob on disk.
    pub fn wait_present(&self, blob: &Digest, bytes: u64) -> anyhow::Result<()> {
        use std::os::unix::fs::MetadataExt as _;
        let file = self.data(blob);
        wait_for("a part of the blob is here", READY, || {
            (std::fs::metadata(&file).ok()?.blocks() * 512 >= bytes).then_some(())
        })
    }

    fn data(&self, blob: &Digest) -> PathBuf {
        self.skimmerd.root().join("cache/blobs-v1").join(blob.hex()).join("data")
    }

    fn digest_of(&self, blob: &Digest) -> anyhow::Result<Digest> {
        let file = self.data(blob);
        let bytes = std::fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        Ok(Digest::of(&bytes))
    }
}

/// A call of `skimmer` that runs meanwhile; killed when dropped.
pub struct Build {
    child: Child,
    output: PathBuf,
}

impl Build {
    fn start(mut command: Command, output: PathBuf) -> anyhow::Result<Self> {
        let errors = File::create(&output)?;
        command.stdin(Stdio::null()).stdout(errors.try_clone()?).stderr(errors);
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        Ok(Self { child, output })
    }

    /// Waits for its end, which has to be a success, and returns the last that it said.
    pub fn wait(mut self, limit: Duration) -> anyhow::Result<Value> {
        let status = wait_for("the image is here", limit, || self.child.try_wait().ok().flatten());
        let text = std::fs::read_to_string(&self.output).unwrap_or_default();
        let last = text.lines().last().unwrap_or_default();
        let status = status.with_context(|| format!("skimmer said {last}"))?;
        anyhow::ensure!(status.success(), "skimmer ended with {status} and said {last}");
        serde_json::from_str(last).with_context(|| format!("skimmer said {last}"))
    }

    /// Waits for its end, which mustn't be a success, and returns all that it said.
    pub fn wait_failed(mut self, limit: Duration) -> anyhow::Result<String> {
        let status = wait_for("skimmer fails", limit, || self.child.try_wait().ok().flatten())?;
        anyhow::ensure!(!status.success(), "skimmer should have failed");
        Ok(std::fs::read_to_string(&self.output)?)
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        // One that has ended is what was wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
