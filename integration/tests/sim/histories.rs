//! Thousands of small swarms in which everything goes wrong at once: no promise is broken, and whoever can be served is.

use std::time::Duration;

use skimmer_integration::sim::random::Random;
use skimmer_integration::sim::{Oddity, Setup, run};

const HISTORIES: u64 = 3000;

/// A swarm that the seed describes.
fn setup(seed: u64) -> Setup {
    let mut random = Random::new(seed);
    let mut below = |bound: u64| u32::try_from(random.below(bound)).unwrap();
    let nodes = 2 + below(11);
    let large = seed.is_multiple_of(50);
    let mut setup = Setup::new(nodes, 1 + below(if large { 1500 } else { 24 }));
    setup.seed = seed;
    setup.zones = 1 + below(3);
    setup.declared = below(2) == 0;
    setup.control = Duration::from_micros(200 + u64::from(below(60_000)));
    setup.spread = Duration::from_millis(1 + u64::from(below(2000)));
    setup.dying = below(u64::from(nodes));
    setup.joining = below(4);
    setup.readers = below(2) == 0;
    // Patience shorter than the model's: a node that stalls and one that is only slow both end.
    setup.limits.patience = Duration::from_secs(20);
    if below(6) == 0 {
        setup.limits.rate = 0;
    }
    if !large && below(4) > 0 {
        for _ in 0..1 + below(4) {
            let slow = Oddity::Slow(2 + u64::from(below(60)));
            setup.oddities.push(match below(10) {
                0 => slow,
                1 => Oddity::Liar,
                2 => Oddity::Corrupt,
                3 => Oddity::Stalling,
                4 => Oddity::Refused,
                5 => Oddity::Unlucky,
                6 => Oddity::Complete,
                7 => Oddity::Seed,
                _ => Oddity::None,
            });
        }
    }
    setup
}

#[test]
fn small_swarms_in_trouble() {
    let seeds = match std::env::var("SEED") {
        Ok(seed) => {
            let seed: u64 = seed.parse().unwrap();
            seed..seed + 1
        }
        Err(_) => 0..HISTORIES,
    };
    let mut failed = Vec::new();
    for seed in seeds.clone() {
        let setup = setup(seed);
        if let Err(error) = run(&setup) {
            if failed.is_empty() {
                eprintln!("{setup:?}\n{error:#}");
            } else {
                let text = error.root_cause().to_string();
                eprintln!("seed {seed}: {}", text.lines().next().unwrap_or_default());
            }
            failed.push(seed);
        }
    }
    assert!(failed.is_empty(), "{} of {seeds:?} failed: {failed:?}", failed.len());
}
