//! What a node does besides lazy reading and take-over, in the sandbox of skimmerd's unit.

use anyhow::Context as _;
use skimmer_integration::command::{self, PATIENCE, wait_for};
use skimmer_integration::containerd;
use skimmer_integration::control::{self, Control};
use skimmer_integration::crictl::Crictl;
use skimmer_integration::docker_config::CredentialHelper;
use skimmer_integration::fleet::CLUSTER;
use skimmer_integration::image::Image;
use skimmer_integration::registry::{Auth, Registry};
use skimmer_integration::scenario::Scenario;
use skimmer_integration::skimmerd::MountMode;

use super::daemons::{Daemons, Service, docker_config};
use super::{learn, with_systemd};
use crate::content::check_linked_in;
use crate::credentials::{PASSWORD, USER, basic};
use crate::fixtures::small;

/// Where the unit serves CRI's image service: below `/run`.
const IMAGES: &str = "skimmer/cri.sock";

/// A node of a cluster, and what it pulls from.
struct World {
    // First: who uses the others ends with them.
    daemons: Daemons,
    _control: Control,
    open: Served,
    told: Served,
    helped: Served,
}

/// A registry with an image.
struct Served {
    registry: Registry,
    image: Image,
    reference: String,
}

impl Served {
    fn start(scenario: &Scenario, name: &str, auth: &Auth) -> anyhow::Result<Self> {
        let registry = Registry::start_with(scenario, name, auth, None)?;
        let image = small(scenario, &format!("sandbox/{name}"))?;
        let reference = registry.add(&image)?;
        Ok(Self { registry, image, reference })
    }
}

impl World {
    /// `open` and `told` will be mounted lazily.
    fn start(scenario: &Scenario) -> anyhow::Result<Self> {
        let open = Served::start(scenario, "open", &Auth::Anyone)?;
        let told = Served::start(scenario, "told", &basic())?;
        let helped = Served::start(scenario, "helped", &basic())?;
        let learned = open.registry.add(&told.image)?;
        let images = [(&open.image, open.reference.as_str()), (&told.image, learned.as_str())];
        let indexes = learn(scenario, &images)?;
        let plain_http = [&open, &told, &helped].map(|from| from.registry.address().to_owned());
        let setup = control::Setup { plain_http: plain_http.into(), ..control::Setup::default() };
        let control = Control::start_with(scenario, "control", &setup, None)?;

        let daemons = Daemons::start(scenario, &service(scenario, &control)?)?;
        daemons.skimmer.import_indexes(&indexes)?;
        daemons.start_containerd()?;
        Ok(Self { daemons, _control: control, open, told, helped })
    }

    /// By the kernel's own account.
    fn check_confined(&self) -> anyhow::Result<()> {
        let status = format!("/proc/{}/status", self.daemons.main()?);
        let said = command::output_of(self.daemons.systemd.command("cat").arg(status), PATIENCE)?;
        for line in ["NoNewPrivs:\t1\n", "Seccomp:\t2\n"] {
            anyhow::ensure!(said.contains(line), "it is not confined: {said}");
        }
        Ok(())
    }

    fn check_attending(&self) -> anyhow::Result<()> {
        let skimmer = &self.daemons.skimmer;
        wait_for("the node attends", PATIENCE, || skimmer.is_attending().then_some(()))
    }

    /// A container in a user namespace owns the files of its image, whose layers are mapped.
    fn map_ids(&self) -> anyhow::Result<()> {
        let Self { daemons, open, .. } = self;
        daemons.skimmer.ask(&["pull", &open.reference, "--namespace", "default"])?;
        let name = format!("sandbox-{}", std::process::id());
        let look = ["sh", "-c", "stat -c %u:%g /data/sandbox-open; cat /proc/self/mountinfo"];
        let said = daemons.containerd.run_mapped(&open.reference, &name, &look)?;
        let (owner, mounts) = said.split_once('\n').context("the container said nothing")?;
        anyhow::ensure!(owner.trim() == "0:0", "inside, the file belongs to {owner}");
        anyhow::ensure!(mounts.contains("/lower/"), "no layer is mapped: {mounts}");
        Ok(())
    }

