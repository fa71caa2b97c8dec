//! The scheduler's gRPC service: the streams of nodes, and of schedulers that speak for theirs.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::{Stream, stream};
use skimmer_identity::{Membership, Role, statement};
use skimmer_proto::control::node_message::Message as Wire;
use skimmer_proto::control::{
    IndexRecord, NodeMessage, RelayAnswer, RelayMessage, SchedulerMessage, scheduler_server,
};
use skimmer_scheduler::NodeId;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status, Streaming};

use super::cluster::Command;
use super::convert::{self, Message};
use super::front::Front;
use super::hub::{Hub, World};
use super::records::Statement;
use super::relay::{self, Relay};
use super::roster::{Closer, Seat};
use crate::caller;
use crate::clock::unix_now;

/// From a call to its first message.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub struct Service {
    pub hub: Arc<Hub>,
    /// Messages that may wait for a node.
    pub queue: usize,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl scheduler_server::Scheduler for Service {
    type AttendStream = Answers<SchedulerMessage>;
    type RelayStream = Answers<RelayAnswer>;

    async fn attend(
        &self,
        request: Request<Streaming<NodeMessage>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        let member = caller::current_member(&request, self.hub.directory().trust())?;
        if member.role == Role::Scheduler {
            return Err(Status::permission_denied("a scheduler is no node"));
        }
        let (outgoing, queue) = mpsc::channel(self.queue);
        let (hub, world) = (Arc::clone(&self.hub), self.hub.world());
        let closer = Closer::under(&world.end);
        let attendance = Attendance { hub, world, member, closer: closer.clone() };
        tokio::spawn(attendance.run(request.into_inner(), outgoing));
        Ok(Response::new(Box::pin(answers(queue, closer))))
    }

    async fn relay(
        &self,
        request: Request<Streaming<RelayMessage>>,
    ) -> Result<Response<Self::RelayStream>, Status> {
        let member = caller::current_member(&request, self.hub.directory().trust())?;
        if member.role != Role::Scheduler {
            return Err(Status::permission_denied("only a scheduler speaks for nodes"));
        }
        let (outgoing, queue) = mpsc::channel(relay::QUEUE);
        let (hub, world) = (Arc::clone(&self.hub), self.hub.world());
        let closer = Closer::under(&world.end);
        let relay = Relay { hub, world, member, closer: closer.clone(), queue: self.queue };
        tokio::spawn(relay.run(request.into_inner(), outgoing));
        Ok(Response::new(Box::pin(answers(queue, closer))))
    }
}

/// Messages until the stream is closed, then why.
fn answers<T: Send>(
    queue: mpsc::Receiver<T>,
    closer: Closer,
) -> impl Stream<Item = Result<T, Status>> + Send {
    stream::unfold(Some((queue, closer)), async |state| {
        let (mut queue, closer) = state?;
        tokio::select! {
            biased;
            why = closer.closed() => Some((Err(why), None)),
            message = queue.recv() => Some((Ok(message?), Some((queue, closer)))),
        }
    })
}

/// One node's stream.
struct Attendance {
    hub: Arc<Hub>,
    world: Arc<World>,
    member: Membership,
    closer: Closer,
}

impl Attendance {
    async fn run(
        self,
        mut incoming: Streaming<NodeMessage>,
        outgoing: mpsc::Sender<SchedulerMessage>,
    ) {
        let cluster = &self.member.cluster;
        let owner = self.world.owner(&self.hub, cluster);
        let front = self.world.front(&self.hub, cluster);
        let speech = Speech { hub: &self.hub, cluster, owner: &owner };
        let node = match self.greet(&mut incoming, outgoing, &speech, front.as_deref()).await {
            Ok(node) => node,
            Err(why) => return self.closer.close(why),
        };
        let peer = self.member.peer;
        tracing::info!(%peer, cluster, zone = self.member.zone, "a node has come");
        let why = tokio::select! {
            why = self.closer.closed() => why,
            why = self.listen(&mut incoming, node, &speech, front.as_deref()) => why,
        };
        tracing::info!(%peer, why = why.message(), "a node has gone");
        self.closer.close(why);
        // The owner has gone, and its nodes with it.
        let _ = owner.send(Command::Left { node }).await;
        if let Some(front) = front {
            front.leave(peer).await;
        }
    }

