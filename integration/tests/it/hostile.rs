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
/// Apart from each other, so that all read elsewhere.
const SEED: u64 = 0x9e37_79b9;

fn image(scenario: &Scenario, number: usize) -> anyhow::Result<Image> {
    let name = format!("hostile-{number}");
    let layer = data(scenario, &name, BYTES, Format::Gzip)?;
    Plan::new(&format!("hostile/{number}"), vec![layer]).build(&blobs(scenario))
}

/// Whether skimmerd has a part in each read.
fn is_served() -> bool {
    MountMode::of_this_run() != MountMode::Kernel
}

/// For reads past the page cache where that can be, so that each is one of skimmerd's.
fn open(path: &Path) -> anyhow::Result<File> {
    let flags = if is_served() { OFlag::O_DIRECT } else { OFlag::empty() };
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path);
    file.with_context(|| format!("open {}", path.display()))
}

/// How many reads there were, and the longest.
#[derive(Debug, Default)]
struct Waits {
    reads: u64,
    longest: Duration,
}

impl Waits {
    fn time<T>(&mut self, read: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = read();
        self.reads += 1;
        self.longest = self.longest.max(start.elapsed());
        result
    }
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
        let (one, many) = std::thread::scope(|scope| {
            let (victim, crowd) = views.split_first().context("no views")?;
            let mut readers = Vec::new();
            for (number, (_, path, expected)) in crowd.iter().enumerate() {
                for reader in 0..READERS {
                    let (stop, seed) = (&stop, (number * READERS + reader + 1) as u64 * SEED);
                    readers.push(scope.spawn(move || harm(path, expected, seed, stop)));
                }
            }
            let one = read_calmly(&victim.1, &victim.2);
            stop.store(true, Ordering::Relaxed);
            let mut many = Vec::new();
            for reader in readers {
                many.push(reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??);
            }
            anyhow::Ok((one?, many))
        })?;
        let reads: u64 = many.iter().map(|waits| waits.reads).sum();
        println!("the one: {one:?}; the many: {reads} reads");
        anyhow::ensure!(one.longest < LONGEST, "one waited {:?}", one.longest);
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

/// One of those who read as fast as they can, until `stop`.
fn harm(path: &Path, expected: &[u8], seed: u64, stop: &AtomicBool) -> anyhow::Result<Waits> {
    // Containers have shares of the processors; these are threads of one process.
    setpriority_process(None, 19)?;
    let (file, mut state, mut waits) = (open(path)?, seed, Waits::default());
    while !stop.load(Ordering::Relaxed) {
        waits.time(|| read(&file, expected, next(&mut state)))?;
        if !is_served() {
            // All who do this wait for each other, in the kernel: it isn't timed.
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
    }
    Ok(waits)
}

/// One that means no harm, on a layer of its own, for a time.
fn read_calmly(path: &Path, expected: &[u8]) -> anyhow::Result<Waits> {
    let (file, mut state, mut waits) = (open(path)?, 77, Waits::default());
    let began = Instant::now();
    while began.elapsed() < TIME {
        waits.time(|| read(&file, expected, next(&mut state)))?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(waits)
}

fn resident(process: u32) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib << 10)
}
