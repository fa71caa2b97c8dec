//! A containerd, a registry and a skimmerd that stay, for people to try.
//!
//! `--keep` starts this program once more, in a session of its own, to hold them; `--stop` ends that process, which
//! takes everything away. Its process id, its log, the indexes and what to try are in [`FOLDER`].

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use skimmer_integration::command::wait_for;
use skimmer_integration::containerd::Version;
use skimmer_integration::node::Node;
use skimmer_integration::scenario::Scenario;
use skimmer_integration::world::World;
use skimmer_integration::{debian, sweep, tools};

const FOLDER: &str = "/run/skimmer-quickstart";

/// The option by which the process that holds everything is known.
const HOLD: &str = "--hold";

/// Where the indexes are between their making and their use.
pub fn indexes() -> PathBuf {
    file("indexes")
}

/// Fails while another one is running.
pub fn refuse_second() -> anyhow::Result<()> {
    match holder() {
        Some(process) => {
            anyhow::bail!("process {process} is running already: install/quickstart --stop ends it")
        }
        None => forget(),
    }
}

/// Removes what an earlier one left.
pub fn forget() -> anyhow::Result<()> {
    match std::fs::remove_dir_all(FOLDER) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {FOLDER}"))
        }
        _ => Ok(()),
    }
}

/// Starts the process that holds everything, and says what to try.
pub fn start() -> anyhow::Result<()> {
    println!("Starting a containerd, a registry and skimmerd to try …");
    let log = file("log");
    let output = File::create(&log).with_context(|| format!("create {}", log.display()))?;
    Command::new("setsid")
        .arg("--fork")
        .arg(std::env::current_exe()?)
        .arg(HOLD)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .context("start a process that stays")?;
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let text = wait_for("everything runs", Duration::from_secs(60), || {
        // It has ended if it was there and is no more.
        if file("pid").exists() && holder().is_none() {
            return Some(None);
        }
        std::fs::read_to_string(file("commands")).ok().map(Some)
    })
    .with_context(said)?
    .with_context(said)?;
    print!("{text}");
    Ok(())
}

/// Runs everything, until a signal ends this process.
pub fn hold(scenario: &Scenario) -> anyhow::Result<()> {
    std::fs::write(file("pid"), std::process::id().to_string())?;
    let world = World::near(scenario, debian::numpy(&scenario.path("blobs"))?)?;
    let node = world.cold_node(Some(&indexes()))?;
    let text = commands(&world, &node)?;
    let draft = file("commands.new");
    std::fs::write(&draft, text).with_context(|| format!("write {}", draft.display()))?;
    std::fs::rename(&draft, file("commands"))?;
    loop {
        std::thread::park();
    }
}

/// Ends what `--keep` left running.
pub fn stop() -> anyhow::Result<()> {
    let running = holder();
    if let Some(process) = running {
        kill(process, Signal::SIGTERM).with_context(|| format!("end process {process}"))?;
        wait_for("it has removed everything", Duration::from_secs(60), || {
            holder().is_none().then_some(())
        })?;
    }
    // Also what is left of one that was killed.
    sweep::abandoned(&std::env::temp_dir());
    forget()?;
    println!("{}", if running.is_some() { "Stopped." } else { "Nothing was running." });
    Ok(())
}

fn file(name: &str) -> PathBuf {
    // The first caller makes it; that it can't be made shows when something is written there.
    let _ = std::fs::create_dir_all(FOLDER);
    Path::new(FOLDER).join(name)
}

/// The process that holds everything, if it runs; its number alone could be another program's by now.
fn holder() -> Option<Pid> {
    let number = std::fs::read_to_string(Path::new(FOLDER).join("pid")).ok()?;
    let line = std::fs::read(format!("/proc/{number}/cmdline")).ok()?;
    let is_it = line.split(|&byte| byte == 0).any(|part| part == HOLD.as_bytes());
    is_it.then(|| number.parse().ok().map(Pid::from_raw)).flatten()
}

fn commands(world: &World<'_>, node: &Node) -> anyhow::Result<String> {
    let containerd = Version::V2.folder()?.join("usr/bin");
    let ours = tools::built("skimmer")?;
    let ours = ours.parent().context("skimmer is in no folder")?;
    let python = debian::COMMAND.map(|part| format!("'{part}'")).join(" ");
    Ok(format!(
        "
Everything runs. The index of the image is here, its layers are not. To try, in a shell:

  export PATH={containerd}:{ours}:$PATH
  export CONTAINERD_ADDRESS={address} SKIMMER_ADDRESS={skimmer}
  image={reference}

  ctr image pull --hosts-dir {hosts} --snapshotter skimmer $image
  ctr run --rm --runc-root {runc} --snapshotter skimmer $image try1 {python}
  skimmer status $image                 # what was fetched of each layer, and why
  ctr run --rm -t --runc-root {runc} --snapshotter skimmer $image try2 bash
  skimmer fetch $image                  # the rest of it

The same with --snapshotter overlayfs does without skimmer. To end and remove it all:

  install/quickstart --stop
",
        containerd = containerd.display(),
        ours = ours.display(),
        address = node.containerd.address().display(),
        skimmer = node.skimmerd.address().display(),
        reference = world.reference,
        hosts = world.scenario.hosts().display(),
        runc = node.containerd.runc_root().display(),
    ))
}
