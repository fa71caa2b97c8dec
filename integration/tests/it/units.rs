//! The systemd units: what they allow is enough, and systemd understands them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::Context as _;
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;
use skimmer_integration::{skimmerd, tools};

use crate::content::check_linked;
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
            remap_ids: true,
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
        // runc may keep the state of all such containers in one place.
        let name = format!("unit-{}", std::process::id());
        let look = ["stat", "-c", "%u:%g", "/data/unit-image"];
        let owner = node.containerd.run_mapped(&reference, &name, &look)?;
        anyhow::ensure!(owner.trim() == "0:0", "in a user namespace it belongs to {owner}");
        node.skimmerd.ask(&["materialize", &reference])?;
        check_linked(&node, &image)?;
        node.containerd.remove_container("two")?;
        node.containerd.remove_image(&reference)?;
        node.skimmerd.terminate()
    });
}

/// Nothing of what is secret on a node goes to a disk when one of its daemons crashes.
#[test]
fn the_units_leave_no_core_dumps() {
    for name in ["skimmerd.service", "skimmer-hold.service", "skimmer-control.service"] {
        assert_eq!(value(name, "LimitCORE").unwrap(), "0", "{name}");
    }
}

/// Of what systemd-analyze(1) prints of the units, only what it doesn't understand counts.
#[test]
fn systemd_understands_the_units() {
    for name in ["skimmerd.service", "skimmer-hold.service", "skimmer-control.service"] {
        let Some(output) = analyze(name) else { return };
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // From systemd 254 on; older ones leave the descriptors to the holder.
        let said: Vec<_> = said.lines().filter(|line| !line.contains("StorePreserve")).collect();
        let said = said.join("\n");
        for part in ["Unknown key", "Failed to parse", "ignoring"] {
            assert!(!said.contains(part), "{name}: {said}");
        }
        let rated = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{name} is rated worse than 6.0: {rated}{said}");
    }
}

/// What systemd-analyze(1) says of a unit; `None` where it isn't installed and needn't be.
fn analyze(name: &str) -> Option<Output> {
    let mut call = Command::new("systemd-analyze");
    call.args(["security", "--offline=true", "--threshold=60"]).arg(unit(name));
    match call.output() {
        Ok(output) => Some(output),
        Err(error) => {
            assert!(!tools::required(), "systemd-analyze: {error}");
            eprintln!("skipped: systemd-analyze: {error}");
            None
        }
    }
}
