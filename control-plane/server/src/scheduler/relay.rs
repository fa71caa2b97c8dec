//! The other end of a [`front`](super::front)'s link: nodes that attend at another scheduler take
//! their seats here as if they attended here.

use std::collections::BTreeMap;
use std::sync::Arc;

use skimmer_identity::{Membership, PeerId, Role};
use skimmer_proto::control::relay_message::Message;
use skimmer_proto::control::{RelayAnswer, RelayJoined, RelayMessage, SchedulerMessage};
use skimmer_scheduler::NodeId;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::attend::{PATIENCE, Speech};
use super::cluster::Command;
use super::convert;
use super::hub::{Hub, World};
use super::roster::{Closer, Seat};

/// Answers that may wait for the other scheduler.
pub const QUEUE: usize = 4096;

/// One scheduler's link.
pub struct Relay {
    pub hub: Arc<Hub>,
    pub world: Arc<World>,
    /// The calling scheduler.
    pub member: Membership,
    pub closer: Closer,
    /// Messages that may wait for one node.
    pub queue: usize,
}

impl Relay {
    pub async fn run(
        self,
        mut incoming: Streaming<RelayMessage>,
        answers: mpsc::Sender<RelayAnswer>,
    ) {
        let owner = self.world.owner(&self.hub, &self.member.cluster);
        let speech = Speech { hub: &self.hub, cluster: &self.member.cluster, owner: &owner };
        let mut nodes = BTreeMap::new();
        let why = tokio::select! {
            why = self.closer.closed() => why,
            why = self.listen(&mut incoming, &speech, &mut nodes, &answers) => why,
        };
        tracing::info!(why = why.message(), "the link of another scheduler has ended");
        self.closer.close(why);
        for node in nodes.into_values() {
            // The owner has gone, and its nodes with it.
            let _ = owner.send(Command::Left { node }).await;
        }
    }

    async fn listen(
        &self,
        incoming: &mut Streaming<RelayMessage>,
        speech: &Speech<'_>,
        nodes: &mut BTreeMap<PeerId, NodeId>,
        answers: &mpsc::Sender<RelayAnswer>,
    ) -> Status {
        if let Err(why) = self.greet(incoming, answers).await {
            return why;
        }
        loop {
            let message = match incoming.message().await {
                Ok(Some(message)) => message.message,
                Ok(None) => return Status::ok("the scheduler ended its link"),
                Err(status) => return status,
            };
            let done = match message {
                Some(Message::Joined(joined)) => self.join(joined, speech, nodes, answers).await,
                Some(Message::Said(said)) => {
                    let node = peer(&said.peer).map(|peer| nodes.get(&peer).copied());
                    match (node, said.message) {
                        // Its stream was closed from here.
                        (Ok(None), _) => Ok(()),
                        (Ok(Some(node)), Some(message)) => speech.hear(node, message).await,
                        (Err(why), _) => Err(why),
                        (_, None) => Err(Status::invalid_argument("a message without content")),
                    }
                }
                Some(Message::Left(left)) => match peer(&left.peer).map(|peer| nodes.remove(&peer))
                {
                    Ok(Some(node)) => speech.send(Command::Left { node }).await,
                    Ok(None) => Ok(()),
                    Err(why) => Err(why),
                },
                Some(Message::Open(_)) | None => {
                    Err(Status::invalid_argument("a link opens once, and says something"))
                }
            };
            if let Err(why) = done {
                return why;
            }
        }
    }

    /// Both ends must know the same schedulers: else a task could have two owners.
    async fn greet(
        &self,
        incoming: &mut Streaming<RelayMessage>,
        answers: &mpsc::Sender<RelayAnswer>,
    ) -> Result<(), Status> {
        let first = tokio::time::timeout(PATIENCE, incoming.message()).await;
        let first =
            first.map_err(|_| Status::deadline_exceeded("the scheduler said nothing"))??;
        let Some(Message::Open(open)) = first.and_then(|first| first.message) else {
            return Err(Status::invalid_argument("a link begins with Open"));
        };
        if !self.world.ring.ids().eq(open.schedulers.iter().map(String::as_str)) {
            return Err(Status::failed_precondition("the two schedulers know different others"));
        }
        let stopping = |_| Status::unavailable("the link has ended");
        answers.send(RelayAnswer::default()).await.map_err(stopping)
    }

    async fn join(
        &self,
        joined: RelayJoined,
        speech: &Speech<'_>,
        nodes: &mut BTreeMap<PeerId, NodeId>,
        answers: &mpsc::Sender<RelayAnswer>,
    ) -> Result<(), Status> {
        let peer = peer(&joined.peer)?;
        let hello = convert::hello(joined.hello.unwrap_or_default());
        let hello = hello.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let member = Membership {
            peer,
            zone: joined.zone,
            role: if joined.seed { Role::Seed } else { Role::Peer },
            ..self.member.clone()
        };
        let (outgoing, queue) = mpsc::channel(self.queue);
        let closer = self.closer.child();
        tokio::spawn(pass_back(joined.peer, queue, closer.clone(), answers.clone()));
        let node = speech.join(Seat { member, hello, outgoing, closer }).await?;
        // The node that was in its place was taken out when this one joined.
        nodes.insert(peer, node);
        Ok(())
    }
}

/// What this scheduler says to the node goes back over the link.
async fn pass_back(
    peer: Vec<u8>,
    mut queue: mpsc::Receiver<SchedulerMessage>,
    closer: Closer,
    answers: mpsc::Sender<RelayAnswer>,
) {
    loop {
        let (message, closed) = tokio::select! {
            biased;
            why = closer.closed() => (None, Some(why)),
            message = queue.recv() => match message {
                Some(message) => (Some(message), None),
                // It has left.
                None => return,
            },
        };
        let ended = closed.is_some();
        let closed = closed.map(|why| why.message().to_owned()).unwrap_or_default();
        let answer = RelayAnswer { peer: peer.clone(), message, closed };
        if answers.send(answer).await.is_err() || ended {
            return;
        }
    }
}

fn peer(id: &[u8]) -> Result<PeerId, Status> {
    PeerId::from_bytes(id).map_err(|error| Status::invalid_argument(error.to_string()))
}
