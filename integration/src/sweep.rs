//! Removing what a scenario left: processes, containers, control groups, mounts, namespaces, files.
//!
//! Used by every scenario at its end, and at its start for scenarios whose process was killed. Only what carries
//! a scenario's own folder name is touched.

use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{command, mounts, systemd};

/// Scenario folders are `<temp>/skit-<pid>-<number>`.
pub const PREFIX: &str = "skit-";

/// Sweeps up after scenarios whose process no longer runs.
pub fn abandoned(temp: &Path) {
    matching(temp, |process| !Path::new("/proc").join(process).exists());
}

/// Sweeps up after this process's own scenarios, which are not going on.
pub fn own(temp: &Path) {
    let own = std::process::id().to_string();
    matching(temp, |process| process == own);
}

/// Sweeps up after the scenarios of the processes that `chosen` chooses by their ids.
fn matching(temp: &Path, chosen: impl Fn(&str) -> bool) {
    let of_chosen = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        process.is_some_and(&chosen)
    };
    for left in children(temp).into_iter().filter(of_chosen) {
        folder(&left);
        let _ = remove(&left);
    }
    for namespace in children(Path::new("/run/netns")).into_iter().filter(of_chosen) {
        let _ = command::run(
            "ip",
            ["netns".as_ref(), "delete".as_ref(), namespace.file_name().unwrap_or_default()],
        );
    }
}

/// Ends every process that names `folder` in its command line, then unmounts what is below.
pub fn folder(folder: &Path) {
    containers(folder);
    for process in processes_naming(folder) {
        let _ = kill(process, Signal::SIGKILL);
    }
    let _ = command::wait_for("processes end", std::time::Duration::from_secs(10), || {
        processes_naming(folder).is_empty().then_some(())
    });
    systemd::sweep_groups(folder);
    mounts::unmount_below(folder);
}

/// Deletes `folder`, unless something is still mounted below: that would delete someone else's files.
pub fn remove(folder: &Path) -> anyhow::Result<()> {
    let left = mounts::below(folder);
    anyhow::ensure!(left.is_empty(), "still mounted: {left:?}");
    // Layers may hold directories without write permission and immutable leftovers; root's rm copes with the first.
    command::run("rm", [Path::new("-rf"), folder])?;
    Ok(())
}

/// The processes whose command line names `folder`, without this one.
pub fn processes_naming(folder: &Path) -> Vec<Pid> {
    let Some(needle) = folder.to_str() else { return Vec::new() };
    let own = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|n| *n != own).and_then(|n| n.parse().ok()) else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if names(&String::from_utf8_lossy(&line), needle) {
            found.push(Pid::from_raw(pid));
        }
    }
    found
}

/// Whether `line` names `folder`, not only another one with a longer number.
fn names(line: &str, folder: &str) -> bool {
    let mut rests = line.match_indices(folder).map(|(at, _)| &line[at + folder.len()..]);
    rests.any(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
}

/// Ends the containers of the containerds in `folder`: runc keeps them under `<…>/runc/<namespace>/<id>`.
fn containers(folder: &Path) {
    for state in find_named(folder, "runc", 3) {
        for namespace in children(&state) {
            for container in children(&namespace) {
                let id = container.file_name().unwrap_or_default();
                let arguments = [
                    "--root".as_ref(),
                    namespace.as_os_str(),
                    "delete".as_ref(),
                    "--force".as_ref(),
                    id,
                ];
                let _ = command::run("runc", arguments);
            }
        }
    }
}

pub(crate) fn children(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn find_named(folder: &Path, name: &str, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for child in children(folder) {
        if child.is_symlink() || !child.is_dir() {
            continue;
        }
        if child.file_name().is_some_and(|n| n == name) {
            found.push(child);
        } else if depth > 1 {
            found.extend(find_named(&child, name, depth - 1));
        }
    }
    found
}

#[test]
fn a_scenario_is_not_another_whose_number_begins_as_its_own() {
    let own = "/tmp/skit-7-1";
    for line in
        [own, "skimmerd\0--config\0/tmp/skit-7-1/config.toml", "/tmp/skit-7-14 /tmp/skit-7-1"]
    {
        assert!(names(line, own), "{line}");
    }
    for line in ["", "skimmerd", "/tmp/skit-7-14/config.toml", "/tmp/skit-71-1"] {
        assert!(!names(line, own), "{line}");
    }
}
