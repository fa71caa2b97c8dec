//! What readers of lazy layers notice of a registry that goes, stands still, or wants other credentials: a pause.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::{PATIENCE, wait_for};
use skimmer_integration::containerd::Version;
use skimmer_integration::image::Image;
use skimmer_integration::layer::noise;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::{Auth, Registry, write_docker_config};
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd;
use skimmer_integration::snapshots::View;

use crate::fixtures::{mount_point, seed, small};
use crate::indexes;

const USER: &str = "alice";
const PASSWORD: &str = "w0nderland";
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
        let config = scenario.path("config.json");
        write_docker_config(&config, registry.address(), USER, PASSWORD)?;
        let skimmerd = skimmerd::Setup {
            deadline,
            docker_config: Some(config),
            log_level: "debug",
            ..skimmerd::Setup::default()
        };
        let mut node =
            Node::start_with(scenario, Version::V2, &Setup { skimmerd, ..Setup::default() })?;
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        node.skimmerd.ask(&["pull", &reference])?;
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
        let config = scenario.path("config.json");
        write_docker_config(&config, lazy.registry.address(), USER, "of-yesterday")?;
        lazy.node.skimmerd.expect_log("refused the credentials");
        let reader = lazy.reader();
        wait_for("the registry has refused, more than once", PATIENCE, || {
            (lazy.answered(401) > 2).then_some(())
        })?;
        anyhow::ensure!(!reader.is_finished(), "the reader didn't wait");
        write_docker_config(&config, lazy.registry.address(), USER, PASSWORD)?;
        served(reader)
    });
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
        let mut refused = 0;
        for at in (0..LEN).step_by(step) {
            let mut bytes = vec![0; step];
            file.read_exact_at(&mut bytes, at as u64).context("a reader was told of an error")?;
            anyhow::ensure!(bytes == expected[at..at + step], "other bytes at {at}");
            refused = lazy.answered(401);
            if refused < 2 {
                std::thread::sleep(Duration::from_millis(300));
            }
        }
        anyhow::ensure!(refused > 0, "no token was refused: nothing was tested");
        Ok(())
    });
}
