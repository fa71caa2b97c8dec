//! Faults with names, one after another: each comes, stays for a while under load, and goes.
//!
//! Tested without load: data files that rot while they are read (`disk`), of which readers get the wrong bytes until it is
//! found.

pub mod around;
pub mod operators;
pub mod registry;

use std::thread;
use std::time::Duration;

use skimmer_integration::front::Mood;

use super::World;
use super::load::{Late, Unread};

/// How long each of them stays.
const STAY: Duration = Duration::from_secs(3);

/// What the node says of them, besides what it gives as reasons.
pub const SAID: [&str; 7] = [
    "the metadata could not be read",
    "the database of snapshots is damaged",
    "checkpoint not written",
    "No space left on device",
    "cached bytes had changed on disk",
    "the bytes received have the digest",
    "doesn't match its digest, every time it was fetched",
];

/// Something that goes wrong.
pub struct Fault {
    pub name: &'static str,
    what: What,
    /// Whether nothing can be had of the registry meanwhile.
    is_outage: bool,
}

enum What {
    /// How it begins, and how it is set right.
    Steps(Step, Step),
    /// The registry is in this mood.
    Mood(Mood),
}

type Step = fn(&mut World<'_>) -> anyhow::Result<()>;

const fn fault(name: &'static str, begin: Step, end: Step) -> Fault {
    Fault { name, what: What::Steps(begin, end), is_outage: false }
}

const fn mood(name: &'static str, mood: Mood) -> Fault {
    Fault { name, what: What::Mood(mood), is_outage: false }
}

const fn outage(name: &'static str, begin: Step, end: Step) -> Fault {
    Fault { name, what: What::Steps(begin, end), is_outage: true }
}

const fn refusal(name: &'static str, status: u16) -> Fault {
    Fault { name, what: What::Mood(Mood::Refusing(status)), is_outage: true }
}

/// Has it come and go; then everything gets on, also who began to read meanwhile.
pub fn suffer(fault: &Fault, world: &mut World<'_>) -> anyhow::Result<()> {
    let unread = world.load.pull_unread()?;
    match &fault.what {
        What::Steps(begin, _) => begin(world)?,
        What::Mood(mood) => world.front.set(mood.clone()),
    }
    let late = unread.map(Unread::read).transpose()?;
    thread::sleep(STAY);
    world.load.check()?;
    if let Some(late) = late.as_ref().filter(|_| fault.is_outage) {
        late.ensure_waits()?;
    }
    match &fault.what {
        What::Steps(_, end) => end(world)?,
        What::Mood(_) => world.front.set(Mood::Passing),
    }
    late.map_or(Ok(()), Late::finish)?;
    world.load.wait_progress()
}

fn cable(world: &mut World<'_>, machine: usize, plugged: bool) -> anyhow::Result<()> {
    world.fleet.machines[machine].host.set_link(plugged)
}
