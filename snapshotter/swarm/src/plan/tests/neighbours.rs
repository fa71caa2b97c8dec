//! Large swarms: the scheduler names neighbours, and the node picks among what they have.

use super::*;

#[test]
fn in_a_large_swarm_the_rarest_piece_is_chosen_first() {
    let mut b = Bench::led();
    b.want(1, 0..100, Class::PullThrough);
    let peers = vec![(peer(3), set(0..50)), (peer(4), set(0..51)), (peer(5), set(0..40))];
    let actions = b.apply(Event::Neighbours { task: task(1), peers });
    let asks = asked(&actions);
    let of = |n| asks.iter().find(|(peer, _)| *peer == n).map(|(_, p)| p.clone()).unwrap();
    assert!(of(4).contains(50), "{asks:?}");
    assert!(
        asks.iter().all(|(_, pieces)| pieces.len() == 1),
        "others wait there as well: {asks:?}"
    );
    let rare = (40..51).filter(|p| asks.iter().any(|(_, pieces)| pieces.contains(*p))).count();
    assert_eq!(rare, 2, "before those that all have: {asks:?}");
}

#[test]
fn in_a_large_swarm_neighbours_hear_at_once_of_what_they_lack() {
    let mut b = Bench::led();
    b.want(1, 0..2, Class::PullThrough);
    let peers = vec![(peer(3), set(0..2)), (peer(4), set(1..2)), (peer(6), set(1..2))];
    b.apply(Event::Neighbours { task: task(1), peers });
    let has = |n, pieces| Event::Has { task: task(1), peer: peer(n), pieces, active: true };
    b.apply(has(4, set(1..2)));
    let told = b.apply(Event::Stored { task: task(1), pieces: set(0..1) });
    let tells = |n| told.contains(&Action::Probe { task: task(1), peer: peer(n) });
    assert_eq!([3, 4, 6].map(tells), [false, true, false], "one hasn't answered yet");
    // Also of the last piece, with which the download is over.
    b.now += 20 * MS;
    b.apply(has(4, set(0..1)));
    let peers = vec![(peer(3), set(0..2)), (peer(5), set(0..1))];
    b.apply(Event::Neighbours { task: task(1), peers });
    b.apply(has(5, set(0..1)));
    let told = b.apply(Event::Stored { task: task(1), pieces: set(1..2) });
    assert!(told.contains(&Action::Probe { task: task(1), peer: peer(5) }), "{told:?}");
}
