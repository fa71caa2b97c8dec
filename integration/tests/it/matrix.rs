//! Every way in which an image gets onto a node, with every containerd: which of them are lazy, by the registry's own
//! account of what it sent.

use skimmer_integration::containerd::{self, Containerd, VERSIONS, Version};
use skimmer_integration::cri::Cri;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::Image;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::{Registry, Sent};
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{self, Skimmerd};
use skimmer_integration::{command, tools};

use crate::fixtures::{pause, small};
use crate::indexes;

/// What a pull is expected to make the registry send of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// Nothing to containerd, and to skimmerd only what the container reads.
    Lazy,
    /// Everything to containerd, once.
    Eager,
}

/// A node that knows the indexes of `image` and nothing else.
fn node(
    scenario: &Scenario,
    registry: &Registry,
    image: &Image,
    version: Version,
    setup: &Setup,
) -> anyhow::Result<Node> {
    let mut node = Node::start_with(scenario, version, setup)?;
    indexes::learn(scenario, &mut node, &[(image, &registry.reference(image))])?;
    Ok(node)
}

fn check(
    registry: &Registry,
    image: &Image,
    before: Sent,
    expected: Expected,
) -> anyhow::Result<()> {
    let after = registry.sent_of(image);
    let (all, daemon) = (after.bytes - before.bytes, after.by_daemon - before.by_daemon);
    let other = all - daemon;
    match expected {
        Expected::Lazy => {
            anyhow::ensure!(other == 0, "containerd fetched {other} bytes of layers");
            let share = image.compressed_bytes() / 2;
            anyhow::ensure!(
                daemon < share,
                "skimmerd fetched {daemon} bytes of {}",
                image.compressed_bytes()
            );
            // The data layer, which nobody read.
            let data = registry.sent(&image.layers[1].blob.digest);
            anyhow::ensure!(
                data.bytes < image.layers[1].blob.size * 5 / 4,
                "the data layer was fetched again: {data:?}"
            );
        }
        Expected::Eager => {
            anyhow::ensure!(other == image.compressed_bytes(), "containerd fetched {other} bytes");
        }
    }
    Ok(())
}

#[test]
fn ctr_pull_is_eager_before_2_and_lazy_from_2_on() {
    for (name, version, annotations, local, expected) in [
        ("ctr-1.6", Version::V1_6, false, false, Expected::Eager),
        ("ctr-1.7", Version::V1_7, false, false, Expected::Eager),
        // Without the exports flag containerd 2.1 hands over what 2.0 does: the chain ID only.
        ("ctr-2.0", Version::V2, false, false, Expected::Lazy),
        ("ctr-2.1", Version::V2, true, false, Expected::Lazy),
        ("ctr-2.1-local", Version::V2, true, true, Expected::Eager),
    ] {
        scenario(name, |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "matrix/ctr")?;
            let reference = registry.add(&image)?;
            let node = node(
                scenario,
                &registry,
                &image,
                version,
                &Setup { annotations, ..Setup::default() },
            )?;
            let before = registry.sent_of(&image);
            node.containerd.pull(&Pull { local, ..Pull::new(&reference, "skimmer") })?;
            let output =
                node.containerd.run_image(&reference, "skimmer", "hello", &["echo", "hello"])?;
            anyhow::ensure!(output == "hello\n", "the container said {output:?}");
            check(&registry, &image, before, expected)
        });
    }
}

#[test]
fn skimmer_pull_is_lazy_everywhere() {
    for version in VERSIONS {
        scenario(&format!("skimmer-pull-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "matrix/skimmer")?;
            let reference = registry.add(&image)?;
            let node = node(scenario, &registry, &image, version, &Setup::default())?;
            let before = registry.sent_of(&image);
            node.skimmerd.ask(&["pull", &reference, "--namespace", "default"])?;
            let output =
                node.containerd.run_image(&reference, "skimmer", "hello", &["echo", "hello"])?;
            anyhow::ensure!(output == "hello\n", "the container said {output:?}");
            anyhow::ensure!(
                node.containerd.images()?.contains(&reference),
                "the image has no name in containerd"
            );
            check(&registry, &image, before, Expected::Lazy)?;
            // containerd's own pull finds everything there.
            node.containerd.remove_image(&reference)
        });
    }
}

