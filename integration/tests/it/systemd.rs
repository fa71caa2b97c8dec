//! skimmerd as the real unit of a real systemd: here, take-over through its descriptor store.

mod daemons;
mod sandbox;

use std::collections::BTreeSet;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use skimmer_integration::command::{self, PATIENCE, wait_for};
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::Format;
use skimmer_integration::node;
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{self, MountMode, Skimmerd};
use skimmer_integration::systemd::Systemd;

use daemons::{Daemons, Service, UNIT};

use crate::fixtures::{blobs, busybox, data, md5sum};

/// Each a layer with one file.
const FILES: usize = 32;
const LEN: usize = 256 << 10;
/// A file that stays open all along.
const LONG: &str = "long";
const LONG_LEN: usize = 8 << 20;

/// Both daemons as services, and a container of a lazily mounted image.
struct World {
    // First: who uses the registry ends with them.
    daemons: Daemons,
    holder: bool,
    _registry: Registry,
    container: String,
    reference: String,
    files: Vec<Expected>,
    unread: std::ops::Range<usize>,
}

/// What `md5sum` says of a file.
struct Expected {
    path: String,
    sum: String,
}

/// What no take-over may change.
struct Seen {
    mounts: BTreeSet<String>,
    inodes: BTreeSet<String>,
}

impl Seen {
    /// What only one of two has seen.
    fn differences<'a>(&'a self, other: &'a Self) -> Vec<&'a String> {
        let mounts = self.mounts.symmetric_difference(&other.mounts);
        mounts.chain(self.inodes.symmetric_difference(&other.inodes)).collect()
    }
}

/// Where [`World`]'s image has its file.
fn name(file: usize) -> String {
    format!("file-{file:02}")
}

impl Deref for World {
    type Target = Daemons;

    fn deref(&self) -> &Daemons {
        &self.daemons
    }
}

impl World {
    /// `expected` serves lazily mounted layers: every layer is mounted and kept, and none of the files has been read.
    fn start(scenario: &Scenario, service: &Service, expected: &str) -> anyhow::Result<Self> {
        let registry = Registry::start(scenario)?;
        let mut layers = vec![busybox(scenario, Format::Gzip)?];
        layers.push(data(scenario, LONG, LONG_LEN, Format::Gzip)?);
        let mut files = Vec::new();
        for file in 0..FILES {
            let name = name(file);
            layers.push(data(scenario, &name, LEN, Format::Gzip)?);
            let sum = md5sum(scenario, &name, LEN)?;
            files.push(Expected { path: format!("/data/{name}"), sum });
        }
        let image = Plan::new("systemd/image", layers).build(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        let indexes = learn(scenario, &[(&image, &reference)])?;

        let daemons = Daemons::start(scenario, service)?;
        daemons.skimmer.import_indexes(&indexes)?;
        daemons.start_containerd()?;
        let world = Self {
            daemons,
            holder: service.holder,
            _registry: registry,
            container: format!("reader-{}", std::process::id()),
            reference,
            files,
            unread: 0..FILES,
        };
        world.containerd.pull(&Pull::new(&world.reference, "skimmer"))?;
        // Killed at once after the last descriptor was handed over, by an id that is known before.
        let (main, processes) = (world.main()?, world.systemd.processes(UNIT)?);
        world.start_container()?;
        for process in processes {
            kill(process, Signal::SIGKILL)?;
        }
        world.wait_serving(&main)?;
        node::wait_connected(&world.containerd.address())?;
        // Mounts are taken over one after another.
        let images = wait_for("somebody serves the layer", PATIENCE, || {
            let images = world.skimmer.ask(&["status", &world.reference]).ok()?;
            (!images[0]["layers"][1]["server"].is_null()).then_some(images)
        })?;
        let server = &images[0]["layers"][1]["server"];
        anyhow::ensure!(server == expected, "{server} serves, not {expected}: {images}");
        Ok(world)
    }

    fn start_container(&self) -> anyhow::Result<()> {
        let program = ["sleep", "1000000"];
        self.containerd.start_image(&self.reference, "skimmer", &self.container, &program)
    }

    fn seen(&self) -> anyhow::Result<Seen> {
        let mounts = self.systemd.mounts(Path::new("/var/lib/skimmer"))?;
        let list = ["sh", "-c", "stat -c '%n %i' /data/*"];
        let inodes =
            wait_for("ctr passes on what a program says that ends at once", PATIENCE, || {
                let said = self.containerd.exec(&self.container, &list);
                said.map(|said| (!said.is_empty()).then_some(said)).transpose()
            })??;
        let mounts = mounts.into_iter().collect();
        let inodes = inodes.lines().map(str::to_owned).collect();
        Ok(Seen { mounts, inodes })
    }

    /// Every layer that is not complete is kept.
    fn ensure_kept(&self) -> anyhow::Result<()> {
        let kept = if self.holder { self.held()? } else { self.descriptors()? };
        anyhow::ensure!(kept >= self.unread.len(), "only {kept} for {:?}", self.unread);
        Ok(())
    }

    /// Begins to read a file that nobody has read yet; it may have to wait.
    fn begin_reading(&mut self) -> anyhow::Result<Reading> {
        let file = &self.files[self.unread.next().context("every file has been read")?];
        let call = self.containerd.exec_command(&self.container, &["md5sum", &file.path])?;
        Ok(Reading::begin(call, &file.sum))
    }

    /// A reader of [`LONG`] that reads a half, and goes on once there is a file `/tmp/on`.
    fn begin_half_reading(&self, scenario: &Scenario) -> anyhow::Result<Reading> {
        let half = format!("dd bs=64k count={} 2>/dev/null", LONG_LEN / 2 / (64 << 10));
        let script = format!(
            "{{ {half}; while ! [ -e /tmp/on ]; do sleep 0.1; done; {half}; }} </data/{LONG} | md5sum"
        );
        let call = self.containerd.exec_command(&self.container, &["sh", "-c", &script])?;
        let sum = md5sum(scenario, LONG, LONG_LEN)?;
        let sum = sum.split(' ').next().unwrap_or_default();
        Ok(Reading::begin(call, &format!("{sum}  -")))
    }

    /// Does something to skimmerd which ends one process and begins another; `meanwhile` is given a reader that came
    /// after that. Nobody notices, apart from the time that it takes.
    fn endures(
        &mut self,
        what: &str,
        disturb: impl FnOnce(&Self) -> anyhow::Result<()>,
        meanwhile: impl FnOnce(&Self, &Reading) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let before = self.seen()?;
        let main = self.main()?;
        let early = self.begin_reading()?;
        disturb(self).with_context(|| what.to_owned())?;
        let late = self.begin_reading()?;
        meanwhile(self, &late).with_context(|| what.to_owned())?;
        self.wait_serving(&main).with_context(|| what.to_owned())?;
        early.finish().with_context(|| format!("{what}: who read before"))?;
        late.finish().with_context(|| format!("{what}: who read meanwhile"))?;
        let after = self.seen()?;
        let differences = before.differences(&after);
        anyhow::ensure!(differences.is_empty(), "{what}: changed: {differences:?}");
        self.ensure_kept().context("what is kept").with_context(|| what.to_owned())
    }
}

/// A reader at work.
struct Reading {
    thread: JoinHandle<anyhow::Result<String>>,
    expected: String,
}

impl Reading {
    fn begin(mut call: Command, expected: &str) -> Self {
        let thread = thread::spawn(move || command::output_of(&mut call, PATIENCE));
        Self { thread, expected: expected.to_owned() }
    }

