//! Readers that mean harm: they get their bytes, and nobody else goes without.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use rustix::process::setpriority_process;
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, noise};
use skimmer_integration::memory_limit::MemoryLimit;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{self, MountMode};
use skimmer_integration::snapshots::View;

use crate::fixtures::{blobs, data, mount_point, seed};
use crate::indexes;

const MIB: usize = 1 << 20;
const IMAGES: usize = 6;
/// Of each image.
const BYTES: usize = 24 * MIB;
/// Of each image: all of them wait at once.
const READERS: usize = 100;
const TIME: Duration = Duration::from_secs(20);
/// What a read of somebody else may take meanwhile; all reads of the crowd take their turns in it many times over.
const LONGEST: Duration = Duration::from_secs(5);
/// The bound for a busy node, with the pages of its files.
const MEMORY: u64 = 256 << 20;
/// Between the seeds of readers, so that all read elsewhere.
const STRIDE: u64 = 0x9e37_79b9;

fn image(scenario: &Scenario, number: usize) -> anyhow::Result<Image> {
    let name = format!("hostile-{number}");
    let layer = data(scenario, &name, BYTES, Format::Gzip)?;
    Plan::new(&format!("hostile/{number}"), vec![layer]).build(&blobs(scenario))
}

/// Whether skimmerd has a part in each read.
fn is_served() -> bool {
    MountMode::of_this_run() != MountMode::Kernel
}

/// `direct`: for reads past the page cache, which are all the file system's.
fn open(path: &Path, direct: bool) -> anyhow::Result<File> {
    let flags = if direct { OFlag::O_DIRECT } else { OFlag::empty() };
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path);
    file.with_context(|| format!("open {}", path.display()))
}

/// A read of 4 KiB somewhere in the file, checked.
fn read(file: &File, expected: &[u8], random: u64) -> anyhow::Result<()> {
    let at = usize::try_from(random)? % (BYTES - 4096);
    let mut part = [0; 4096];
    file.read_exact_at(&mut part, at as u64)?;
    anyhow::ensure!(part == expected[at..at + 4096], "wrong bytes at {at}");
    Ok(())
}

fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn readers_without_number_find_a_daemon_within_its_memory() {
    scenario("hostile-readers", |scenario| {
        let registry = Registry::start(scenario)?;
        let images: Vec<Image> =
            (0..IMAGES).map(|number| image(scenario, number)).collect::<anyhow::Result<_>>()?;
        let limit = MemoryLimit::new(&format!("skimmer-{}", std::process::id()), MEMORY)?;
        let setup = Setup {
            skimmerd: skimmerd::Setup {
                memory: Some(limit.members()),
                ..skimmerd::Setup::default()
            },
            ..Setup::default()
        };
        let mut node = Node::start_with(scenario, Version::V2, &setup)?;
        let references: Vec<String> =
            images.iter().map(|image| registry.add(image)).collect::<anyhow::Result<_>>()?;
        let known: Vec<_> = images.iter().zip(references.iter().map(String::as_str)).collect();
        indexes::learn(scenario, &mut node, &known)?;
        let mut views: Vec<(View, PathBuf, Vec<u8>)> = Vec::new();
        for (number, (image, reference)) in images.iter().zip(&references).enumerate() {
            node.containerd.pull(&Pull::new(reference, "skimmer"))?;
            let name = format!("hostile-{number}");
            let view = node.view(image, &mount_point(scenario, &name))?;
            let path = view.path().join("data").join(&name);
            views.push((view, path, noise(seed(&name), BYTES)));
        }
        let process = node.skimmerd.id();
        let stop = AtomicBool::new(false);
        let ((one, longest), many) = std::thread::scope(|scope| {
            let (victim, crowd) = views.split_first().context("no views")?;
            let mut readers = Vec::new();
            for (number, (_, path, expected)) in crowd.iter().enumerate() {
                for reader in 0..READERS {
                    let state = (number * READERS + reader + 1) as u64 * STRIDE;
                    let (stop, direct) = (&stop, is_served() && reader % 2 == 0);
                    readers.push(scope.spawn(move || harm(path, expected, state, direct, stop)));
                }
            }
            let one = read_calmly(&victim.1, &victim.2);
            stop.store(true, Ordering::Relaxed);
            let mut many = 0;
            for reader in readers {
                many += reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
            }
            anyhow::Ok((one?, many))
        })?;
        println!("{one} reads of the one, at most {longest:?}; {many} of the many");
        anyhow::ensure!(longest < LONGEST, "one waited {longest:?}");
        drop(views);
        anyhow::ensure!(limit.kills()? == 0, "skimmerd was killed for its memory");
        anyhow::ensure!(node.skimmerd.id() == process, "skimmerd was restarted");
        let resident = resident(process.context("skimmerd doesn't run")?)?;
        anyhow::ensure!(resident < MEMORY, "{resident} bytes resident");
        drop(node);
        drop(limit);
        Ok(())
    });
}

/// One of those who read as fast as they can, until `stop`: how often it did.
fn harm(
    path: &Path,
    expected: &[u8],
    mut state: u64,
    direct: bool,
    stop: &AtomicBool,
) -> anyhow::Result<u64> {
    // Containers have shares of the processors; these are threads of one process.
    setpriority_process(None, 19)?;
    let (file, mut reads) = (open(path, direct)?, 0);
    while !stop.load(Ordering::Relaxed) {
        read(&file, expected, next(&mut state))?;
        if !direct {
            // Each read is to be the file system's. Those who say so wait for each other in the kernel.
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
        reads += 1;
    }
    Ok(reads)
}

/// One that means no harm, on a layer of its own, for a time: how often it read, and the longest read.
fn read_calmly(path: &Path, expected: &[u8]) -> anyhow::Result<(u64, Duration)> {
    let (file, mut state) = (open(path, is_served())?, 77);
    let (began, mut reads, mut longest) = (Instant::now(), 0, Duration::ZERO);
    while began.elapsed() < TIME {
        let start = Instant::now();
        read(&file, expected, next(&mut state))?;
        longest = longest.max(start.elapsed());
        reads += 1;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok((reads, longest))
}

fn resident(process: u32) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib << 10)
}
