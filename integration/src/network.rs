//! A host of its own behind a slow link: a network namespace, a veth pair, a token bucket.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context as _;
use nix::sched::{CloneFlags, setns};

use crate::{command, sweep};

/// A network namespace with one link; deleted when dropped.
pub struct Host {
    name: String,
    /// The link's other end, and the namespace it is in: this machine's own if none.
    device: String,
    place: Option<String>,
    address: Ipv4Addr,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A number that no namespace or device of this process has yet.
pub(crate) fn unique() -> u32 {
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

impl Host {
    /// A host that this machine reaches, whose sending is limited to `bits_per_second`, if given.
    pub fn new(bits_per_second: Option<u64>) -> anyhow::Result<Self> {
        let number = unique();
        let process = std::process::id();
        let block = (process.wrapping_mul(64) + number * 4) % (1 << 16);
        let base = u32::from(Ipv4Addr::new(10, 213, 0, 0)) + (block & !3);
        let (here, address) = (Ipv4Addr::from(base + 1), Ipv4Addr::from(base + 2));
        // Interface names have at most 15 characters.
        let host = Self::wired(&format!("sk{process:x}x{number}"), None, address, 30)?;
        run(&["ip", "address", "add", &format!("{here}/30"), "dev", &host.device])?;
        if let Some(rate) = bits_per_second {
            host.shape(rate)?;
        }
        Ok(host)
    }

    /// A host whose link ends as `device` in the namespace `place`, or on this machine.
    pub(crate) fn wired(
        device: &str,
        place: Option<&str>,
        address: Ipv4Addr,
        prefix: u8,
    ) -> anyhow::Result<Self> {
        let name = format!("{}{}-{}", sweep::PREFIX, std::process::id(), unique());
        run(&["ip", "netns", "add", &name])?;
        // From here on dropping it takes away what was made.
        let place = place.map(str::to_owned);
        let host = Self { name, device: device.to_owned(), place, address };
        let peer = ["type", "veth", "peer", "name", "wire", "netns", &host.name];
        host.at_far_end(&[&["ip", "link", "add", device], &peer[..]].concat())?;
        host.at_far_end(&["ip", "link", "set", device, "up"])?;
        host.run(&["ip", "address", "add", &format!("{address}/{prefix}"), "dev", "wire"])?;
        host.run(&["ip", "link", "set", "wire", "up"])?;
        host.run(&["ip", "link", "set", "lo", "up"])?;
        Ok(host)
    }

    /// Limits what it sends.
    fn shape(&self, bits_per_second: u64) -> anyhow::Result<()> {
        self.run(&words(&bucket("wire", bits_per_second))).context("shape the link")
    }

    /// Limits what it sends and what it gets.
    pub(crate) fn shape_both_ways(&self, bits_per_second: u64) -> anyhow::Result<()> {
        self.shape(bits_per_second)?;
        let bucket = bucket(&self.device, bits_per_second);
        self.at_far_end(&words(&bucket)).context("shape the link's other end")
    }

    /// The namespace's name, as `ip netns` has it.
    pub fn namespace(&self) -> &str {
        &self.name
    }

    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A command that runs `program` on it; files and mounts are this machine's.
    pub fn command(&self, program: &str) -> std::process::Command {
        let mut command = std::process::Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name)).arg(program);
        command
    }

    /// Does `work` as one of its programs would, on a thread of its own.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let namespace = File::open(Path::new("/run/netns").join(&self.name))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || -> anyhow::Result<T> {
                setns(namespace, CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
                Ok(work())
            });
            thread.join().map_err(|_| anyhow::anyhow!("panicked within {}", self.name))?
        })
    }

    /// Runs `work` to its end as one of its programs would.
    pub fn block_on<T: Send>(
        &self,
        work: impl AsyncFnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        self.inside(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(work())
        })?
    }

    /// Takes the link down, as if the cable were pulled, or up again.
    pub fn set_link(&self, up: bool) -> anyhow::Result<()> {
        self.at_far_end(&["ip", "link", "set", &self.device, if up { "up" } else { "down" }])
    }

    /// Runs a command line on it.
    pub(crate) fn run(&self, line: &[&str]) -> anyhow::Result<()> {
        run(&[&["ip", "netns", "exec", &self.name], line].concat())
    }

    /// Runs a command line where the link's other end is.
    pub(crate) fn at_far_end(&self, line: &[&str]) -> anyhow::Result<()> {
        match &self.place {
            Some(place) => run(&[&["ip", "netns", "exec", place], line].concat()),
            None => run(line),
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The namespace takes its end of the pair, and with it the whole pair, along.
        let _ = self.at_far_end(&["ip", "link", "delete", &self.device]);
        let _ = run(&["ip", "netns", "delete", &self.name]);
    }
}

/// The command line that lets `device` send at a rate: a burst that segments of 64 KiB pass, and a short queue.
fn bucket(device: &str, bits_per_second: u64) -> Vec<String> {
    let rate = format!("{bits_per_second}bit");
    let line = ["tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", &rate];
    line.iter().chain(&["burst", "256kb", "latency", "50ms"]).map(|word| (*word).into()).collect()
}

fn words(line: &[String]) -> Vec<&str> {
    line.iter().map(String::as_str).collect()
}

/// Runs a command line.
pub(crate) fn run(line: &[&str]) -> anyhow::Result<()> {
    let (program, arguments) = line.split_first().context("an empty command line")?;
    command::run(program, arguments)?;
    Ok(())
}

/// The command line that runs `program` on `host`, or on this machine.
pub fn program_on(host: Option<&Host>, program: &str) -> Vec<String> {
    let Some(host) = host else { return vec![program.to_owned()] };
    let command = host.command(program);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect()
}
