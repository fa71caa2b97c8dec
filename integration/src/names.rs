//! A server of names for the programs on a host of its own.
//!
//! They ask whom this machine's resolv.conf names. On the host that address is the host's own, and this server has it:
//! nothing of the machine is changed.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;

use crate::command::{self, PATIENCE};
use crate::network::Host;

const PORT: u16 = 53;
/// How often it looks whether it is to end.
const TURN: Duration = Duration::from_millis(100);

/// Of a message (RFC 1035, section 4.1.1); its question follows.
const HEADER_BYTES: usize = 12;
/// A question's type and class: an IPv4 address, in the internet.
const ADDRESS: [u8; 4] = [0, 1, 0, 1];

/// Why a name doesn't resolve: the code of the answer.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    /// The server can't say.
    Server = 2,
    /// There is no such name.
    Unknown = 3,
}

/// A running server, which knows one name; ends when dropped.
pub struct Names {
    known: Arc<Known>,
    thread: Option<JoinHandle<()>>,
}

struct Known {
    /// As messages have it.
    name: Vec<u8>,
    address: Ipv4Addr,
    /// Of answers about the name: 0, or a [`Failure`].
    code: AtomicU8,
    in_vain: AtomicUsize,
    ending: AtomicBool,
}

impl Names {
    /// For programs on `host`, to whom `name` stands for `address`.
    pub fn start(host: &Host, name: &str, address: Ipv4Addr) -> anyhow::Result<Self> {
        let server = server_of_this_machine();
        let mut own = host.command("ip");
        own.args(["address", "replace", &server.to_string(), "dev", "lo"]);
        command::output_of(&mut own, PATIENCE)?;
        let socket = host.inside(|| UdpSocket::bind((server, PORT)))?;
        let socket = socket.with_context(|| format!("serve names at {server}"))?;
        socket.set_read_timeout(Some(TURN))?;
        let known = Arc::new(Known {
            name: encoded(name)?,
            address,
            code: AtomicU8::new(0),
            in_vain: AtomicUsize::new(0),
            ending: AtomicBool::new(false),
        });
        let served = Arc::clone(&known);
        let thread = std::thread::spawn(move || serve(&socket, &served));
        Ok(Self { known, thread: Some(thread) })
    }

    /// From now on the name doesn't resolve.
    pub fn fail(&self, why: Failure) {
        self.known.in_vain.store(0, Ordering::Relaxed);
        self.known.code.store(why as u8, Ordering::Relaxed);
    }

    /// From now on it does.
    pub fn know(&self) {
        self.known.code.store(0, Ordering::Relaxed);
    }

    /// Questions about the name that have been asked since it last began to fail, and got no address.
    pub fn asked_in_vain(&self) -> usize {
        self.known.in_vain.load(Ordering::Relaxed)
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.known.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Known {
    /// The answer to a message that asks one question.
    fn answer(&self, message: &[u8]) -> Option<Vec<u8>> {
        let (id, asked) = (message.get(..2)?, message.get(HEADER_BYTES..)?);
        let end = asked.iter().position(|byte| *byte == 0)? + 1;
        let (name, kind) = (&asked[..end], asked.get(end..end + ADDRESS.len())?);
        let code = match self.code.load(Ordering::Relaxed) {
            _ if name != self.name => Failure::Unknown as u8,
            0 => 0,
            failure => {
                self.in_vain.fetch_add(1, Ordering::Relaxed);
                failure
            }
        };
        let has_address = code == 0 && kind == ADDRESS;
        let mut answer = id.to_vec();
        // An answer, by a server that asks on; one question, the records that answer it, no others.
        answer.extend([0x81, 0x80 | code, 0, 1, 0, u8::from(has_address), 0, 0, 0, 0]);
        answer.extend(name);
        answer.extend(kind);
        if has_address {
            // The name that is at the header's end; good for no time; four bytes.
            answer.extend([0xc0, 12]);
            answer.extend(ADDRESS);
            answer.extend([0, 0, 0, 0, 0, 4]);
            answer.extend(self.address.octets());
        }
        Some(answer)
    }
}

fn serve(socket: &UdpSocket, known: &Known) {
    let mut message = [0; 512];
    while !known.ending.load(Ordering::Relaxed) {
        // Mostly nobody asks.
        let Ok((len, client)) = socket.recv_from(&mut message) else { continue };
        if let Some(answer) = known.answer(&message[..len]) {
            // Who doesn't get it asks again.
            let _ = socket.send_to(&answer, client);
        }
    }
}

/// Whom programs of this machine ask first (resolv.conf(5)).
fn server_of_this_machine() -> IpAddr {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let mut named =
        text.lines().filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok());
    named.next().unwrap_or(Ipv4Addr::LOCALHOST.into())
}

/// Each label after its length, an empty one at the end.
fn encoded(name: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len())?);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    Ok(bytes)
}
