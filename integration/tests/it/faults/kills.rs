//! `kill -9` at random: who, when, for how long, and whether once more while it starts. One seed, one list of kills.
//!
//! The holder and the daemon are never killed within one hand-over: whoever is killed of the two has everything again
//! before the other is.

use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use skimmer_integration::command::{PATIENCE, wait_for};
use skimmer_integration::control::Control;
use skimmer_integration::fleet::Machine;
use skimmer_integration::sim::random::Random;

/// What the daemon logs when a new holder has been given everything.
const HANDED_OVER: &str = "the holder of descriptors is there again";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    Daemon,
    Holder,
    Containerd,
    Control,
}

/// One or two victims at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kill {
    /// Since everybody was up again.
    pub after: Duration,
    pub victims: Vec<Victim>,
    pub down: Duration,
    /// So long after its start the first one is killed again.
    pub starting: Option<Duration>,
}

impl Kill {
    /// How many kills it is.
    pub fn count(&self) -> usize {
        self.victims.len() + usize::from(self.starting.is_some())
    }
}

/// At least `count` kills.
pub fn plan(seed: u64, count: usize) -> Vec<Kill> {
    let mut random = Random::new(seed);
    let (mut kills, mut planned) = (Vec::new(), 0);
    while planned < count {
        let kill = draw(&mut random);
        planned += kill.count();
        kills.push(kill);
    }
    kills
}

fn draw(random: &mut Random) -> Kill {
    let mut victims = vec![victim(random)];
    if random.one_in(3) {
        let second = victim(random);
        let both = [victims[0], second];
        let one_hand_over = both.contains(&Victim::Holder) && both.contains(&Victim::Daemon);
        if second != victims[0] && !one_hand_over {
            victims.push(second);
        }
    }
    // A holder that is killed while it starts has nothing yet: that would be its daemon's only one.
    let starting = victims[0] != Victim::Holder && random.one_in(4);
    let mut millis = |bound| Duration::from_millis(random.below(bound));
    Kill { after: millis(600), victims, down: millis(300), starting: starting.then(|| millis(150)) }
}

fn victim(random: &mut Random) -> Victim {
    match random.below(10) {
        0..5 => Victim::Daemon,
        5 => Victim::Holder,
        6..8 => Victim::Containerd,
        _ => Victim::Control,
    }
}

/// Carries one out, and waits until everybody is up again.
pub fn carry_out(kill: &Kill, machine: &mut Machine, control: &mut Control) -> anyhow::Result<()> {
    thread::sleep(kill.after);
    for victim in &kill.victims {
        match victim {
            Victim::Daemon => machine.skimmerd.kill()?,
            Victim::Holder => machine.skimmerd.kill_holder()?,
            Victim::Containerd => machine.containerd_mut()?.kill()?,
            Victim::Control => control.kill()?,
        }
    }
    thread::sleep(kill.down);
    if let Some(after) = kill.starting {
        match kill.victims[0] {
            Victim::Daemon => machine.skimmerd.run_briefly(after)?,
            Victim::Containerd => machine.containerd_mut()?.run_briefly(after)?,
            Victim::Control => control.run_briefly(after)?,
            Victim::Holder => {}
        }
    }
    for victim in &kill.victims {
        match victim {
            Victim::Daemon => {
                machine.skimmerd.run()?;
                // It listens first of all; when it answers, it has what the holder kept.
                machine.skimmerd.ask(&["peers"]).context("after the daemon was killed")?;
            }
            Victim::Holder => hold_again(machine)?,
            Victim::Containerd => machine.containerd_mut()?.run()?,
            Victim::Control => control.run()?,
        }
    }
    Ok(())
}

/// Starts a holder where one was killed, and waits until it has everything.
pub fn hold_again(machine: &mut Machine) -> anyhow::Result<()> {
    let count = |machine: &Machine| machine.skimmerd.log().matches(HANDED_OVER).count();
    let before = count(machine);
    machine.skimmerd.hold()?;
    wait_for("the new holder has everything", PATIENCE, || (count(machine) > before).then_some(()))
        .context("after the holder was killed")
}

#[test]
fn plans_are_repeated_by_their_seed_and_spare_hand_overs() {
    assert_eq!(plan(7, 100), plan(7, 100));
    assert_ne!(plan(7, 100), plan(8, 100));
    for seed in 0..50 {
        let kills = plan(seed, 100);
        assert!(kills.iter().map(Kill::count).sum::<usize>() >= 100);
        for kill in kills {
            let both = [Victim::Holder, Victim::Daemon];
            assert!(!both.iter().all(|victim| kill.victims.contains(victim)), "{kill:?}");
        }
    }
}
