//! What reviews forget: headers, sizes, the direction of dependencies, the purity of the pure crates.
#![expect(clippy::unwrap_used, reason = "a panic is how this test reports")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Which of our crates each crate may use. The data path points down: snapshots → layers → cache → Source.
const CRATES: [(&str, &str, &[&str]); 19] = [
    ("proto", "skimmer-proto", &[]),
    ("proto/identity", "skimmer-identity", &["skimmer-proto"]),
    ("proto/service", "skimmer-service", &["skimmer-identity"]),
    ("snapshotter/index", "skimmer-index", &["skimmer-proto"]),
    ("snapshotter/store", "skimmer-store", &[]),
    ("snapshotter/keeper", "skimmer-keeper", &[]),
    ("snapshotter/cache", "skimmer-cache", &["skimmer-proto", "skimmer-store"]),
    ("snapshotter/registry", "skimmer-registry", &["skimmer-cache", "skimmer-proto"]),
    (
        "snapshotter/swarm",
        "skimmer-swarm",
        // The scheduler only for its tests.
        &[
            "skimmer-cache",
            "skimmer-identity",
            "skimmer-proto",
            "skimmer-scheduler",
            "skimmer-service",
            "skimmer-store",
        ],
    ),
    (
        "snapshotter/layers",
        "skimmer-layers",
        &["skimmer-cache", "skimmer-index", "skimmer-keeper", "skimmer-proto", "skimmer-store"],
    ),
    (
        "snapshotter/snapshots",
        "skimmer-snapshots",
        &["skimmer-cache", "skimmer-layers", "skimmer-proto", "skimmer-store"],
    ),
    ("snapshotter/cri", "skimmer-cri", &["skimmer-proto", "skimmer-registry"]),
    (
        "snapshotter/daemon",
        "skimmer-daemon",
        &[
            "skimmer-cache",
            "skimmer-cri",
            "skimmer-identity",
            "skimmer-index",
            "skimmer-keeper",
            "skimmer-layers",
            "skimmer-proto",
            "skimmer-registry",
            "skimmer-service",
            "skimmer-snapshots",
            "skimmer-store",
            "skimmer-swarm",
        ],
    ),
    ("snapshotter/cli", "skimmer-cli", &["skimmer-proto"]),
    ("control-plane/scheduler", "skimmer-scheduler", &["skimmer-proto"]),
    ("control-plane/store", "skimmer-control-store", &[]),
    (
        "control-plane/manager",
        "skimmer-manager",
        &["skimmer-control-store", "skimmer-identity", "skimmer-proto"],
    ),
    (
        "control-plane/server",
        "skimmer-control",
        &[
            "skimmer-control-store",
            "skimmer-identity",
            "skimmer-manager",
            "skimmer-proto",
            "skimmer-scheduler",
            "skimmer-service",
        ],
    ),
    (
        "integration",
        "skimmer-integration",
        &["skimmer-identity", "skimmer-proto", "skimmer-scheduler", "skimmer-swarm"],
    ),
];

/// Pure crates: no runtime, no files, no network, no clock.
const PURE: [(&str, &[&str]); 3] = [
    (
        "proto",
        &[
            "blake3",
            "hex",
            "prost",
            "prost-types",
            "serde",
            "sha2",
            "thiserror",
            "tonic",
            "tonic-prost",
        ],
    ),
    ("control-plane/scheduler", &["skimmer-proto", "thiserror"]),
    (
        "snapshotter/index",
        &[
            "base64",
            "blake3",
            "crc32fast",
            "hex",
            "serde",
            "serde_json",
            "sha2",
            "skimmer-proto",
            "thiserror",
            "zstd",
            "zstd-safe",
        ],
    ),
];

const TOP_LEVEL: [&str; 14] = [
    ".ci",
    ".clippy.toml",
    ".config",
    ".git",
    ".gitignore",
    ".rustfmt.toml",
    "Cargo.lock",
    "Cargo.toml",
    "README.md",
    "control-plane",
    "install",
    "integration",
    "proto",
    "snapshotter",
];

