//! Layers that are larger than they look: files beyond 4 GiB, and a bomb of ten million entries.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use skimmer_integration::command::{self, PATIENCE, failure_of};
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::Plan;
use skimmer_integration::layer::{Blob, Format, Layer, gzip, noise};
use skimmer_integration::node::Node;
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::streamed::Streamed;
use skimmer_integration::tar::{Header, Tar};

use crate::fixtures::{blobs, busybox, mount_point, small};
use crate::indexes;
use crate::lifecycle::disk_usage;

const GIB: u64 = 1 << 30;
/// Length of the marks in files that are otherwise zeros.
const MARK: usize = 10_000;
const BIG: u64 = 4 * GIB + (5 << 20);
/// One of them lies across the 4 GiB.
const BIG_MARKS: [u64; 3] = [0, 4 * GIB - 5000, BIG - MARK as u64];
const SPARSE: u64 = 6 * GIB + 77;
const SPARSE_MARKS: [u64; 3] = [4096, 4 * GIB + 4096, 5 * GIB + 123];

fn mark(at: u64) -> Vec<u8> {
    noise(at + 1, MARK)
}

/// A file of [`BIG`] bytes in full: zeros but for the marks.
fn big(scenario: &Scenario) -> anyhow::Result<Layer> {
    let mut layer = Streamed::new(&blobs(scenario))?;
    layer.write_all(&Tar::new().dir("huge/").cut())?;
    layer.write_all(&Header { size: BIG, ..Header::new("huge/big", b'0') }.block())?;
    let zeros = vec![0; 1 << 20];
    let mut at = 0;
    for start in BIG_MARKS {
        while at < start {
            let step = zeros.len().min(usize::try_from(start - at)?);
            layer.write_all(&zeros[..step])?;
            at += step as u64;
        }
        layer.write_all(&mark(start))?;
        at += MARK as u64;
    }
    anyhow::ensure!(at == BIG && BIG.is_multiple_of(512), "the file has {at} bytes");
    layer.write_all(&zeros[..1024])?;
    layer.finish()
}

/// A sparse file as GNU tar stores it in `format`.
fn sparse(scenario: &Scenario, format: &str) -> anyhow::Result<Layer> {
    let folder = scenario.path(&format!("tar-{format}"));
    std::fs::create_dir_all(folder.join("huge"))?;
    let file = File::create(folder.join(format!("huge/sparse-{format}")))?;
    file.set_len(SPARSE)?;
    for at in SPARSE_MARKS {
        file.write_all_at(&mark(at), at)?;
    }
    let tar = scenario.path(&format!("{format}.tar"));
    let arguments = [
        "--create".to_owned(),
        "--sparse".to_owned(),
        format!("--format={format}"),
        format!("--file={}", tar.display()),
        format!("--directory={}", folder.display()),
        "huge".to_owned(),
    ];
    command::run("tar", arguments)?;
    Layer::of(&std::fs::read(&tar)?, Format::Gzip, &blobs(scenario))
}

