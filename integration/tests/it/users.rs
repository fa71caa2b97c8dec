//! Containers in user namespaces own the files of their image.

use skimmer_integration::command::{self, PATIENCE};
use skimmer_integration::containerd::Version;
use skimmer_integration::node::Node;
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;

use crate::fixtures::small;

#[test]
fn a_container_in_a_user_namespace_owns_its_files() {
    for version in [Version::V1_7, Version::V2] {
        scenario(&format!("user-namespace-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "users/mapped")?;
            let reference = registry.add(&image)?;
            let node = Node::start(scenario, version)?;
            node.skimmerd.ask(&["pull", &reference, "--namespace", "default"])?;
            let mut call = node.containerd.ctr()?;
            call.args(["run", "--rm", "--snapshotter", "skimmer", "--runc-root"])
                .arg(node.containerd.runc_root());
            call.args([
                "--uidmap",
                "0:200000:65536",
                "--gidmap",
                "0:200000:65536",
                "--remap-labels",
            ]);
            call.args([&reference, "mapped", "sh", "-c"]);
            call.arg("stat -c %u:%g /data/users-mapped; echo x > /tmp/new; stat -c %u /tmp/new; cat /proc/self/uid_map");
            let said = command::output_of(&mut call, PATIENCE)?;
            let lines: Vec<&str> = said.lines().map(str::trim).collect();
            anyhow::ensure!(lines[..2] == ["0:0", "0"], "inside, files belong to {lines:?}");
            anyhow::ensure!(
                lines[2].split_whitespace().eq(["0", "200000", "65536"]),
                "not mapped: {lines:?}"
            );
            Ok(())
        });
    }
}