#[test]
fn cri_pulls_are_lazy() {
    for version in VERSIONS {
        scenario(&format!("cri-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "matrix/cri")?;
            let reference = registry.add(&image)?;
            let pause_image = Some(registry.add(&pause(scenario)?)?);
            let setup = Setup { annotations: true, pause_image, ..Setup::default() };
            let node = node(scenario, &registry, &image, version, &setup)?;
            let before = registry.sent_of(&image);
            let mut cri = Cri::connect(&node.containerd.address())?;
            cri.pull(&reference, None)?;
            let pod = cri.run_pod("pod", &scenario.path("pods"))?;
            let container = cri.start(&pod, &reference, &["sleep", "100000"])?;
            let output = cri.exec(&container, &["echo", "hello"])?;
            anyhow::ensure!(output == "hello\n", "the container said {output:?}");
            check(&registry, &image, before, Expected::Lazy)?;
            cri.remove_pod(&pod)?;
            cri.remove_image(&reference)
        });
    }
}

#[test]
fn without_an_index_a_pull_fetches_each_layer_once() {
    for version in VERSIONS {
        scenario(&format!("pull-through-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "matrix/through")?;
            let reference = registry.add(&image)?;
            let node = Node::start(scenario, version)?;
            node.skimmerd.ask(&["pull", &reference, "--namespace", "default"])?;
            let output =
                node.containerd.run_image(&reference, "skimmer", "hello", &["echo", "hello"])?;
            anyhow::ensure!(output == "hello\n", "the container said {output:?}");
            let sent = registry.sent_of(&image);
            anyhow::ensure!(
                sent.bytes == sent.by_daemon,
                "containerd fetched layers too: {sent:?}"
            );
            anyhow::ensure!(
                sent.bytes == image.compressed_bytes(),
                "{sent:?}, not {}",
                image.compressed_bytes()
            );
            Ok(())
        });
    }
}

#[test]
fn the_printed_configuration_works() {
    for version in VERSIONS {
        scenario(&format!("print-config-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "matrix/printed")?;
            let reference = registry.add(&image)?;
            let folder = scenario.path("containerd");
            let address = containerd::address_of(scenario, "containerd");
            let daemon =
                Skimmerd::start(scenario, "skimmerd", &address, &skimmerd::Setup::default())?;
            let number = version.number()?;
            let printed = command::output_of(
                std::process::Command::new(tools::built("skimmer")?)
                    .arg("--address")
                    .arg(daemon.address())
                    .args(["doctor", "--print-config", "--containerd-version", &number, "--root"])
                    .arg(daemon.root()),
                command::PATIENCE,
            )?;
            // The rest is what keeps this containerd private.
            let private = format!(
                "root = '{base}/root'\nstate = '{base}/state'\n[grpc]\naddress = '{base}/c.sock'\n\
                 [plugins.'io.containerd.internal.v1.opt']\npath = '{base}/opt'\n",
                base = folder.display()
            );
            let mut configuration: toml::Table = printed.parse()?;
            merge(&mut configuration, private.parse()?);
            let setup = containerd::Setup {
                configuration: Some(toml::to_string(&configuration)?),
                ..Default::default()
            };
            let own = Containerd::start_with(scenario, "containerd", version, &setup)?;
            own.pull(&Pull::new(&reference, "skimmer"))?;
            let output = own.run_image(&reference, "skimmer", "hello", &["echo", "hello"])?;
            anyhow::ensure!(output == "hello\n", "the container said {output:?}");
            // overlayfs is still there for those who ask for it.
            own.pull(&Pull::new(&reference, "overlayfs"))?;
            own.run_image(&reference, "overlayfs", "again", &["true"])?;
            Ok(())
        });
    }
}

/// Adds `more` to `table`, section by section.
fn merge(table: &mut toml::Table, more: toml::Table) {
    for (key, value) in more {
        match (table.get_mut(&key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(value)) => merge(inner, value),
            (_, value) => {
                table.insert(key, value);
            }
        }
    }
}