/// The files have their names, sizes and bytes.
fn check(root: &Path) -> anyhow::Result<()> {
    let mut names: Vec<_> = std::fs::read_dir(root.join("huge"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<anyhow::Result<_>>()?;
    names.sort();
    anyhow::ensure!(names == ["big", "sparse-gnu", "sparse-posix"], "files {names:?}");
    for name in names {
        let (size, marks) = if name == "big" { (BIG, BIG_MARKS) } else { (SPARSE, SPARSE_MARKS) };
        let file = File::open(root.join("huge").join(&name))?;
        let found = file.metadata()?.size();
        anyhow::ensure!(found == size, "{name} has {found} bytes");
        let mut bytes = vec![1; MARK];
        for at in marks {
            file.read_exact_at(&mut bytes, at).with_context(|| format!("read {name} at {at}"))?;
            anyhow::ensure!(bytes == mark(at), "other bytes in {name} at {at}");
        }
        for hole in [marks[0] + MARK as u64, 3 * GIB, marks[1] + MARK as u64] {
            file.read_exact_at(&mut bytes, hole)?;
            anyhow::ensure!(bytes.iter().all(|byte| *byte == 0), "{name}: no zeros at {hole}");
        }
        anyhow::ensure!(file.read_at(&mut bytes, size)? == 0, "{name} goes on behind its end");
    }
    Ok(())
}

#[test]
fn files_beyond_4_gib_are_read_pulled_through_and_lazily() {
    scenario("huge-files", |scenario| {
        let registry = Registry::start(scenario)?;
        let layers = vec![
            busybox(scenario, Format::Gzip)?,
            big(scenario)?,
            sparse(scenario, "gnu")?,
            sparse(scenario, "posix")?,
        ];
        let image = Plan::new("huge/files", layers).build(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        let mut node = Node::start(scenario, Version::V2)?;

        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let view = node.view(&image, &mount_point(scenario, "whole"))?;
        check(view.path())?;
        drop(view);
        // Zeros are holes.
        let used = disk_usage(&node.skimmerd.root().join("cache"));
        anyhow::ensure!(used < 100 << 20, "{used} bytes on disk");
        let files = indexes::export(scenario, &node, &image)?;
        node.containerd.remove_image(&reference)?;
        node.skimmerd.terminate()?;
        node.skimmerd.wipe()?;
        node.skimmerd.run()?;
        node.wait_connected()?;
        indexes::import(&node, &files)?;

        let before = registry.sent(&image.layers[1].blob.digest).bytes;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let view = node.view(&image, &mount_point(scenario, "lazy"))?;
        check(view.path())?;
        let sent = registry.sent(&image.layers[1].blob.digest).bytes - before;
        let whole = image.layers[1].blob.size;
        anyhow::ensure!(sent < whole / 2, "{sent} of {whole} bytes were fetched to read little");
        Ok(())
    });
}

/// Entries of the bomb with names of their own: more than any layer may have.
const DISTINCT: u32 = 4_100_000;
/// All of its entries.
const ENTRIES: u64 = 10_000_000;
/// Entries of each gzip member that the rest is made of.
const MEMBER: u64 = 1 << 15;
/// Where a header has its checksum.
const SUM: std::ops::Range<usize> = 148..156;

/// A layer of [`ENTRIES`] empty files.
fn bomb(scenario: &Scenario) -> anyhow::Result<Layer> {
    let header = |number: u32| Header::new(format!("{number:08}"), b'0').block();
    let mut layer = Streamed::new(&blobs(scenario))?;
    let mut block = header(0);
    // What all headers have in common counts once; a name's digits, and blanks for the sum, are added.
    let common = |at: &usize| *at >= 8 && !SUM.contains(at);
    let common: u32 = (0..512).filter(common).map(|at| u32::from(block[at])).sum();
    let mut part = Vec::with_capacity(1 << 20);
    for number in 0..DISTINCT {
        let mut left = number;
        for digit in block[..8].iter_mut().rev() {
            *digit = b'0' + u8::try_from(left % 10)?;
            left /= 10;
        }
        let name: u32 = block[..8].iter().map(|byte| u32::from(*byte)).sum();
        let mut sum = common + name + 8 * u32::from(b' ');
        for digit in block[SUM.start..SUM.start + 6].iter_mut().rev() {
            *digit = b'0' + u8::try_from(sum % 8)?;
            sum /= 8;
        }
        part.extend_from_slice(&block);
        if part.len() >= 1 << 20 {
            layer.write_all(&part)?;
            part.clear();
        }
    }
    layer.write_all(&part)?;
    anyhow::ensure!(block == header(DISTINCT - 1), "a header differs from the fixture's own");
    let distinct = layer.finish()?;
    let member = gzip(&block.repeat(usize::try_from(MEMBER)?))?;
    let mut file = std::fs::OpenOptions::new().append(true).open(&distinct.blob.path)?;
    for _ in 0..(ENTRIES - u64::from(DISTINCT)).div_ceil(MEMBER) {
        file.write_all(&member)?;
    }
    Ok(Layer { blob: Blob::of_file(&distinct.blob.path)?, ..distinct })
}

/// The most memory that a process ever had resident (proc(5), `VmHWM`), in bytes.
fn peak_memory(process: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

#[test]
fn a_bomb_of_ten_million_entries_is_refused() {
    scenario("entry-bomb", |scenario| {
        let registry = Registry::start(scenario)?;
        let bomb = bomb(scenario)?;
        let digest = bomb.blob.digest;
        eprintln!("the bomb has {} bytes", bomb.blob.size);
        let image = Plan::new("bomb/entries", vec![busybox(scenario, Format::Gzip)?, bomb])
            .build(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        let honest = small(scenario, "bomb/honest")?;
        let good = registry.add(&honest)?;
        let node = Node::start(scenario, Version::V2)?;
        node.skimmerd.expect_log(&digest.to_string());
        node.containerd.pull(&Pull::new(&good, "skimmer"))?;
        let start = Instant::now();
        let mut pull = node.skimmerd.skimmer(&["pull", &reference])?;
        let pull = std::thread::spawn(move || failure_of(&mut pull, PATIENCE));
        // Meanwhile, another image is served.
        let mut runs = 0;
        while !pull.is_finished() {
            let id = format!("meanwhile-{runs}");
            let program = ["wc", "-c", "/data/bomb-honest"];
            let said = node.containerd.run_image(&good, "skimmer", &id, &program)?;
            anyhow::ensure!(said.starts_with("8388608"), "{said}");
            runs += 1;
        }
        let said = pull.join().map_err(|_| anyhow::anyhow!("the pull panicked"))??;
        anyhow::ensure!(start.elapsed() < Duration::from_secs(90), "took {:?}", start.elapsed());
        for part in [&image.name, &digest.to_string(), "entries"] {
            anyhow::ensure!(said.contains(part), "{part} is not in {said}");
        }
        let peak = peak_memory(node.skimmerd.id().context("skimmerd is gone")?)?;
        eprintln!("refused after {:?}, {} MiB at most, {runs} runs", start.elapsed(), peak >> 20);
        anyhow::ensure!(peak < 3 * GIB, "skimmerd had {} MiB resident", peak >> 20);
        Ok(())
    });
}
