//! The lines that each containerd version needs in its config.toml.
//!
//! Versions differ in three ways: the configuration's version and plugin names (3 from 2.0), the
//! transfer service's `unpack_config` (from 2.0: a snapshotter without an entry fails every pull),
//! and what a proxy plugin may export (`exports` from 2.1; containerd before that doesn't know the
//! key). `capabilities` (from 1.7.23) stays unset. With `remap-ids` containerd would leave the ids of
//! containers in user namespaces to mount options: 1.7 mounts nothing with `uidmap=`, and 2.1 maps a
//! clone of the folder that holds all lower folders, in which our mounts are missing. Without it,
//! containerd changes owners in a copy.

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

/// Configuration for `containerd`: a whole file if there is none, else lines to merge into it.
pub fn render(containerd: Version, socket: &Path, root: &Path, platform: &str) -> String {
    let mut out = String::new();
    let mut line = |text: &str| {
        let _ = writeln!(out, "{text}");
    };
    let three = containerd >= version(2, 0, 0);
    line(if three { "version = 3" } else { "version = 2" });
    line("");
    line("[proxy_plugins.skimmer]");
    line("  type = \"snapshot\"");
    line(&format!("  address = {}", quoted(socket)));
    if containerd >= version(2, 1, 0) {
        line("  [proxy_plugins.skimmer.exports]");
        line(&format!("    root = {}", quoted(root)));
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
            line(&format!("  platform = \"{platform}\""));
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
        let render = |v: &str| {
            let text =
                render(v.parse().unwrap(), Path::new("/s.sock"), Path::new("/r"), "linux/amd64");
            toml::from_str::<toml::Table>(&text).unwrap()
        };
        for (v, config, exports, unpack) in [
            ("1.6.20", 2, false, 0),
            ("1.7.22", 2, false, 0),
            ("1.7.24", 2, false, 0),
            ("2.0.5", 3, false, 2),
            ("2.1.9", 3, true, 2),
        ] {
            let table = render(v);
            let plugin = &table["proxy_plugins"]["skimmer"];
            assert_eq!(table["version"].as_integer(), Some(config), "{v}");
            assert_eq!(plugin["type"].as_str(), Some("snapshot"), "{v}");
            assert_eq!(plugin.get("capabilities"), None, "{v}");
            assert_eq!(plugin.get("exports").is_some(), exports, "{v}");
            let entries = table["plugins"]
                .get("io.containerd.transfer.v1.local")
                .map_or(0, |t| t["unpack_config"].as_array().unwrap().len());
            assert_eq!(entries, unpack, "{v}");
        }
    }
}
