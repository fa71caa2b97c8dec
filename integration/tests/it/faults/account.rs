//! What a node holds on to: snapshots, mounts, files, loop devices, descriptors, memory. Compared before and after faults.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::wait_for;
use skimmer_integration::fleet::Machine;
use skimmer_integration::mounts;
use skimmer_integration::snapshots::Snapshots;

/// The daemon's sockets come and go: other nodes, the registry, containerd, a metrics reader.
const SOCKETS: usize = 24;

/// The journal of requests: made when the first FUSE mount needs it, and there for good.
const REQUESTS: &str = "memfd:skimmer-requests (deleted)";

/// Of the daemon at work, in bytes, with the pages of files that it maps.
const RESIDENT: u64 = 256 << 20;

/// By which the holder, which does nothing, may grow.
const HOLDER_GROWTH: u64 = 1 << 20;

/// Whose files are RocksDB's own business.
const DATABASE: &str = "store-v1";
/// The last one that couldn't be read, kept for people.
const DAMAGED: &str = "store-v1.damaged";

/// How long removal in the background may take.
const SETTLING: Duration = Duration::from_secs(60);

/// Everything that could be lost or leak.
#[derive(Clone, Debug)]
pub struct Account {
    /// Those that containerd lists, and those that skimmerd lists.
    snapshots: [BTreeSet<String>; 2],
    mounts: usize,
    loops: usize,
    files: BTreeSet<PathBuf>,
    /// How many of what kind: the daemon's, and those that its holder keeps.
    descriptors: [BTreeMap<String, usize>; 2],
    resident: u64,
    holder_resident: u64,
}

impl Account {
    /// Of a node that has nothing to do but to serve readers.
    pub fn of(machine: &Machine) -> anyhow::Result<Self> {
        let listed = |socket: &Path| -> anyhow::Result<BTreeSet<String>> {
            let all = Snapshots::connect(socket, "skimmer")?.list(&[])?;
            Ok(all.into_iter().map(|info| info.name).collect())
        };
        let root = machine.skimmerd.root();
        let daemon = machine.skimmerd.id().context("skimmerd doesn't run")?;
        let holder = machine.skimmerd.holder_id().context("no holder runs")?;
        Ok(Self {
            snapshots: [
                listed(&machine.containerd()?.address())?,
                listed(&machine.skimmerd.address())?,
            ],
            mounts: mounts::below(&root).len(),
            loops: loops(&root),
            files: files(&root)?,
            descriptors: [
                descriptors(daemon, &root.join(DATABASE))?,
                descriptors(holder, &root.join(DATABASE))?,
            ],
            resident: resident(daemon)?,
            holder_resident: resident(holder)?,
        })
    }

    /// What is there later and wasn't before, or is gone and should be there.
    fn complaints(&self, later: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut complain = |wrong: bool, what: String| {
            if wrong {
                found.push(what);
            }
        };
        for (before, after) in self.snapshots.iter().zip(&later.snapshots) {
            complain(before != after, format!("snapshots {before:?} became {after:?}"));
        }
        complain(
            later.mounts > self.mounts,
            format!("{} mounts became {}", self.mounts, later.mounts),
        );
        complain(later.loops > self.loops, format!("{} loops became {}", self.loops, later.loops));
        let new: Vec<_> = later.files.difference(&self.files).collect();
        complain(!new.is_empty(), format!("new files {new:?}"));
        let pairs = self.descriptors.iter().zip(&later.descriptors);
        // The daemon has the journal open once more, to give it to a new holder.
        for ((before, after), (whose, sockets, journals)) in
            pairs.zip([("skimmerd's", SOCKETS, 2), ("the holder's", 0, 1)])
        {
            for (kind, count) in after {
                let before = before.get(kind).copied().unwrap_or(0);
                let most = match kind.as_str() {
                    "socket" => before + sockets,
                    REQUESTS => before.max(journals),
                    _ => before,
                };
                complain(
                    *count > most,
                    format!("{whose} {before} descriptors of {kind} became {count}"),
                );
            }
        }
        complain(later.resident > RESIDENT, format!("skimmerd has {} bytes", later.resident));
        complain(
            later.holder_resident > self.holder_resident + HOLDER_GROWTH,
            format!("the holder's {} bytes became {}", self.holder_resident, later.holder_resident),
        );
        found
    }

    /// Waits until there are as many other snapshots in the places of those that are gone, and counts on them and their
    /// files from then on.
    pub fn accept_successors(&mut self, machine: &Machine) -> anyhow::Result<()> {
        let counts = |of: &Self| of.snapshots.each_ref().map(BTreeSet::len);
        let now = wait_for("others have taken the places of what is gone", SETTLING, || {
            let now = Self::of(machine).ok()?;
            (counts(&now) == counts(self)).then_some(now)
        })?;
        (self.snapshots, self.files) = (now.snapshots, now.files);
        Ok(())
    }

    /// Waits until nothing is lost, and nothing there that wasn't before.
    pub fn wait_balanced(&self, machine: &Machine) -> anyhow::Result<()> {
        let mut last = Vec::new();
        wait_for("nothing leaked and nothing was lost", SETTLING, || {
            // What was in use a moment ago, and isn't any more.
            let pruned = machine.skimmerd.ask(&["cache", "prune"]);
            match pruned.and_then(|_| Self::of(machine)) {
                Ok(now) => last = self.complaints(&now),
                Err(error) => last = vec![format!("{error:#}")],
            }
            last.is_empty().then_some(())
        })
        .with_context(|| last.join("\n"))
    }
}

/// Loop devices over files below `root`.
fn loops(root: &Path) -> usize {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let backing = devices
        .filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
    backing.filter(|file| Path::new(file.trim()).starts_with(root)).count()
}

/// Everything below `root` that the daemon makes, but for the database and what layers hold.
fn files(root: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
            let path = entry?.path();
            let is_of_others =
                [DATABASE, DAMAGED, "snapshots/m"].iter().any(|part| path == root.join(part))
                    || path.ends_with("fs")
                    || path.ends_with("work");
            if is_of_others {
                continue;
            }
            if path.is_dir() && !path.is_symlink() {
                folders.push(path.clone());
            }
            found.insert(path.strip_prefix(root)?.to_owned());
        }
    }
    Ok(found)
}

/// How many descriptors of what kind a process has, without those in `database`: those of files by the file's name.
fn descriptors(process: u32, database: &Path) -> anyhow::Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        // One that was closed meanwhile is none.
        let Ok(target) = fs::read_link(entry?.path()) else { continue };
        if target.starts_with(database) {
            continue;
        }
        let text = target.to_string_lossy();
        let kind = text.split(':').next().unwrap_or_default();
        let kind = match target.file_name() {
            Some(name) if text.starts_with('/') => name.to_string_lossy().into_owned(),
            _ => kind.to_owned(),
        };
        *counts.entry(kind).or_default() += 1;
    }
    Ok(counts)
}

/// `VmRSS` (proc(5)), in bytes.
pub fn resident(process: u32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib << 10)
}
