//! What the daemon sees of its surroundings, for `skimmer doctor`.

use std::path::Path;

use skimmer_layers::Layers;
use skimmer_proto::node::{Check, Verdict};
use skimmer_registry::Registry;
use skimmer_snapshots::identify::Containerd;

use super::convert::words;
use crate::keeper::KeptBy;

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

/// Who keeps the descriptors of lazily mounted layers over restarts; `is_safe`: now too.
pub fn keeper(by: &KeptBy, is_safe: bool) -> Check {
    let name = "descriptors of mounts";
    let ok = |who: String| verdict(name, Verdict::Ok, format!("kept by {who}"), "");
    let warn = |who: String, remedy: &str| {
        verdict(name, Verdict::Warning, format!("kept by {who}"), remedy)
    };
    let nobody = |why: &str| {
        format!(
            "nobody ({why}): lazily mounted layers fail when skimmerd ends, and the kernel serves \
             no incomplete ones"
        )
    };
    match by {
        KeptBy::Systemd if is_safe => ok("systemd".to_owned()),
        KeptBy::Systemd => warn(
            "systemd until the unit is stopped: lazily mounted layers fail then, and the kernel \
             serves no incomplete ones"
                .to_owned(),
            "Enable the unit: `systemctl enable skimmerd && systemctl restart skimmerd`. \
             One of your own needs FileDescriptorStorePreserve=yes too.",
        ),
        KeptBy::Holder(address) if is_safe => ok(format!("the holder at {}", address.display())),
        KeptBy::Holder(address) => warn(
            format!(
                "the holder at {}, which is gone: lazily mounted layers fail if skimmerd ends \
                 before it is back",
                address.display()
            ),
            "Start it: `systemctl start skimmer-hold`. skimmerd gives it everything again.",
        ),
        KeptBy::Nobody(address) => warn(
            nobody(&format!(
                "systemd offers no store, and no holder was at {} when skimmerd started",
                address.display()
            )),
            "Drain the node of its pods, as their lazily mounted layers fail when this skimmerd is \
             stopped. Then, with systemd 254 or later, run it as install/skimmerd.service, enabled. \
             Without, start install/skimmer-hold.service before it.",
        ),
        KeptBy::Unwanted => warn(
            nobody("mount.keeper says so"),
            "Drain the node of its pods, as their lazily mounted layers fail at the restart. Then \
             set `mount.keeper` in skimmerd's configuration to \"auto\", and restart skimmerd.",
        ),
    }
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn who_keeps_descriptors_is_told_and_what_to_do_if_nobody_does() {
        let address = PathBuf::from("/run/hold.sock");
        for (by, is_safe, expected, detail) in [
            (KeptBy::Systemd, true, Verdict::Ok, "kept by systemd"),
            (
                KeptBy::Systemd,
                false,
                Verdict::Warning,
                "kept by systemd until the unit is stopped: ",
            ),
            (
                KeptBy::Holder(address.clone()),
                true,
                Verdict::Ok,
                "kept by the holder at /run/hold.sock",
            ),
            (
                KeptBy::Holder(address.clone()),
                false,
                Verdict::Warning,
                "kept by the holder at /run/hold.sock, which is gone: ",
            ),
            (
                KeptBy::Nobody(address),
                false,
                Verdict::Warning,
                "kept by nobody (systemd offers no store, and no holder was at /run/hold.sock ",
            ),
            (KeptBy::Unwanted, false, Verdict::Warning, "kept by nobody (mount.keeper says so): "),
        ] {
            let check = keeper(&by, is_safe);
            assert_eq!(check.verdict(), expected, "{by:?}");
            assert!(check.detail.starts_with(detail), "{by:?}: {}", check.detail);
            assert_eq!(check.remedy.is_empty(), expected == Verdict::Ok, "{by:?}");
        }
    }
}
