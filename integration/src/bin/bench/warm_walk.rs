//! What is left of the difference once everything is in the page cache.

use skimmer_integration::debian;
use skimmer_integration::start::Way;
use skimmer_integration::world::World;

use crate::figure::{Bar, Bench, Figure, Outcome};
use crate::pairs::{Sample, alternate};
use crate::running::Running;

pub const FIGURE: Figure = Figure {
    name: "warm-walk",
    what: "page cache warm: time of `find / -ls` and of `import numpy` ÷ overlayfs's",
    unit: "ratio",
    bar: Bar::AtMost(1.2),
    aim: 1.0,
    against: Some("containerd overlayfs"),
    measure,
};

/// Prints the number of files that were listed, and the seconds that each command took.
const PROGRAM: &str = "
import subprocess, time
def timed(*command):
    start = time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return output, time.perf_counter() - start
listing, walk = timed(*'find / -path /proc -prune -o -path /sys -prune -o -ls'.split())
_, numpy = timed('python3', '-c', 'import numpy')
print(listing.count(b'\\n'), walk, numpy)
";

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let image = debian::numpy(&bench.scenario.path("blobs"))?;
    let world = World::near(bench.scenario, image)?;
    let running = Running::start(&world)?;
    let mut listed = Vec::new();
    for way in [Way::Skimmer, Way::Overlayfs] {
        listed.push(running.python(way, PROGRAM)?[0]);
    }
    alternate(bench, world.settings()?, |way| {
        let numbers = running.python(way, PROGRAM)?;
        let [files, walk, numpy] = numbers[..] else { anyhow::bail!("got {numbers:?}") };
        listed.push(files);
        anyhow::ensure!(listed.iter().all(|n| *n == files), "trees differ in size: {listed:?}");
        Ok(Sample {
            value: walk + numpy,
            details: vec![("find_s", walk), ("numpy_s", numpy), ("files", files)],
        })
    })
}
