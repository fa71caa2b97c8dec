//! What is left of the difference once everything is in the page cache.

use skimmer_integration::debian;
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

/// Runs each command once, because whoever drops the caches of this machine drops these too, and then often enough
/// that some runs have a processor to themselves. Prints the number of files listed and, of each command, the least
/// seconds that it took and that it kept processors busy.
const PROGRAM: &str = "
import resource, subprocess, time
FIND = 'find / -path /proc -prune -o -path /sys -prune -o -ls'.split()
NUMPY = ['python3', '-c', 'import numpy']
def busy():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
def timed(command):
    before, start = busy(), time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return time.perf_counter() - start, busy() - before, output.count(b'\\n')
rounds = [[timed(FIND), timed(NUMPY)] for _ in range(13)][1:]
print(rounds[0][0][2])
for runs in zip(*rounds):
    print(*(min(column) for column in list(zip(*runs))[:2]))
";

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let image = debian::numpy(&bench.scenario.path("blobs"))?;
    let world = World::near(bench.scenario, image)?;
    let running = Running::start(&world)?;
    let mut listed = Vec::new();
    alternate(bench, world.settings()?, |way| {
        let numbers = running.python(way, PROGRAM)?;
        let [files, walk, walk_cpu, numpy, numpy_cpu] = numbers[..] else {
            anyhow::bail!("got {numbers:?}")
        };
        listed.push(files);
        anyhow::ensure!(listed.iter().all(|n| *n == files), "trees differ in size: {listed:?}");
        Ok(Sample {
            value: walk + numpy,
            details: vec![
                ("find_s", walk),
                ("find_cpu_s", walk_cpu),
                ("numpy_s", numpy),
                ("numpy_cpu_s", numpy_cpu),
                ("files", files),
            ],
        })
    })
}
