//! What the daemon sees of its surroundings, for `skimmer doctor`.

use std::path::Path;

use skimmer_layers::Layers;
use skimmer_proto::node::{Check, Verdict};
use skimmer_registry::Registry;
use skimmer_snapshots::identify::Containerd;

use super::convert::words;

pub fn daemon() -> Check {
    let detail = concat!("version ", env!("CARGO_PKG_VERSION"));
    verdict("skimmerd", Verdict::Ok, detail.to_owned(), "")
}

/// Whether layers are mounted by the kernel before they are complete. FUSE does as well.
pub fn lazily(layers: &Layers) -> Check {
    let detail = match layers.lazily() {
        Ok(()) => "the kernel serves them".to_owned(),
        Err(reason) => format!("FUSE serves them: {}", words(reason)),
    };
    verdict("incomplete layers", Verdict::Ok, detail, "")
}

/// Whether the daemon itself reaches containerd: it needs its content store.
pub async fn containerd(containerd: &Containerd) -> Check {
    let name = "skimmerd → containerd";
    match containerd.version().await {
        Ok(version) => verdict(name, Verdict::Ok, format!("version {version}"), ""),
        Err(error) => {
            let remedy =
                "Set `containerd.address` in skimmerd's configuration to containerd's socket.";
            verdict(name, Verdict::Warning, words(&error), remedy)
        }
    }
}

/// Whether pull secrets reach this node.
pub fn image_service(address: &Path) -> Check {
    let detail = if address.as_os_str().is_empty() {
        "not served (cri.address): pull secrets of pods don't reach skimmerd".to_owned()
    } else {
        let address = address.display();
        format!("served; for kubelet: imageServiceEndpoint: unix://{address}")
    };
    verdict("CRI image service", Verdict::Ok, detail, "")
}

pub async fn registry(registry: &Registry, host: &str) -> Vec<Check> {
    let name = format!("skimmerd → {host}");
    match registry.ping(host).await {
        Ok(answers) => answers
            .into_iter()
            .map(|answer| {
                let verdict_of = if answer.ok { Verdict::Ok } else { Verdict::Failed };
                let remedy =
                    if answer.ok { "" } else { "Check the host's hosts.toml and credentials." };
                verdict(&name, verdict_of, format!("{}: {}", answer.url, answer.words), remedy)
            })
            .collect(),
        Err(error) => {
            vec![verdict(&name, Verdict::Failed, words(&error), "Check the host's hosts.toml.")]
        }
    }
}

fn verdict(name: &str, verdict: Verdict, detail: String, remedy: &str) -> Check {
    Check { name: name.to_owned(), verdict: verdict.into(), detail, remedy: remedy.to_owned() }
}
