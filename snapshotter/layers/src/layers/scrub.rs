//! Checking everything that is cached, from time to time and without anybody noticing.

use std::ops::ControlFlow;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use skimmer_cache::scrub::{Next, Pace, Pass};

use super::{Layers, Owner};
use crate::mount::error_chain;

/// How often it is looked whether something is due, and whether there is anybody left to do it for.
const LOOK: Duration = Duration::from_secs(60);

/// How the scrubber goes about it.
#[derive(Clone, Copy, Debug)]
pub struct Scrub {
    /// From the beginning of one pass over everything to the next.
    pub interval: Duration,
    /// 0: as fast as the disk is idle.
    pub bytes_per_second: u64,
}

impl Layers {
    /// Has a thread check what is cached for as long as there are layers, reading when nobody else does.
    pub fn scrub(&self, how: Scrub) {
        let owner = Arc::downgrade(&self.owner);
        let runtime = self.shared().runtime.clone();
        let started = thread::Builder::new().name("scrub".to_owned()).spawn(move || {
            read_when_idle();
            let _runtime = runtime.enter();
            run(&owner, how);
        });
        if let Err(error) = started {
            tracing::error!(error = error_chain(&error), "what is cached is not checked");
        }
    }
}

fn run(owner: &Weak<Owner>, how: Scrub) {
    let now = || SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    let began = Instant::now();
    let mut pace = Pace::new(how.bytes_per_second);
    let mut pass: Option<Pass> = None;
    let mut noted = String::new();
    loop {
        let Some(layers) = owner.upgrade().map(|owner| Layers { owner }) else { return };
        let cache = layers.shared().cache.clone();
        let pass = pass.get_or_insert_with(|| {
            let noted = cache.scrub_note().and_then(|text| Pass::decode(&text));
            noted.unwrap_or_else(|| Pass::first(now()))
        });
        let next = match cache.on_disk() {
            Ok(all) => pass.next(now(), how.interval, &all),
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "cache not looked through");
                Next::Wait(LOOK)
            }
        };
        let text = pass.encode();
        if noted != text {
            if let Err(error) = cache.note_scrub(&text) {
                tracing::debug!(%error, "place of the check not noted");
            }
            noted = text;
        }
        match next {
            Next::Wait(time) => {
                drop((layers, cache));
                thread::sleep(time.min(LOOK));
            }
            Next::Check(blob) => {
                let mut pause = |bytes| {
                    thread::sleep(pace.pause(began.elapsed(), bytes));
                    // Nobody else has the layers any more.
                    let last = Arc::strong_count(&layers.owner) == 1;
                    if last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                };
                if let Err(error) = layers.check(blob, &mut pause) {
                    tracing::warn!(%blob, error = error_chain(&error), "not checked");
                }
            }
        }
    }
}

/// The disk serves this thread when nobody else asks (ioprio_set(2)). Where it can't, the pace does.
#[expect(unsafe_code, reason = "there is no safe wrapper of this system call")]
fn read_when_idle() {
    const WHO_PROCESS: libc::c_int = 1;
    const THIS_THREAD: libc::c_int = 0;
    const IDLE: libc::c_int = 3 << 13;
    // SAFETY: the call takes three numbers and touches no memory of this process.
    unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, THIS_THREAD, IDLE) };
}
