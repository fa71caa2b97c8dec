//! What readers of lazy layers notice of a registry that goes, stands still, wants other credentials, or whose name
//! doesn't resolve: a pause.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::{PATIENCE, wait_for};
use skimmer_integration::containerd::{self, Containerd, Version};
use skimmer_integration::docker_config::{self, CredentialHelper};
use skimmer_integration::image::Image;
use skimmer_integration::layer::noise;
use skimmer_integration::names::{Failure, Names};
use skimmer_integration::network::Host;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::{Auth, Registry};
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{self, Skimmerd};
use skimmer_integration::snapshots::View;

use crate::fixtures::{mount_point, seed, small};
use crate::indexes;

const USER: &str = "alice";
const PASSWORD: &str = "w0nderland";
/// Of the registry, where it has one.
const NAME: &str = "registry.test";
/// Of the image's file.
const LEN: usize = 8 << 20;

/// A lazily mounted image of which nothing has been read.
struct Lazy {
    // Before those who serve it.
    view: View,
    node: Node,
    registry: Registry,
    image: Image,
}

impl Lazy {
    fn new(scenario: &Scenario, auth: &Auth, deadline: Duration) -> anyhow::Result<Self> {
        let registry = Registry::start_with(scenario, "registry", auth, None)?;
        let image = small(scenario, "net/lazy")?;
        let reference = registry.add(&image)?;
        docker_config::log_in(&docker_config(scenario), &[registry.address()], USER, PASSWORD)?;
        let setup = Setup { skimmerd: setup(scenario, deadline), ..Setup::default() };
        let node = Node::start_with(scenario, Version::V2, &setup)?;
        Self::pulled(scenario, node, registry, image, &reference)
    }

    /// The same of a registry that is asked for as [`NAME`]; it and the node are on `host`.
    fn by_name(scenario: &Scenario, host: &Host) -> anyhow::Result<Self> {
        let registry = Registry::start_with(scenario, "registry", &Auth::Anyone, Some(host))?;
        let image = small(scenario, "net/lazy")?;
        registry.add(&image)?;
        let (_, port) = registry.address().rsplit_once(':').context("an address has a port")?;
        let named = format!("{NAME}:{port}");
        let hosts = scenario.hosts().join(&named);
        std::fs::create_dir_all(&hosts)?;
        std::fs::write(hosts.join("hosts.toml"), format!("server = \"http://{named}\"\n"))?;
        let reference = format!("{named}/{}:latest", image.name);
        Self::pulled(scenario, node_on(scenario, host)?, registry, image, &reference)
    }

    fn pulled(
        scenario: &Scenario,
        mut node: Node,
        registry: Registry,
        image: Image,
        reference: &str,
    ) -> anyhow::Result<Self> {
        indexes::learn(scenario, &mut node, &[(&image, reference)])?;
        node.skimmerd.ask(&["pull", reference])?;
        let view = node.view(&image, &mount_point(scenario, "view"))?;
        Ok(Self { view, node, registry, image })
    }

    fn file(&self) -> std::path::PathBuf {
        self.view.path().join("data/net-lazy")
    }

    /// Somebody who reads the whole file.
    fn reader(&self) -> Reader {
        let file = self.file();
        std::thread::spawn(move || read(&file))
    }

    /// The same, for whom skimmerd has asked in vain, more than once.
    fn waiting_reader(&self) -> anyhow::Result<Reader> {
        let before = self.failures();
        let reader = self.reader();
        wait_for("skimmerd has asked in vain, more than once", PATIENCE, || {
            (self.failures() > before + 2).then_some(())
        })?;
        anyhow::ensure!(!reader.is_finished(), "the reader didn't wait");
        Ok(reader)
    }

    /// How often skimmerd asked in vain.
    fn failures(&self) -> usize {
        self.node.skimmerd.log().matches("a request failed").count()
    }

    /// Requests of skimmerd for the data layer that the registry answered with `status`.
    fn answered(&self, status: u16) -> usize {
        let path = format!("/blobs/{}", self.image.layers[1].blob.digest);
        let requests = self.registry.requests().into_iter();
        requests.filter(|r| r.path.ends_with(&path) && r.status == status).count()
    }
}

fn docker_config(scenario: &Scenario) -> PathBuf {
    scenario.path("config.json")
}

fn setup(scenario: &Scenario, deadline: Duration) -> skimmerd::Setup {
    skimmerd::Setup {
        deadline,
        docker_config: Some(docker_config(scenario)),
        helpers: Some(docker_config::helpers(scenario)),
        log_level: "debug",
        ..skimmerd::Setup::default()
    }
}

/// A node whose programs are on `host`.
fn node_on(scenario: &Scenario, host: &Host) -> anyhow::Result<Node> {
    let address = containerd::address_of(scenario, "containerd");
    let setup = setup(scenario, PATIENCE);
    let skimmerd = Skimmerd::start_on(scenario, "skimmerd", &address, &setup, Some(host))?;
    let setup =
        containerd::Setup { skimmer: Some(skimmerd.address()), ..containerd::Setup::default() };
    let containerd = Containerd::start_on(scenario, "containerd", Version::V2, &setup, Some(host))?;
    Ok(Node { containerd, skimmerd })
}

type Reader = JoinHandle<anyhow::Result<()>>;

/// Whether the reader gets its bytes.
fn served(reader: Reader) -> anyhow::Result<()> {
    reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?
}

fn read(file: &Path) -> anyhow::Result<()> {
    let bytes = std::fs::read(file).context("a reader was told of an error")?;
    anyhow::ensure!(bytes == noise(seed("net-lazy"), LEN), "other bytes");
    Ok(())
}

