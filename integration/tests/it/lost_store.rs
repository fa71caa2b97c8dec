//! The node's database lost, damaged or older than it was: the snapshots say themselves what there is.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use skimmer_integration::command;
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;
use skimmer_integration::skimmerd;
use skimmer_integration::snapshots::Snapshots;

use crate::fixtures::{md5sum, small};

/// What a client is told of every snapshot, but for the numbers of mounts, which a restart changes.
type Told = BTreeMap<String, (String, Option<Vec<String>>)>;

fn told(node: &Node) -> anyhow::Result<Told> {
    let mut snapshots = Snapshots::connect(&node.skimmerd.address(), "skimmer")?;
    let mut told = Told::new();
    for info in snapshots.list(&[])? {
        let stat = snapshots.stat(&info.name)?;
        anyhow::ensure!(stat.name == info.name && stat.kind == info.kind, "{stat:?}, {info:?}");
        let usage = snapshots.usage(&info.name)?;
        // 3: committed, which has no mounts of its own.
        let mounts = if info.kind == 3 { None } else { Some(snapshots.mounts(&info.name)?) };
        let without_numbers = |option: &String| {
            let parts = option.split(':').map(|part| match part.rsplit_once("/m/") {
                Some((root, number)) if number.parse::<u64>().is_ok() => format!("{root}/m/*"),
                _ => part.to_owned(),
            });
            parts.collect::<Vec<_>>().join(":")
        };
        let mounts = mounts.map(|mounts| {
            let options = mounts.iter().flat_map(|mount| &mount.options);
            options.map(without_numbers).collect()
        });
        let labels: BTreeMap<_, _> = info.labels.iter().collect();
        let times = (&info.created_at, &info.updated_at);
        let all = format!("{} {} {labels:?} {times:?} {usage:?}", info.parent, info.kind);
        told.insert(info.name, (all, mounts));
    }
    Ok(told)
}

fn store(node: &Node) -> PathBuf {
    node.skimmerd.root().join("store-v1")
}

/// The database's files, the largest first, without those that say nothing.
pub fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if ["CURRENT", "MANIFEST"].iter().any(|part| name.starts_with(part))
            || [".sst", ".log"].iter().any(|part| name.ends_with(part))
        {
            files.push((entry.metadata()?.len(), entry.path()));
        }
    }
    files.sort();
    Ok(files.into_iter().rev().map(|(_, path)| path).collect())
}

/// Leaves `share` percent of it.
pub fn cut(path: &Path, share: u64) -> anyhow::Result<()> {
    let file = File::options().write(true).open(path)?;
    Ok(file.set_len(file.metadata()?.len() * share / 100)?)
}

/// Leaves it where an earlier version has its own.
pub fn age(folder: &Path) -> anyhow::Result<()> {
    let earlier = folder.with_file_name("store");
    fs::rename(folder, &earlier)?;
    Ok(fs::write(earlier.join("CURRENT"), "MANIFEST-000000\n")?)
}

/// What becomes of the database's folder while nobody uses it.
type Damage = fn(&Path) -> anyhow::Result<()>;

#[test]
fn a_lost_or_damaged_database_changes_nothing() {
    scenario("lost-store", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "store/image")?;
        let reference = registry.add(&image)?;
        // Where the kernel doesn't serve the layers by itself, somebody has to keep their mounts.
        let skimmerd = skimmerd::Setup { holder: true, ..skimmerd::Setup::default() };
        let setup = Setup { skimmerd, ..Setup::default() };
        let mut node = Node::start_with(scenario, Version::V2, &setup)?;
        let sum = md5sum(scenario, "store-image", 8 << 20)?;
        let sum = sum.trim();
        // Said of each database that is replaced.
        node.skimmerd.expect_log("the metadata could not be read");
        node.skimmerd.expect_log("the database of snapshots is damaged");
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        node.containerd.start_image(&reference, "skimmer", "stays", &["sleep", "1000000"])?;
        node.containerd.exec("stays", &["sh", "-c", "echo mine > /tmp/file"])?;
        node.skimmerd.terminate()?;
        node.skimmerd.run()?;
        let before = told(&node)?;
        anyhow::ensure!(before.len() == 3, "two layers and a container: {before:?}");

        let damages: [(&str, Damage); 8] = [
            ("deleted", |folder| Ok(fs::remove_dir_all(folder)?)),
            ("an earlier version", age),
            ("every file cut", |folder| files(folder)?.iter().try_for_each(|file| cut(file, 50))),
            ("the largest emptied", |folder| cut(files(folder)?.first().context("no file")?, 0)),
            ("the log shortened", |folder| {
                let mut logs = files(folder)?;
                logs.retain(|file| file.extension().is_some_and(|end| end == "log"));
                logs.iter().try_for_each(|file| cut(file, 70))
            }),
            ("garbage", |folder| {
                let fill = |file: &PathBuf| -> anyhow::Result<()> {
                    let len = usize::try_from(fs::metadata(file)?.len())?;
                    Ok(fs::write(file, vec![0x5a; len])?)
                };
                files(folder)?.iter().try_for_each(fill)
            }),
            ("the manifest gone", |folder| {
                let all = files(folder)?;
                let is_manifest = |file: &&PathBuf| file.to_string_lossy().contains("MANIFEST");
                all.iter().filter(is_manifest).try_for_each(|file| Ok(fs::remove_file(file)?))
            }),
            ("empty", |folder| {
                fs::remove_dir_all(folder)?;
                Ok(fs::create_dir(folder)?)
            }),
        ];
        for (number, (what, damage)) in damages.into_iter().enumerate() {
            let failed = || format!("after the database was {what}");
            if number % 2 == 0 {
                node.skimmerd.kill()?
            } else {
                node.skimmerd.terminate()?
            }
            damage(&store(&node))?;
            node.skimmerd.run().with_context(failed)?;
            let after = told(&node).with_context(failed)?;
            anyhow::ensure!(after == before, "{}: {after:#?}\nbefore: {before:#?}", failed());
            node.wait_connected().with_context(failed)?;
            // containerd takes away nothing that it knows.
            node.containerd.collect_garbage(&reference).with_context(failed)?;
            anyhow::ensure!(
                told(&node)? == before,
                "{}, garbage collection: {:#?}",
                failed(),
                told(&node)?
            );
            let read = ["md5sum", "/data/store-image"];
            let said = node.containerd.exec("stays", &read).with_context(failed)?;
            anyhow::ensure!(said.trim() == sum, "{}, who stayed read {said:?}", failed());
            let id = format!("new-{number}");
            let said = node.containerd.run_image(&reference, "skimmer", &id, &read);
            let said = said.with_context(failed)?;
            anyhow::ensure!(said.trim() == sum, "{}, who came read {said:?}", failed());
            // containerd's own collection takes the container's snapshot away, in its own time.
            command::wait_for("the container's snapshot goes", command::PATIENCE, || {
                (told(&node).ok()?.len() == before.len()).then_some(())
            })
            .with_context(failed)?;
        }
        let upper = before.keys().find(|name| name.contains("stays")).context("no container")?;
        let mounts = Snapshots::connect(&node.skimmerd.address(), "skimmer")?.mounts(upper)?;
        let option =
            mounts.iter().flat_map(|m| &m.options).find_map(|o| o.strip_prefix("upperdir="));
        let written =
            fs::read_to_string(Path::new(option.context("no upperdir")?).join("tmp/file"))?;
        anyhow::ensure!(written == "mine\n", "the container's own file: {written:?}");
        node.containerd.remove_container("stays")
    });
}
