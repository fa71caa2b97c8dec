//! A thousand nodes, and how near they come to what is possible; and the bench's bursts of a few.

use std::time::Duration;

use skimmer_integration::sim::{Oddity, Outcome, Setup, Sharing, run};
use skimmer_scheduler::Shape;

fn report(name: &str, setup: &Setup, outcome: &Outcome) {
    println!(
        "{name}: {:.4} of the ideal (those there from the beginning {:.4}), egress {:.4}, across {:.3}, unfinished {}",
        outcome.ratio(setup),
        outcome.survivors_ratio(setup),
        outcome.egress(setup),
        outcome.copies_across(setup),
        outcome.unfinished,
    );
}

#[test]
fn a_thousand_equal_nodes() {
    let setup = Setup::new(1000, 256);
    let outcome = run(&setup).unwrap();
    report("equal", &setup, &outcome);
    assert!(outcome.ratio(&setup) <= 1.12);
    assert_eq!(outcome.origin_pieces, 256);
}

#[test]
fn each_piece_crosses_into_each_zone_about_once() {
    let setup = Setup { zones: 8, ..Setup::new(1000, 256) };
    let outcome = run(&setup).unwrap();
    report("zones", &setup, &outcome);
    assert!(outcome.ratio(&setup) <= 1.15);
    assert!(outcome.copies_across(&setup) <= 7.5);
}

#[test]
fn a_tenth_dies_and_a_tenth_joins() {
    let setup = Setup { dying: 100, joining: 100, ..Setup::new(1000, 256) };
    let outcome = run(&setup).unwrap();
    report("churn", &setup, &outcome);
    assert!(outcome.survivors_ratio(&setup) <= 1.30);
    assert_eq!(outcome.unfinished, 0);
    // Leases that were lost with their holders.
    assert!(outcome.egress(&setup) <= 1.05);
}

#[test]
fn rates_that_nobody_tells_are_found_out() {
    let setup = Setup { declared: false, ..Setup::new(500, 128) };
    let outcome = run(&setup).unwrap();
    report("unknown rates", &setup, &outcome);
    assert!(outcome.ratio(&setup) <= 1.3);
    assert_eq!(outcome.origin_pieces, 128);
}

#[test]
fn slow_nodes_hold_nobody_up() {
    for declared in [true, false] {
        let oddities = vec![Oddity::Slow(50); 10];
        let setup = Setup { declared, oddities, ..Setup::new(200, 128) };
        let outcome = run(&setup).unwrap();
        report("slow nodes", &setup, &outcome);
        let others = outcome.done[outcome.done.len() - 11].as_secs_f64();
        let most = if declared { 1.5 } else { 2.0 };
        assert!(others <= most * setup.ideal().as_secs_f64(), "declared: {declared}, {others}");
    }
}

#[test]
fn a_complete_node_spares_the_origin() {
    let oddities = vec![Oddity::Complete];
    let setup = Setup { oddities, ..Setup::new(200, 64) };
    let outcome = run(&setup).unwrap();
    report("complete", &setup, &outcome);
    assert_eq!(outcome.origin_pieces, 0);
    assert!(outcome.ratio(&setup) <= 1.2);
}

#[test]
fn large_swarms_pick_among_neighbours() {
    let mut setup = Setup { zones: 2, ..Setup::new(300, 64) };
    setup.limits.rate = 100;
    let outcome = run(&setup).unwrap();
    report("graph", &setup, &outcome);
    assert_eq!(outcome.unfinished, 0);
    assert_eq!(outcome.origin_pieces, 64);
    assert!(outcome.ratio(&setup) <= 2.0);
}

#[test]
fn nobody_loses_patience_with_a_slow_origin() {
    // A piece takes 10 s, and six generations pass before the last node has its first.
    for sharing in [Sharing::InTurn, Sharing::Fair] {
        let setup = Setup { rate: 100_000, sharing, ..Setup::new(64, 4) };
        let outcome = run(&setup).unwrap();
        report("slow", &setup, &outcome);
        // Of leases that share the link nobody knows yet that this origin takes so long for a piece.
        let most = if sharing == Sharing::Fair { 2.0 } else { 1.0 };
        assert!(outcome.egress(&setup) <= most);
    }
}

/// Nodes that pull an image of four layers over shared links, and tell nobody how fast they are.
fn burst(nodes: u32, pieces: u32, rate: u64) -> Setup {
    Setup {
        tasks: 4,
        sharing: Sharing::Fair,
        shape: Shape { pieces, piece_len: 256 << 10 },
        rate,
        declared: false,
        control: Duration::from_millis(2),
        ..Setup::new(nodes, pieces)
    }
}

#[test]
fn a_few_nodes_share_their_links() {
    for seed in 1..=3 {
        for (name, setup) in [("8", burst(8, 64, 6_250_000)), ("16", burst(16, 48, 3_125_000))] {
            let setup = Setup { seed, ..setup };
            let outcome = run(&setup).unwrap();
            report(name, &setup, &outcome);
            assert!(outcome.ratio(&setup) <= 1.12);
            assert_eq!(outcome.egress(&setup), 1.0);
        }
    }
}