    fn materialize(&self) -> anyhow::Result<()> {
        let Self { daemons, open, .. } = self;
        daemons.skimmer.ask(&["materialize", &open.reference])?;
        check_linked_in(&daemons.containerd, &daemons.root(), &open.image)
    }

    /// A private image, by a pull that a credential helper is asked for.
    fn pull_full(&self, scenario: &Scenario) -> anyhow::Result<()> {
        let Self { daemons, helped, .. } = self;
        let helper = CredentialHelper::new(scenario, USER)?;
        helper.hand_out(PASSWORD)?;
        helper.be_installed(&daemons.systemd.folder("bin"))?;
        helper.be_named(&docker_config(scenario), &[helped.registry.address()])?;
        let pull = ["pull", "--full", &helped.reference, "--namespace", "default"];
        daemons.skimmer.ask(&pull)?;
        check_linked_in(&daemons.containerd, &daemons.root(), &helped.image)
    }

    /// A private image is pulled by CRI, and fetched later with the credentials of that pull, by a
    /// process that wasn't told of them.
    fn remember_pulls(&self) -> anyhow::Result<()> {
        let Self { daemons, told, .. } = self;
        let images = daemons.systemd.folder("run").join(IMAGES);
        let Some(crictl) = Crictl::new(&daemons.containerd.address(), &images)? else {
            return Ok(());
        };
        wait_for("CRI answers", PATIENCE, || crictl.call(&["images"]).ok())?;
        let creds = format!("{USER}:{PASSWORD}");
        crictl.call(&["pull", "--creds", &creds, &told.reference])?;
        let data = &told.image.layers[1].blob;
        let sent = told.registry.sent(&data.digest);
        anyhow::ensure!(sent.bytes < 1 << 20, "it isn't lazy: {sent:?}");

        let before = daemons.main()?;
        daemons.kill()?;
        daemons.wait_serving(&before)?;
        daemons.skimmer.ask(&["fetch", &told.reference, "--namespace", "k8s.io"])?;
        told.registry.settle()?;
        let sent = told.registry.sent(&data.digest);
        anyhow::ensure!(sent.bytes == sent.by_daemon && sent.bytes >= data.size, "{sent:?}");
        Ok(())
    }
}

/// With CRI, a cluster, and containers whose ids skimmer maps.
fn service(scenario: &Scenario, control: &Control) -> anyhow::Result<Service> {
    control.create_cluster(CLUSTER)?;
    let token = scenario.path("token");
    std::fs::write(&token, control.token(CLUSTER, "peer")?)?;
    // On all interfaces, of which the kernel tells by netlink.
    let more = format!(
        "[cri]\naddress = '/run/{IMAGES}'\n\
         [control_plane]\naddress = '{}'\ntoken_file = '{}'\n\
         [swarm]\nlisten = '/ip4/0.0.0.0/tcp/0'\n",
        control.manager(),
        token.display(),
    );
    let containerd = containerd::Setup {
        // It runs no pods.
        pause_image: Some("pause:none".to_owned()),
        annotations: true,
        remap_ids: true,
        ..containerd::Setup::default()
    };
    Ok(Service { more, containerd, ..Service::new(MountMode::Auto) })
}

#[test]
fn a_node_can_do_everything_in_the_sandbox_of_its_unit() {
    with_systemd("systemd-sandbox", |scenario| {
        let world = World::start(scenario)?;
        world.check_confined()?;
        world.check_attending()?;
        world.map_ids().context("a container in a user namespace")?;
        world.materialize().context("skimmer materialize")?;
        world.pull_full(scenario).context("skimmer pull --full, with a credential helper")?;
        world.remember_pulls().context("CRI's image service")
    });
}
