//! A layer that is complete, served by the kernel, beside overlayfs over ext4.

use skimmer_integration::debian;
use skimmer_integration::image::Image;
use skimmer_integration::start::Way;
use skimmer_integration::world::{World, drop_caches};

use crate::figure::{Bar, Bench, Figure, Outcome};
use crate::pairs::{Sample, alternate};
use crate::read_local;
use crate::running::Running;

const fn figure(
    name: &'static str,
    what: &'static str,
    measure: fn(&Bench<'_>) -> anyhow::Result<Outcome>,
) -> Figure {
    let (unit, against) = ("ratio", Some("containerd overlayfs on the same file system"));
    Figure { name, what, unit, bar: Bar::AtLeast(0.9), aim: 1.0, against, measure }
}

pub const READ: Figure = figure(
    "graduated-read",
    "graduated layer, caches dropped: throughput of a large file read in order ÷ overlayfs's",
    // Its layer is pulled through, so that it is graduated too.
    read_local::measure,
);

pub const WALK: Figure = figure(
    "graduated-walk",
    "graduated layers, caches dropped: `tar` of the whole tree, trees a second ÷ overlayfs's",
    |bench| measure(bench, debian::numpy, true, WALK_PROGRAM),
);

pub const RANDOM: Figure = figure(
    "graduated-random",
    "graduated layer, caches dropped: random reads of 4 KiB a second ÷ overlayfs's",
    |bench| measure(bench, single, true, RANDOM_PROGRAM),
);

pub const WARM: Figure = figure(
    "graduated-warm",
    "graduated layers, page cache warm: `find / -ls` a second ÷ overlayfs's",
    |bench| measure(bench, debian::numpy, false, WARM_PROGRAM),
);

/// Each prints how much it did a second.
const WALK_PROGRAM: &str = "
import subprocess, time
start = time.perf_counter()
subprocess.run('tar -cf - --one-file-system / | wc -c', shell=True, check=True, stdout=subprocess.DEVNULL)
print(1 / (time.perf_counter() - start))
";

const RANDOM_PROGRAM: &str = "
import os, random, time
file = os.open('/FILE', os.O_RDONLY)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
blocks = os.fstat(file).st_size // 4096
chosen = random.Random(7).sample(range(blocks), 40000)
start = time.perf_counter()
for block in chosen:
    os.pread(file, 4096, block * 4096)
print(len(chosen) / (time.perf_counter() - start))
";

const WARM_PROGRAM: &str = "
import subprocess, time
FIND = 'find / -xdev -ls'.split()
def timed():
    start = time.perf_counter()
    subprocess.run(FIND, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
timed()
print(1 / min(timed() for _ in range(9)))
";

fn single(blobs: &std::path::Path) -> anyhow::Result<Image> {
    debian::single_layer(blobs)
}

fn measure(
    bench: &Bench<'_>,
    image: fn(&std::path::Path) -> anyhow::Result<Image>,
    cold: bool,
    program: &str,
) -> anyhow::Result<Outcome> {
    let world = World::near(bench.scenario, image(&bench.scenario.path("blobs"))?)?;
    // Pulled through, so that every layer is complete when its container starts.
    let running = Running::start(&world)?;
    if cold {
        running.grow_cold()?;
    }
    let program = program.replace("FILE", debian::LARGE_FILE);
    let sample = |way: Way| {
        if cold {
            drop_caches()?;
        }
        let numbers = running.python(way, &program)?;
        let [value] = numbers[..] else { anyhow::bail!("got {numbers:?}") };
        Ok(Sample { value, details: Vec::new() })
    };
    alternate(bench, world.settings()?, sample)
}
