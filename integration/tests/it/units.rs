//! The systemd units: what they allow is enough, and systemd understands them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;
use skimmer_integration::skimmerd;

use crate::fixtures::small;
use crate::indexes;

/// The file of a unit.
pub fn unit(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../install").join(name)
}

/// The value of a key that the unit sets once.
fn value(name: &str, key: &str) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(unit(name))?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    Ok(value.with_context(|| format!("{name} doesn't set {key}"))?.to_owned())
}

#[test]
fn the_capabilities_of_the_unit_are_enough() {
    scenario("unit-capabilities", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "unit/image")?;
        let reference = registry.add(&image)?;
        let allowed = value("skimmerd.service", "CapabilityBoundingSet")?;
        let capabilities: Vec<String> =
            allowed.split(' ').map(|name| name.trim_start_matches("CAP_").to_owned()).collect();
        let setup = Setup {
            skimmerd: skimmerd::Setup {
                capabilities: Some(capabilities),
                ..skimmerd::Setup::default()
            },
            ..Setup::default()
        };
        let mut node = Node::start_with(scenario, Version::V2, &setup)?;
        let id = node.skimmerd.id().context("skimmerd doesn't run")?;
        let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
        anyhow::ensure!(status.contains("NoNewPrivs:\t1"), "it is not confined: {status}");
        // Pulled through, then lazily.
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        node.containerd.run_image(&reference, "skimmer", "one", &["md5sum", "/data/unit-image"])?;
        node.containerd.start_image(&reference, "skimmer", "two", &["sleep", "1000000"])?;
        node.containerd.exec("two", &["sh", "-c", "echo mine > /tmp/file"])?;
        node.containerd.remove_container("two")?;
        node.containerd.remove_image(&reference)?;
        node.skimmerd.terminate()
    });
}

/// systemd-analyze(1) of the units, where it is installed; of what it prints, only what it doesn't understand counts.
#[test]
fn systemd_understands_the_units() {
    for name in ["skimmerd.service", "skimmer-hold.service", "skimmer-control.service"] {
        let mut call = Command::new("systemd-analyze");
        call.args(["security", "--offline=true", "--threshold=60"]).arg(unit(name));
        match call.output() {
            Err(error) => println!("skipped: {error}"),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                // From systemd 254 on; older ones leave the descriptors to the holder.
                let said: Vec<_> =
                    said.lines().filter(|line| !line.contains("StorePreserve")).collect();
                let said = said.join("\n");
                for part in ["Unknown key", "Failed to parse", "ignoring"] {
                    assert!(!said.contains(part), "{name}: {said}");
                }
                let rated = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(output.status.success(), "{name} is rated worse than 6.0: {rated}{said}");
            }
        }
    }
}
