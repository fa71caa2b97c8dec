//! How fast files are read whose bytes are on this node's disk.

use skimmer_integration::debian;
use skimmer_integration::world::{World, drop_caches};

use crate::figure::{Bar, Bench, Figure, Outcome};
use crate::pairs::{Sample, alternate};
use crate::running::Running;

pub const FIGURE: Figure = Figure {
    name: "read-local",
    what: "layer local, page cache cold: throughput of reading a large file in order ÷ overlayfs's",
    unit: "ratio",
    bar: Bar::AtLeast(0.5),
    aim: 0.9,
    against: Some("containerd overlayfs"),
    measure,
};

/// Reads a file in order; prints its length and the seconds it took.
pub const PROGRAM: &str = "
import os, time
room = bytearray(1 << 20)
start = time.perf_counter()
file = os.open('/FILE', os.O_RDONLY)
length = 0
while (count := os.readv(file, [room])) > 0:
    length += count
print(length, time.perf_counter() - start)
";

/// Also of what the kernel serves: it is the same reading.
pub fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let image = debian::single_layer(&bench.scenario.path("blobs"))?;
    let world = World::near(bench.scenario, image)?;
    let running = Running::start(&world)?;
    running.grow_cold()?;
    let program = PROGRAM.replace("FILE", debian::LARGE_FILE);
    alternate(bench, world.settings()?, |way| {
        drop_caches()?;
        let numbers = running.python(way, &program)?;
        let [length, seconds] = numbers[..] else { anyhow::bail!("got {numbers:?}") };
        anyhow::ensure!(length > 3e8, "the file has only {length} bytes");
        Ok(Sample {
            value: length / 1e6 / seconds,
            details: vec![("seconds", seconds), ("file_mb", length / 1e6)],
        })
    })
}
