//! Hosts on one network: a bridge for each zone, all in a namespace of their own, so that nothing of it can be
//! confused with this machine's own network or with that of another run.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::network::{self, Host};
use crate::sweep;

/// Of 2^16 addresses; nothing outside its namespaces knows of it.
const NETWORK: u32 = u32::from_be_bytes([10, 214, 0, 0]);

/// A switch with as many zones as are asked for; its hosts must be dropped before it.
pub struct Switch {
    namespace: String,
    next: AtomicU32,
}

impl Switch {
    pub fn new() -> anyhow::Result<Self> {
        let number = network::unique();
        let namespace = format!("{}{}-{number}", sweep::PREFIX, std::process::id());
        network::run(&["ip", "netns", "add", &namespace])?;
        let switch = Self { namespace, next: AtomicU32::new(1) };
        switch.bridge(0)?;
        Ok(switch)
    }

    fn run(&self, line: &[&str]) -> anyhow::Result<()> {
        network::run(&[&["ip", "netns", "exec", &self.namespace], line].concat())
    }

    fn bridge(&self, zone: u32) -> anyhow::Result<()> {
        let bridge = format!("zone{zone}");
        self.run(&["ip", "link", "add", &bridge, "type", "bridge", "stp_state", "0"])?;
        self.run(&["ip", "link", "set", &bridge, "up"])
    }

    /// A zone of its own: a bridge whose hosts reach all others over one trunk, which isn't shaped.
    pub fn add_zone(&self, zone: u32) -> anyhow::Result<()> {
        self.bridge(zone)?;
        let (here, there) = (format!("trunk{zone}"), format!("trunk{zone}b"));
        self.run(&["ip", "link", "add", &here, "type", "veth", "peer", "name", &there])?;
        for (end, bridge) in [(&here, "zone0"), (&there, format!("zone{zone}").as_str())] {
            self.run(&["ip", "link", "set", end, "master", bridge])?;
            self.run(&["ip", "link", "set", end, "up"])?;
        }
        Ok(())
    }

    /// Cuts a zone off from the others, or connects it again.
    pub fn set_trunk(&self, zone: u32, up: bool) -> anyhow::Result<()> {
        let state = if up { "up" } else { "down" };
        self.run(&["ip", "link", "set", &format!("trunk{zone}"), state])
    }

    /// A host in `zone`, its link limited both ways, its congestion control cubic.
    pub fn host(&self, zone: u32, bits_per_second: Option<u64>) -> anyhow::Result<Host> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let address = Ipv4Addr::from(NETWORK + number);
        let device = format!("port{number}");
        let host = Host::wired(&device, Some(&self.namespace), address, 16)?;
        host.at_far_end(&["ip", "link", "set", &device, "master", &format!("zone{zone}")])?;
        if let Some(rate) = bits_per_second {
            host.shape_both_ways(rate)?;
        }
        // A namespace may not make it its default where the machine restricts it; a route may name it.
        let all = format!("{}/16", Ipv4Addr::from(NETWORK));
        let own = address.to_string();
        host.run(&["ip", "route", "replace", &all, "dev", "wire", "src", &own, "congctl", "cubic"])
            .context("set the congestion control")?;
        Ok(host)
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = network::run(&["ip", "netns", "delete", &self.namespace]);
    }
}

/// How fast `bytes` go from each host to the next over plain TCP, all at once: bits per second of the slowest and of
/// the middle link.
///
/// # Errors
/// If a connection fails or stands still for 30 s.
pub fn ring(hosts: &[&Host], bytes: u64) -> anyhow::Result<(f64, f64)> {
    const PORT: u16 = 7;
    let mut listeners = Vec::new();
    for host in hosts {
        let address = host.address();
        listeners.push(host.inside(move || TcpListener::bind((address, PORT)))??);
    }
    let rates = std::thread::scope(|scope| -> anyhow::Result<Vec<f64>> {
        let receive = |listener: TcpListener| move || receive(&listener, bytes);
        let receivers: Vec<_> =
            listeners.into_iter().map(|listener| scope.spawn(receive(listener))).collect();
        let senders: Vec<_> = hosts
            .iter()
            .enumerate()
            .map(|(at, host)| {
                let next = hosts[(at + 1) % hosts.len()].address();
                scope.spawn(move || host.inside(move || send(next, PORT, bytes))?)
            })
            .collect();
        let ended = || anyhow::anyhow!("a thread of the calibration panicked");
        for sender in senders {
            sender.join().map_err(|_| ended())??;
        }
        receivers.into_iter().map(|receiver| receiver.join().map_err(|_| ended())?).collect()
    });
    let mut rates = rates.context("calibrate the network")?;
    rates.sort_by(f64::total_cmp);
    let slowest = rates.first().copied().context("a ring of no hosts")?;
    Ok((slowest, rates[rates.len() / 2]))
}

fn send(to: Ipv4Addr, port: u16, bytes: u64) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect((to, port)).with_context(|| format!("connect to {to}"))?;
    let block = [0; 1 << 16];
    let mut left = bytes;
    while left > 0 {
        let part = usize::try_from(left).unwrap_or(block.len()).min(block.len());
        stream.write_all(&block[..part])?;
        left -= part as u64;
    }
    Ok(())
}

/// Bits per second, of what comes after the first tenth: the token bucket's burst and slow start are over then.
fn receive(listener: &TcpListener, bytes: u64) -> anyhow::Result<f64> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let (mut got, mut since) = (0_u64, None);
    let mut buffer = vec![0; 1 << 16];
    while got < bytes {
        let part = stream.read(&mut buffer)?;
        anyhow::ensure!(part > 0, "the connection ended after {got} of {bytes} bytes");
        got += part as u64;
        if since.is_none() && got >= bytes / 10 {
            since = Some((Instant::now(), got));
        }
    }
    let (start, before) = since.context("nothing was sent")?;
    Ok((got - before) as f64 * 8.0 / start.elapsed().as_secs_f64())
}
