//! A host of its own behind a slow link: a network namespace, a veth pair, a token bucket.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context as _;

use crate::{command, sweep};

/// A network namespace that this machine reaches over one link; deleted when dropped.
pub struct Host {
    name: String,
    device: String,
    address: Ipv4Addr,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Host {
    /// A host whose sending is limited to `bits_per_second`, if given.
    pub fn new(bits_per_second: Option<u64>) -> anyhow::Result<Self> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let name = format!("{}{process}-{number}", sweep::PREFIX);
        // Interface names have at most 15 characters.
        let device = format!("sk{process:x}x{number}");
        let block = (process.wrapping_mul(64) + number * 4) % (1 << 16);
        let base = u32::from(Ipv4Addr::new(10, 213, 0, 0)) + (block & !3);
        let (here, address) = (Ipv4Addr::from(base + 1), Ipv4Addr::from(base + 2));
        ip(&["netns", "add", &name])?;
        // From here on dropping it takes away what was made.
        let host = Self { name, device, address };
        let inner = ["netns", "exec", &host.name, "ip"];
        ip(&[
            "link",
            "add",
            &host.device,
            "type",
            "veth",
            "peer",
            "name",
            "wire",
            "netns",
            &host.name,
        ])?;
        ip(&["address", "add", &format!("{here}/30"), "dev", &host.device])?;
        ip(&["link", "set", &host.device, "up"])?;
        ip(&[&inner[..], &["address", "add", &format!("{address}/30"), "dev", "wire"]].concat())?;
        ip(&[&inner[..], &["link", "set", "wire", "up"]].concat())?;
        ip(&[&inner[..], &["link", "set", "lo", "up"]].concat())?;
        if let Some(rate) = bits_per_second {
            let rate = format!("{rate}bit");
            let shape = [
                "qdisc", "add", "dev", "wire", "root", "tbf", "rate", &rate, "burst", "256kb",
                "latency", "50ms",
            ];
            ip(&[&["netns", "exec", &host.name, "tc"][..], &shape].concat())
                .context("shape the link")?;
        }
        Ok(host)
    }

    /// Its address, which this machine reaches.
    /// The namespace's name, as `ip netns` has it.
    pub fn namespace(&self) -> &str {
        &self.name
    }

    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A command that runs `program` on it.
    pub fn command(&self, program: &str) -> std::process::Command {
        let mut command = std::process::Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Takes the link down, as if the cable were pulled, or up again.
    pub fn set_link(&self, up: bool) -> anyhow::Result<()> {
        ip(&["link", "set", &self.device, if up { "up" } else { "down" }])
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The namespace takes its end of the pair, and with it the whole pair, along.
        let _ = ip(&["link", "delete", &self.device]);
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    command::run("ip", arguments)?;
    Ok(())
}

/// The command line that runs `program` on `host`, or on this machine.
pub fn program_on(host: Option<&Host>, program: &str) -> Vec<String> {
    let Some(host) = host else { return vec![program.to_owned()] };
    let command = host.command(program);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect()
}
