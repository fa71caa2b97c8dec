//! Pods as kubelet makes them, through the real `crictl`.

use skimmer_integration::containerd::VERSIONS;
use skimmer_integration::crictl::Crictl;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;

use crate::fixtures::{pause, small};

#[test]
fn crictl_pulls_and_runs_a_pod() {
    for version in VERSIONS {
        scenario(&format!("crictl-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "pods/app")?;
            let reference = registry.add(&image)?;
            let pause_image = Some(registry.add(&pause(scenario)?)?);
            let setup = Setup { annotations: true, pause_image, ..Setup::default() };
            let node = Node::start_with(scenario, version, &setup)?;
            let address = node.containerd.address();
            let Some(crictl) = Crictl::new(&address, &address)? else { return Ok(()) };

            crictl.call(&["pull", &reference])?;
            anyhow::ensure!(
                crictl.call(&["images"])?.contains("pods/app"),
                "crictl images doesn't show the image"
            );
            let running = crictl.run(scenario, &reference)?;
            let output = crictl.exec(&running, &["echo", "hello"])?;
            anyhow::ensure!(output == "hello", "the container said {output:?}");
            let sum = crictl.exec(&running, &["md5sum", "/data/pods-app"])?;
            anyhow::ensure!(sum.ends_with("/data/pods-app"), "md5sum said {sum:?}");
            crictl.remove(&running)?;
            crictl.call(&["rmi", &reference])?;
            Ok(())
        });
    }
}
