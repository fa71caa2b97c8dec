//! The owner without sockets: seats are channels.

use skimmer_identity::{Key, Membership};
use skimmer_proto::control::SchedulerMessage;
use skimmer_proto::{PieceSet, Scope};
use skimmer_scheduler::{Class, Shape};
use tokio_util::sync::CancellationToken;

use super::super::convert::Hello;
use super::super::metrics::Metrics;
use super::super::roster::Closer;
use super::*;

struct Fixture {
    owner: Owner,
    errands: mpsc::Receiver<Errand>,
}

struct Guest {
    peer: PeerId,
    node: NodeId,
    heard: mpsc::Receiver<SchedulerMessage>,
    closer: Closer,
}

impl Fixture {
    fn new() -> Self {
        let (send, errands) = mpsc::channel(16);
        let limits = Limits { settle: Duration::ZERO, ..Limits::default() };
        Self { owner: Owner::new(limits, Metrics::default().of("c"), send, 7), errands }
    }

    /// A node whose queue holds `queue` messages.
    fn join(&mut self, queue: usize) -> Guest {
        self.join_as(Key::generate().unwrap().peer(), queue)
    }

    fn join_as(&mut self, peer: PeerId, queue: usize) -> Guest {
        let (outgoing, heard) = mpsc::channel(queue);
        let closer = Closer::under(&CancellationToken::new());
        let member = Membership {
            peer,
            cluster: "c".into(),
            zone: String::new(),
            role: Role::Peer,
            not_before: 0,
            not_after: 1,
        };
        let hello = Hello { addresses: Vec::new(), upload: 0, download: 0 };
        let seat = Seat { member, hello, outgoing, closer: closer.clone() };
        let node = self.owner.join(seat);
        Guest { peer, node, heard, closer }
    }

    fn say(&mut self, guest: &Guest, message: Message) {
        self.owner.obey(Command::Said { node: guest.node, message });
    }
}

impl Guest {
    fn drain(&mut self) -> Vec<Out> {
        let mut all = Vec::new();
        while let Ok(message) = self.heard.try_recv() {
            all.extend(message.message);
        }
        all
    }

    async fn end(&self) -> tonic::Code {
        self.closer.closed().await.code()
    }
}

fn task(n: u32, len: u64) -> Task {
    let blob = Digest::of(&n.to_le_bytes());
    let geometry = skimmer_proto::Geometry::of(len).unwrap();
    let shape = Shape { pieces: geometry.pieces(), piece_len: geometry.piece_len() };
    let (id, scope) = (TaskId::of(&Scope::Public, &blob), Scope::Public);
    Task { id, blob, scope, len, shape, origin: None }
}

fn announce(task: &Task) -> Message {
    Message::Announce { task: task.clone(), pieces: PieceSet::all(task.shape.pieces) }
}

#[tokio::test]
async fn a_node_that_takes_nothing_is_closed_and_others_go_on() {
    let mut fixture = Fixture::new();
    let (slow, mut other) = (fixture.join(1), fixture.join(100));
    let task = task(1, 1 << 20);
    fixture.say(&other, announce(&task));
    let pieces = PieceSet::all(task.shape.pieces);
    let want = Message::Want { task, pieces, class: Class::PullThrough, origin: false };
    fixture.say(&slow, want);
    assert_eq!(fixture.owner.lost, [slow.node]);
    assert_eq!(slow.end().await, tonic::Code::ResourceExhausted);
    let lost = fixture.owner.lost.pop_front().unwrap();
    fixture.owner.leave(lost);
    assert_eq!(fixture.owner.roster.len(), 1);
    assert!(matches!(other.drain()[..], [Out::Welcome(control::Welcome { epoch: 7 })]));
}

#[tokio::test]
async fn a_revoked_node_is_out_at_once_and_for_good() {
    let mut fixture = Fixture::new();
    let (bad, mut good) = (fixture.join(100), fixture.join(100));
    good.drain();
    fixture.owner.obey(Command::Blocked { peers: BTreeSet::from([bad.peer]) });
    assert_eq!(bad.end().await, tonic::Code::PermissionDenied);
    let told = [Out::Blocked(control::Blocked { peers: vec![bad.peer.to_bytes().to_vec()] })];
    assert_eq!(good.drain(), told);
    fixture.owner.obey(Command::Blocked { peers: BTreeSet::from([bad.peer]) });
    assert_eq!(good.drain(), [], "told once");
    let again = fixture.join_as(bad.peer, 100);
    assert_eq!(again.end().await, tonic::Code::PermissionDenied);
    let mut late = fixture.join(100);
    assert!(matches!(&late.drain()[..], [Out::Welcome(_), Out::Blocked(_)]));
}

#[tokio::test]
async fn the_first_length_of_a_blob_counts_and_tasks_are_bounded() {
    let mut fixture = Fixture::new();
    let (one, two) = (fixture.join(100), fixture.join(100));
    fixture.say(&one, announce(&task(0, 1 << 20)));
    fixture.say(&two, announce(&task(0, 1 << 21)));
    let rows = fixture.owner.task_rows();
    assert_eq!((rows.len(), rows[0].task.len, rows[0].view.peers), (1, 1 << 20, 1));
    for n in 0..TASKS_PER_NODE + 10 {
        fixture.say(&two, Message::Find { task: task(n, 1) });
    }
    // One of them is task 0, which it got wrong.
    assert_eq!(fixture.owner.tasks.len(), 1 + TASKS_PER_NODE as usize);
    fixture.owner.leave(two.node);
    fixture.owner.sweep();
    assert_eq!(fixture.owner.tasks.len(), 1, "what nobody has or looks for is forgotten");
    fixture.owner.leave(one.node);
    fixture.owner.sweep();
    assert!(fixture.owner.tasks.is_empty());
}

#[tokio::test]
async fn a_liar_is_reported_to_be_revoked() {
    let mut fixture = Fixture::new();
    let mut guests = [(); 3].map(|()| fixture.join(100));
    let task = task(0, 1);
    for (guest, table) in guests.iter().zip([1, 2, 2]) {
        let statement = Statement {
            table: Digest::from_bytes([table; 32]),
            signer: guest.peer,
            seed: false,
            party: *guest.peer.public_key(),
            not_after: 0,
            record: IndexRecord::default(),
        };
        fixture.owner.obey(Command::Published { node: guest.node, task: task.clone(), statement });
    }
    assert!(matches!(fixture.errands.try_recv(), Ok(Errand::Note(_))));
    match fixture.errands.try_recv() {
        Ok(Errand::Revoke { peers, .. }) => assert_eq!(peers, [guests[0].peer]),
        other => panic!("{other:?}"),
    }
    assert_eq!(guests[0].end().await, tonic::Code::PermissionDenied);
    let heard = guests[1].drain();
    let purges = heard.iter().filter(|message| matches!(message, Out::Purge(_))).count();
    assert_eq!(purges, 3, "both tables when they differ, then the wrong one: {heard:?}");
    assert!(heard.iter().any(|message| matches!(message, Out::Blocked(_))));
}
