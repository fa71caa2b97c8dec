//! Pods as kubelet makes them, through the real `crictl`.

use std::path::Path;
use std::process::Command;

use serde_json::json;
use skimmer_integration::command::{self, PATIENCE};
use skimmer_integration::containerd::VERSIONS;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;
use skimmer_integration::tools;

use crate::fixtures::{pause, small};

#[test]
fn crictl_pulls_and_runs_a_pod() {
    let Some(crictl) = tools::crictl().ok().flatten() else {
        eprintln!("skipped: no Go toolchain to build crictl with");
        return;
    };
    for version in VERSIONS {
        scenario(&format!("crictl-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "pods/app")?;
            let reference = registry.add(&image)?;
            let pause_image = Some(registry.add(&pause(scenario)?)?);
            let setup = Setup { annotations: true, pause_image, ..Setup::default() };
            let node = Node::start_with(scenario, version, &setup)?;
            let endpoint = format!("unix://{}", node.containerd.address().display());
            let call = |arguments: &[&Path]| -> anyhow::Result<String> {
                let mut call = Command::new(&crictl);
                call.args([
                    "--runtime-endpoint",
                    &endpoint,
                    "--image-endpoint",
                    &endpoint,
                    "--timeout",
                    "60s",
                ]);
                Ok(command::output_of(call.args(arguments), PATIENCE)?.trim().to_owned())
            };
            let words = |line: &str| -> anyhow::Result<String> {
                call(&line.split(' ').map(Path::new).collect::<Vec<_>>())
            };

            words(&format!("pull {reference}"))?;
            anyhow::ensure!(
                words("images")?.contains("pods/app"),
                "crictl images doesn't show the image"
            );
            let (pod, container) = (scenario.path("pod.json"), scenario.path("container.json"));
            let logs = scenario.path("pods");
            std::fs::create_dir_all(&logs)?;
            // NODE (2): the host's own namespace.
            let host = json!({ "network": 2, "pid": 2, "ipc": 2 });
            let description = json!({
                "metadata": { "name": "pod", "namespace": "tests", "uid": "pod-1", "attempt": 0 },
                "log_directory": logs,
                "linux": { "security_context": { "namespace_options": host } },
            });
            std::fs::write(&pod, description.to_string())?;
            let description = json!({
                "metadata": { "name": "app", "attempt": 0 }, "image": { "image": reference },
                "command": ["sleep", "100000"], "log_path": "app.log",
            });
            std::fs::write(&container, description.to_string())?;
            let sandbox = call(&["runp".as_ref(), &pod])?;
            let id = call(&["create".as_ref(), sandbox.as_ref(), &container, &pod])?;
            words(&format!("start {id}"))?;
            let output = words(&format!("exec {id} echo hello"))?;
            anyhow::ensure!(output == "hello", "the container said {output:?}");
            let sum = words(&format!("exec {id} md5sum /data/pods-app"))?;
            anyhow::ensure!(sum.ends_with("/data/pods-app"), "md5sum said {sum:?}");
            words(&format!("stopp {sandbox}"))?;
            words(&format!("rmp {sandbox}"))?;
            words(&format!("rmi {reference}"))?;
            Ok(())
        });
    }
}