#[test]
fn a_reader_waits_for_a_registry_that_comes_back() {
    scenario("registry-back", |scenario| {
        let mut lazy = Lazy::new(scenario, &Auth::Anyone, PATIENCE)?;
        lazy.registry.stop()?;
        let reader = lazy.waiting_reader()?;
        lazy.registry.resume()?;
        served(reader)
    });
}

#[test]
fn a_reader_waits_for_a_registry_that_stands_still() {
    scenario("registry-frozen", |scenario| {
        let lazy = Lazy::new(scenario, &Auth::Anyone, PATIENCE)?;
        lazy.registry.freeze()?;
        let reader = lazy.reader();
        // There is nothing to see of somebody who waits.
        std::thread::sleep(Duration::from_secs(2));
        let waits = !reader.is_finished();
        lazy.registry.thaw()?;
        anyhow::ensure!(waits, "the reader didn't wait");
        served(reader)
    });
}

#[test]
fn a_reader_waits_for_credentials_that_are_right_again() {
    scenario("credentials-refused", |scenario| {
        let auth = Auth::Basic { user: USER, password: PASSWORD };
        let lazy = Lazy::new(scenario, &auth, PATIENCE)?;
        let config = docker_config(scenario);
        docker_config::log_in(&config, &[lazy.registry.address()], USER, "of-yesterday")?;
        lazy.node.skimmerd.expect_log("refused the credentials");
        let reader = lazy.reader();
        wait_for("the registry has refused, more than once", PATIENCE, || {
            (lazy.answered(401) > 2).then_some(())
        })?;
        anyhow::ensure!(!reader.is_finished(), "the reader didn't wait");
        docker_config::log_in(&config, &[lazy.registry.address()], USER, PASSWORD)?;
        served(reader)
    });
}

#[test]
fn a_reader_waits_for_a_credential_helper_that_is_right_again() {
    let basic = || Auth::Basic { user: USER, password: PASSWORD };
    let token =
        || Auth::Token { user: USER, password: PASSWORD, lifetime: Duration::from_secs(300) };
    for (name, auth, first, refusal) in [
        ("basic", basic(), "of-yesterday", "refused the credentials"),
        ("token", token(), "of-yesterday", "gave no token"),
        // That it has none.
        ("none", basic(), "", "wants a user and a password"),
    ] {
        scenario(&format!("credential-helper-{name}"), |scenario| {
            let helper = CredentialHelper::new(scenario, USER)?;
            let Lazy { view, mut node, registry, image } = Lazy::new(scenario, &auth, PATIENCE)?;
            drop(view);
            helper.hand_out(first)?;
            helper.be_named(&docker_config(scenario), &[registry.address()])?;
            // Of what the daemon knew before nothing is left.
            node.skimmerd.terminate()?;
            node.skimmerd.run()?;
            node.wait_connected()?;
            node.skimmerd.expect_log(refusal);
            let view = node.view(&image, &mount_point(scenario, "view"))?;
            let lazy = Lazy { view, node, registry, image };
            let reader = lazy.waiting_reader()?;
            helper.hand_out(PASSWORD)?;
            served(reader)
        });
    }
}

#[test]
fn a_reader_waits_for_a_name_that_resolves_again() {
    for (name, failure) in [("unknown", Failure::Unknown), ("failing", Failure::Server)] {
        scenario(&format!("name-{name}"), |scenario| {
            let host = Host::new(None)?;
            let names = Names::start(&host, NAME, host.address())?;
            let mut lazy = Lazy::by_name(scenario, &host)?;
            names.fail(failure);
            // skimmerd would go on using the connections that it has.
            lazy.registry.stop()?;
            lazy.registry.resume()?;
            let reader = lazy.waiting_reader()?;
            anyhow::ensure!(names.asked_in_vain() > 1, "it waited for something else");
            names.know();
            served(reader)
        });
    }
}

#[test]
fn a_reader_waits_until_a_new_certificate_is_trusted() {
    scenario("certificate-changed", |scenario| {
        let mut lazy = Lazy::new(scenario, &Auth::Anyone, PATIENCE)?;
        lazy.registry.renew_certificate()?;
        lazy.registry.trust(scenario)?;
        let mut first = [0; 512];
        File::open(lazy.file())?.read_exact_at(&mut first, 0).context("read over TLS")?;
        lazy.registry.renew_certificate()?;
        let reader = lazy.waiting_reader()?;
        lazy.registry.trust(scenario)?;
        served(reader)
    });
}

#[test]
fn tokens_that_end_in_the_middle_are_replaced() {
    scenario("tokens-end", |scenario| {
        let lifetime = Duration::from_secs(2);
        let auth = Auth::Fleeting { user: USER, password: PASSWORD, lifetime };
        let lazy = Lazy::new(scenario, &auth, PATIENCE)?;
        let (file, expected) = (File::open(lazy.file())?, noise(seed("net-lazy"), LEN));
        let step = 256 << 10;
        // Tokens that ended before anybody read don't count.
        lazy.registry.settle()?;
        let before = lazy.answered(401);
        let mut refused = 0;
        for at in (0..LEN).step_by(step) {
            let mut bytes = vec![0; step];
            file.read_exact_at(&mut bytes, at as u64).context("a reader was told of an error")?;
            anyhow::ensure!(bytes == expected[at..at + step], "other bytes at {at}");
            refused = lazy.answered(401) - before;
            if refused < 2 {
                std::thread::sleep(Duration::from_millis(300));
            }
        }
        anyhow::ensure!(refused > 0, "no token was refused: nothing was tested");
        Ok(())
    });
}
