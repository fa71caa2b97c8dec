//! Images that several tests use.

use std::path::Path;

use skimmer_integration::command;
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, Layer, noise};
use skimmer_integration::scenario::Scenario;
use skimmer_integration::tar::Tar;

/// A layer with a static busybox: the shell and the tools of every test image.
pub fn busybox(scenario: &Scenario, format: Format) -> anyhow::Result<Layer> {
    let program = std::fs::read("/bin/busybox")?;
    let mut tar = Tar::new().dir("bin/").program("bin/busybox", &program);
    for name in
        ["cat", "dd", "echo", "head", "id", "ls", "md5sum", "sh", "sleep", "stat", "true", "wc"]
    {
        tar = tar.symlink(format!("bin/{name}"), "busybox");
    }
    let tar = tar.dir("proc/").dir("dev/").dir("sys/").dir("etc/").dir("tmp/");
    Layer::of(&tar.end(), format, &blobs(scenario))
}

/// A layer with one incompressible file, `data/<name>`.
pub fn data(
    scenario: &Scenario,
    name: &str,
    length: usize,
    format: Format,
) -> anyhow::Result<Layer> {
    let tar = Tar::new().dir("data/").file(format!("data/{name}"), &noise(seed(name), length));
    Layer::of(&tar.end(), format, &blobs(scenario))
}

/// busybox and 8 MiB of data that nothing reads unless it is told to.
pub fn small(scenario: &Scenario, name: &str) -> anyhow::Result<Image> {
    let layers = vec![
        busybox(scenario, Format::Gzip)?,
        data(scenario, &name.replace('/', "-"), 8 << 20, Format::Gzip)?,
    ];
    Plan::new(name, layers).build(&blobs(scenario))
}

pub fn blobs(scenario: &Scenario) -> std::path::PathBuf {
    scenario.path("blobs")
}

/// Where a test mounts things.
pub fn mount_point(scenario: &Scenario, name: &str) -> std::path::PathBuf {
    Path::new(&scenario.path("mnt")).join(name)
}

/// The image of a pod's first container: a static program that waits for its end.
pub fn pause(scenario: &Scenario) -> anyhow::Result<Image> {
    let program = std::fs::read("/bin/busybox")?;
    let tar = Tar::new().program("busybox", &program).end();
    let mut plan = Plan::new("pods/pause", vec![Layer::of(&tar, Format::Gzip, &blobs(scenario))?]);
    plan.command = ["/busybox", "sleep", "1000000"].map(str::to_owned).to_vec();
    plan.build(&blobs(scenario))
}

/// What `md5sum` in a container says of [`data`]'s file `name`.
pub fn md5sum(scenario: &Scenario, name: &str, length: usize) -> anyhow::Result<String> {
    let path = scenario.path("expected");
    std::fs::write(&path, noise(seed(name), length))?;
    let said = command::run("md5sum", [&path])?;
    Ok(said.replace(&path.display().to_string(), &format!("/data/{name}")))
}

/// What the bytes of [`data`]'s file `name` are made from.
pub fn seed(name: &str) -> u64 {
    name.bytes().fold(7, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()))
}