/// Lines of a file before its tests, unless its header has a line that begins with [`REASON`].
const LINES: usize = 500;
const REASON: &str = "//! Long: ";

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every file of the repository below `folder`.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        if entry.file_type().unwrap().is_dir() {
            if name != "target" && name != ".git" {
                files(&entry.path(), found);
            }
        } else {
            found.push(entry.path());
        }
    }
}

fn sources() -> Vec<(PathBuf, String)> {
    let mut all = Vec::new();
    files(&top(), &mut all);
    all.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    all.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

fn manifest(folder: &str) -> toml::Table {
    std::fs::read_to_string(top().join(folder).join("Cargo.toml")).unwrap().parse().unwrap()
}

fn keys(manifest: &toml::Table, section: &str) -> BTreeSet<String> {
    manifest
        .get(section)
        .and_then(toml::Value::as_table)
        .map(|t| t.keys().cloned().collect())
        .unwrap_or_default()
}

#[test]
fn every_source_has_a_header() {
    for (path, text) in sources() {
        assert!(text.starts_with("//! "), "{} doesn't begin with a //! header", path.display());
    }
}

#[test]
fn sources_are_short() {
    for (path, text) in sources() {
        let lines = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count();
        let reason = text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .any(|line| line.starts_with(REASON));
        assert!(
            lines <= LINES
                || reason
                || path.ends_with("tests.rs")
                || path.components().any(|c| c.as_os_str() == "tests"),
            "{}: {lines} lines before its tests, and no header line `{REASON}…`",
            path.display()
        );
    }
}

#[test]
fn modules_are_named_for_what_they_hold() {
    for (path, _) in sources() {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        assert!(
            !["mod", "util", "utils", "common", "helpers", "types"].contains(&name.as_str()),
            "{}: not a name for a module",
            path.display()
        );
    }
}

#[test]
fn dependencies_point_down() {
    let workspace = manifest(".");
    let members = workspace["workspace"]["members"].as_array().unwrap();
    let members: BTreeSet<&str> = members.iter().map(|member| member.as_str().unwrap()).collect();
    let known: BTreeSet<&str> = CRATES.iter().map(|(folder, ..)| *folder).collect();
    assert_eq!(members, known, "the workspace's members and this test's");
    for (folder, name, allowed) in CRATES {
        let manifest = manifest(folder);
        assert_eq!(manifest["package"]["name"].as_str(), Some(name));
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let ours =
                keys(&manifest, section).into_iter().filter(|key| key.starts_with("skimmer-"));
            for dependency in ours.filter(|dependency| dependency != name) {
                assert!(
                    allowed.contains(&dependency.as_str()),
                    "{name} must not depend on {dependency}"
                );
            }
        }
    }
}

#[test]
fn pure_crates_depend_on_pure_crates_only() {
    for (folder, allowed) in PURE {
        for dependency in keys(&manifest(folder), "dependencies") {
            assert!(
                allowed.contains(&dependency.as_str()),
                "{folder}: {dependency} is not on the pure allow-list"
            );
        }
    }
}

#[test]
fn every_crate_obeys_the_workspace_lints() {
    for (folder, name, _) in CRATES {
        assert_eq!(manifest(folder)["lints"]["workspace"].as_bool(), Some(true), "{name}");
    }
}

#[test]
fn crates_come_from_crates_io() {
    let lock = std::fs::read_to_string(top().join("Cargo.lock")).unwrap();
    for line in lock.lines().filter(|line| line.starts_with("source = ")) {
        assert_eq!(line, r#"source = "registry+https://github.com/rust-lang/crates.io-index""#);
    }
}

#[test]
fn nothing_is_left_for_later() {
    // Spelled apart, so that this file may be searched too.
    let markers = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
    ];
    let mut all = Vec::new();
    files(&top(), &mut all);
    for path in all {
        // Binary files hold no markers.
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        for marker in markers {
            assert!(!text.contains(marker), "{} says {marker}", path.display());
        }
    }
}

#[test]
fn the_top_level_is_the_map() {
    for entry in std::fs::read_dir(top()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            TOP_LEVEL.contains(&name.as_str()) || name == "target",
            "{name} doesn't belong at the top level"
        );
    }
}
