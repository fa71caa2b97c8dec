//! The lines that each containerd version needs in its config.toml.
//!
//! Versions differ in four ways: the configuration's version and plugin names (3 from 2.0), the
//! transfer service's `unpack_config` (from 2.0: a snapshotter without an entry fails every pull),
//! what a proxy plugin may export (`exports` from 2.1; containerd before that doesn't know the key), and
//! what it says it can do (`capabilities` from 1.7.23): with `remap-ids`, containerd leaves the ids of
//! containers in user namespaces to us, else it changes owners in a copy.

use std::fmt::Write as _;
use std::path::Path;
use std::str::FromStr;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a containerd version: expected X.Y.Z")]
pub struct BadVersion(String);

impl FromStr for Version {
    type Err = BadVersion;

    /// Takes what containerd and Debian print: `v2.1.9`, `1.6.20~ds1`, `1.7.24+unknown`, `2.1`.
    fn from_str(text: &str) -> Result<Self, BadVersion> {
        let bad = || BadVersion(text.chars().take(40).collect());
        let digits = text.strip_prefix('v').unwrap_or(text);
        let end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
        let mut parts = digits[..end].trim_end_matches('.').split('.').map(str::parse::<u32>);
        let mut next = || parts.next().transpose().map_err(|_| bad());
        let major = next()?.ok_or_else(bad)?;
        let minor = next()?.ok_or_else(bad)?;
        Ok(Self { major, minor, patch: next()?.unwrap_or(0) })
    }
}

const fn version(major: u32, minor: u32, patch: u32) -> Version {
    Version { major, minor, patch }
}

/// The node that containerd runs on.
#[derive(Clone, Copy, Debug)]
pub struct Host<'a> {
    /// skimmerd's.
    pub socket: &'a Path,
    pub root: &'a Path,
    /// In OCI's words.
    pub platform: &'a str,
    /// Whether the kernel can mount layers with a container's ids.
    pub maps_ids: bool,
}

/// Configuration for `containerd`: a whole file if there is none, else lines to merge into it.
pub fn render(containerd: Version, host: &Host<'_>) -> String {
    let mut out = String::new();
    let mut line = |text: &str| {
        let _ = writeln!(out, "{text}");
    };
    let three = containerd >= version(2, 0, 0);
    line(if three { "version = 3" } else { "version = 2" });
    line("");
    line("[proxy_plugins.skimmer]");
    line("  type = \"snapshot\"");
    line(&format!("  address = {}", quoted(host.socket)));
    if containerd >= version(1, 7, 23) && host.maps_ids {
        line("  capabilities = [\"remap-ids\"]");
    }
    if containerd >= version(2, 1, 0) {
        line("  [proxy_plugins.skimmer.exports]");
        line(&format!("    root = {}", quoted(host.root)));
        line("    enable_remote_snapshot_annotations = \"true\"");
    }
    line("");
    line(if three {
        "[plugins.\"io.containerd.cri.v1.images\"]"
    } else {
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd]"
    });
    line("  snapshotter = \"skimmer\"");
    line("  disable_snapshot_annotations = false");
    if three {
        for snapshotter in ["overlayfs", "skimmer"] {
            line("");
            line("[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]");
            line(&format!("  platform = \"{}\"", host.platform));
            line(&format!("  snapshotter = \"{snapshotter}\""));
        }
    }
    out
}

/// A TOML basic string. Paths that aren't UTF-8 can't stand in TOML at all.
fn quoted(path: &Path) -> String {
    format!("{:?}", path.to_string_lossy())
}

/// This machine's platform in OCI's words.
pub fn host_platform() -> String {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("linux/{arch}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_versions_as_programs_print_them() {
        for (text, expected) in [
            ("1.6.20", version(1, 6, 20)),
            ("v2.1.9", version(2, 1, 9)),
            ("1.6.20~ds1", version(1, 6, 20)),
            ("1.7.24+unknown", version(1, 7, 24)),
            ("2.1", version(2, 1, 0)),
            ("2.0.0-rc.1", version(2, 0, 0)),
        ] {
            assert_eq!(text.parse::<Version>().unwrap(), expected, "{text}");
        }
        for text in ["", "v", "2", "x.y", "two.one"] {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
    }

    #[test]
    fn each_version_gets_only_keys_it_knows() {
        let (socket, root) = (Path::new("/s.sock"), Path::new("/r"));
        let render = |v: &str, maps_ids: bool| {
            let host = Host { socket, root, platform: "linux/amd64", maps_ids };
            let text = render(v.parse().unwrap(), &host);
            toml::from_str::<toml::Table>(&text).unwrap()
        };
        for (v, config, capabilities, exports, unpack) in [
            ("1.6.20", 2, false, false, 0),
            ("1.7.22", 2, false, false, 0),
            ("1.7.24", 2, true, false, 0),
            ("2.0.5", 3, true, false, 2),
            ("2.1.9", 3, true, true, 2),
        ] {
            let table = render(v, false);
            assert_eq!(table["proxy_plugins"]["skimmer"].get("capabilities"), None, "{v}");
            let table = render(v, true);
            let plugin = &table["proxy_plugins"]["skimmer"];
            assert_eq!(table["version"].as_integer(), Some(config), "{v}");
            assert_eq!(plugin["type"].as_str(), Some("snapshot"), "{v}");
            let found = plugin.get("capabilities").map(ToString::to_string);
            assert_eq!(found.as_deref(), capabilities.then_some("[\"remap-ids\"]"), "{v}");
            assert_eq!(plugin.get("exports").is_some(), exports, "{v}");
            let entries = table["plugins"]
                .get("io.containerd.transfer.v1.local")
                .map_or(0, |t| t["unpack_config"].as_array().unwrap().len());
            assert_eq!(entries, unpack, "{v}");
        }
    }
}