    async fn greet(
        &self,
        incoming: &mut Streaming<NodeMessage>,
        outgoing: mpsc::Sender<SchedulerMessage>,
        speech: &Speech<'_>,
        front: Option<&Front>,
    ) -> Result<NodeId, Status> {
        let first = tokio::time::timeout(PATIENCE, incoming.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("the node said nothing"))??;
        let Some(Wire::Hello(hello)) = first.and_then(|first| first.message) else {
            return Err(invalid(&convert::Error::Hello));
        };
        let hello = convert::hello(hello).map_err(|error| invalid(&error))?;
        // It may have been revoked between its certificate's check and now.
        let known =
            self.hub.manager().node(&self.member.peer).await.map_err(crate::manager::status)?;
        let known = known.filter(|node| node.revoked.is_none());
        known.ok_or_else(|| Status::permission_denied("the node was revoked"))?;
        let seat =
            Seat { member: self.member.clone(), hello, outgoing, closer: self.closer.clone() };
        if let Some(front) = front {
            front.join(seat.clone()).await;
        }
        speech.join(seat).await
    }

    /// Until the node ends its stream, or says what it mustn't.
    async fn listen(
        &self,
        incoming: &mut Streaming<NodeMessage>,
        node: NodeId,
        speech: &Speech<'_>,
        front: Option<&Front>,
    ) -> Status {
        loop {
            let message = match incoming.message().await {
                Ok(Some(message)) => message,
                Ok(None) => return Status::ok("the node ended its stream"),
                Err(status) => return status,
            };
            if let Some(front) = front {
                let task = match convert::task_of(&message) {
                    Ok(task) => task,
                    Err(error) => return invalid(&error),
                };
                if !front.pass(self.member.peer, task, &message).await {
                    continue;
                }
            }
            if let Err(why) = speech.hear(node, message).await {
                return why;
            }
        }
    }
}

/// The way from a stream to the owner of its cluster.
pub struct Speech<'a> {
    pub hub: &'a Hub,
    pub cluster: &'a str,
    pub owner: &'a mpsc::Sender<Command>,
}

impl Speech<'_> {
    pub async fn send(&self, command: Command) -> Result<(), Status> {
        self.owner.send(command).await.map_err(|_| stopping())
    }

    pub async fn join(&self, seat: Seat) -> Result<NodeId, Status> {
        let (answer, answered) = oneshot::channel();
        self.send(Command::Join { seat: Box::new(seat), answer }).await?;
        answered.await.map_err(|_| stopping())
    }

    /// The node says something after its greeting.
    pub async fn hear(&self, node: NodeId, message: NodeMessage) -> Result<(), Status> {
        let command = match convert::message(message) {
            Ok(Message::Publish { task, record }) => match self.check(record).await {
                Ok(statement) => Command::Published { node, task, statement },
                // Its signer may have been revoked since the node got it.
                Err(error) => {
                    tracing::info!(error = format!("{error:#}"), "index record refused");
                    return Ok(());
                }
            },
            Ok(message) => Command::Said { node, message },
            Err(error) => return Err(invalid(&error)),
        };
        self.send(command).await
    }

    /// A record may be passed on by others than its signer; its signature is what counts.
    async fn check(&self, record: IndexRecord) -> anyhow::Result<Statement> {
        let trust = self.hub.directory().trust();
        let checked = statement::check_index(&record, trust, unix_now())?;
        anyhow::ensure!(checked.signer.cluster == self.cluster, "it is of another cluster");
        let signer = self.hub.manager().node(&checked.signer.peer).await?;
        let party = signer.context("nobody knows its signer")?.token;
        Ok(Statement {
            table: checked.table,
            signer: checked.signer.peer,
            seed: checked.signer.role == Role::Seed,
            party,
            not_after: checked.signer.not_after,
            record,
        })
    }
}

fn invalid(error: &convert::Error) -> Status {
    Status::invalid_argument(error.to_string())
}

fn stopping() -> Status {
    Status::unavailable("the scheduler is stopping")
}