    /// It has to have got the right bytes.
    fn finish(self) -> anyhow::Result<()> {
        let said = self.thread.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
        let expected = self.expected;
        anyhow::ensure!(said.trim() == expected.trim(), "{said:?} instead of {expected:?}");
        Ok(())
    }

    fn ensure_waits(&self) -> anyhow::Result<()> {
        thread::sleep(Duration::from_secs(1));
        anyhow::ensure!(!self.thread.is_finished(), "nobody could have answered it");
        Ok(())
    }
}

/// Has a skimmerd of this machine learn the indexes of images; returns the folder with them.
fn learn(scenario: &Scenario, images: &[(&Image, &str)]) -> anyhow::Result<PathBuf> {
    let nobody = scenario.path("no-containerd.sock");
    let setup = skimmerd::Setup::default();
    let mut teacher = Skimmerd::start(scenario, "teacher", &nobody, &setup)?;
    let folder = scenario.path("indexes");
    for (image, reference) in images {
        teacher.ask(&["index", "build", reference])?;
        teacher.export_indexes(image, &folder)?;
    }
    teacher.terminate()?;
    Ok(folder)
}

/// Who serves incomplete layers in the mode "auto" where systemd keeps the descriptors.
fn automatic() -> anyhow::Result<&'static str> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    // Pre-content events.
    Ok(if version >= (6, 14) { "kernel" } else { "fuse" })
}

#[test]
fn skimmerd_serves_what_systemd_kept() {
    take_over("systemd-fuse", MountMode::Fuse);
}

#[test]
fn the_kernel_serves_what_systemd_kept() {
    take_over("systemd-auto", MountMode::Auto);
}

/// systemd forgets a stopped unit that no other wants, with what it keeps.
#[test]
fn the_kernel_serves_nothing_incomplete_where_the_unit_is_not_enabled() {
    with_systemd("systemd-disabled", |scenario| {
        let service = Service { enabled: false, ..Service::new(MountMode::Auto) };
        let mut world = World::start(scenario, &service, "fuse")?;
        world.endures("kill -9", |world| world.kill(), |_, _| Ok(()))
    });
}

/// The unit of the holder is enough, whatever systemd could keep.
#[test]
fn skimmerd_serves_what_the_holder_kept() {
    with_systemd("systemd-holder", |scenario| {
        let service = Service { holder: true, enabled: false, ..Service::new(MountMode::Fuse) };
        let mut world = World::start(scenario, &service, "fuse")?;
        let long = world.begin_half_reading(scenario)?;
        world.ensure_kept()?;
        world.endures("kill -9", |world| world.kill(), |_, _| Ok(()))?;
        let kept = world.descriptors()?;
        anyhow::ensure!(kept == 0, "systemd keeps {kept} descriptors");
        world.containerd.exec(&world.container, &["sh", "-c", "echo >/tmp/on"])?;
        long.finish().context("who had a file open all along")
    });
}

fn with_systemd(name: &str, body: impl FnOnce(&Scenario) -> anyhow::Result<()>) {
    // Programs that are missing are told before: what is impossible then is so by this kernel or container.
    scenario(name, |scenario| match Systemd::impossible() {
        Some(reason) => {
            eprintln!("{name} skipped: no systemd can run here: {reason}");
            Ok(())
        }
        None => body(scenario),
    });
}

fn take_over(name: &str, mode: MountMode) {
    with_systemd(name, |scenario| {
        let server = if mode == MountMode::Fuse { "fuse" } else { automatic()? };
        let mut world = World::start(scenario, &Service::new(mode), server)?;

        let long = world.begin_half_reading(scenario)?;
        world.ensure_kept()?;

        let nothing = |_: &World, _: &Reading| Ok(());
        world.endures("kill -9", |world| world.kill(), nothing)?;
        world.endures(
            "kill -9 again and again",
            |world| {
                for _ in 0..6 {
                    let main = world.main()?;
                    world.kill()?;
                    world.wait_serving(&main)?;
                }
                Ok(())
            },
            nothing,
        )?;
        let systemctl = |what: &'static str| {
            move |world: &World| world.systemd.systemctl(&[what, UNIT]).map(drop)
        };
        world.endures("restart", systemctl("restart"), nothing)?;
        world.endures("stop and start", systemctl("stop"), |world, reading| {
            reading.ensure_waits()?;
            systemctl("start")(world)
        })?;
        world.endures(
            "upgrade",
            |world| {
                let program = world.systemd.folder("bin").join("skimmerd");
                let next = program.with_extension("next");
                std::fs::copy(&program, &next)?;
                std::fs::rename(&next, &program)?;
                systemctl("restart")(world)
            },
            nothing,
        )?;
        world.containerd.exec(&world.container, &["sh", "-c", "echo >/tmp/on"])?;
        long.finish().context("who had a file open all along")?;

        drain(&mut world)
    });
}

/// Drained mounts are gone, who waits for one is told, and systemd keeps nothing.
fn drain(world: &mut World) -> anyhow::Result<()> {
    world.systemd.systemctl(&["stop", UNIT])?;
    let file = &world.files[world.unread.next().context("every file has been read")?].path;
    let mut call = world.containerd.exec_command(&world.container, &["cat", file])?;
    let told = thread::spawn(move || command::failure_of(&mut call, PATIENCE));
    thread::sleep(Duration::from_secs(1));
    anyhow::ensure!(!told.is_finished(), "nobody could have answered it");
    let mut call = world.systemd.command("/usr/local/bin/skimmerd");
    call.args(["drain", "--unmount", "--config", "/etc/skimmer/skimmerd.toml"]);
    command::output_of(&mut call, PATIENCE)?;
    told.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    // What is missing of a layer that the kernel serves may be asked for as long as somebody uses that. Its user may
    // have died of what was taken from it.
    let _ = world.containerd.remove_container(&world.container);
    command::output_of(&mut call, PATIENCE)?;
    let mounts = world.systemd.mounts(Path::new("/var/lib/skimmer"))?;
    anyhow::ensure!(mounts.is_empty(), "still mounted: {mounts:?}");
    let kept = world.descriptors()?;
    anyhow::ensure!(kept == 0, "systemd still keeps {kept} descriptors");

    // The unit is as it was before, and the next container has its files.
    world.systemd.systemctl(&["start", UNIT])?;
    world.wait_serving("0")?;
    node::wait_connected(&world.containerd.address())?;
    let next = format!("next-{}", std::process::id());
    let program = ["sh", "-c", "md5sum /data/file-*"];
    let said = world.containerd.run_image(&world.reference, "skimmer", &next, &program)?;
    let expected: String = world.files.iter().map(|file| &file.sum[..]).collect();
    anyhow::ensure!(said.trim() == expected.trim(), "{said:?} instead of {expected:?}");
    Ok(())
}
