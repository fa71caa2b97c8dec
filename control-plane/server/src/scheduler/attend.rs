//! The scheduler's gRPC service: the streams of nodes.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::{Stream, stream};
use skimmer_identity::{Membership, Role, statement};
use skimmer_proto::control::{IndexRecord, NodeMessage, SchedulerMessage, scheduler_server};
use skimmer_scheduler::NodeId;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status, Streaming};

use super::cluster::Command;
use super::convert::{self, Message};
use super::hub::Hub;
use super::records::Statement;
use super::roster::{Closer, Seat};
use crate::caller;
use crate::clock::unix_now;

/// From the call to Hello.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct Service {
    pub hub: Arc<Hub>,
    /// Messages that may wait for a node.
    pub queue: usize,
}

#[tonic::async_trait]
impl scheduler_server::Scheduler for Service {
    type AttendStream = Pin<Box<dyn Stream<Item = Result<SchedulerMessage, Status>> + Send>>;

    async fn attend(
        &self,
        request: Request<Streaming<NodeMessage>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        let member = caller::current_member(&request, self.hub.directory().trust())?;
        let (outgoing, queue) = mpsc::channel(self.queue);
        let closer = Closer::under(self.hub.stop());
        let attendance = Attendance { hub: Arc::clone(&self.hub), member, closer: closer.clone() };
        tokio::spawn(attendance.run(request.into_inner(), outgoing));
        Ok(Response::new(Box::pin(answers(queue, closer))))
    }
}

/// Messages until the stream is closed, then why.
fn answers(
    queue: mpsc::Receiver<SchedulerMessage>,
    closer: Closer,
) -> impl Stream<Item = Result<SchedulerMessage, Status>> + Send {
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
    member: Membership,
    closer: Closer,
}

impl Attendance {
    async fn run(
        self,
        mut incoming: Streaming<NodeMessage>,
        outgoing: mpsc::Sender<SchedulerMessage>,
    ) {
        let owner = self.hub.owner(&self.member.cluster);
        let node = match self.greet(&mut incoming, outgoing, &owner).await {
            Ok(node) => node,
            Err(why) => return self.closer.close(why),
        };
        let peer = self.member.peer;
        tracing::info!(%peer, cluster = self.member.cluster, zone = self.member.zone, "a node has come");
        let why = tokio::select! {
            why = self.closer.closed() => why,
            why = self.listen(&mut incoming, node, &owner) => why,
        };
        tracing::info!(%peer, why = why.message(), "a node has gone");
        self.closer.close(why);
        // The owner has gone, and its nodes with it.
        let _ = owner.send(Command::Left { node }).await;
    }

    async fn greet(
        &self,
        incoming: &mut Streaming<NodeMessage>,
        outgoing: mpsc::Sender<SchedulerMessage>,
        owner: &mpsc::Sender<Command>,
    ) -> Result<NodeId, Status> {
        let first = tokio::time::timeout(PATIENCE, incoming.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("the node said nothing"))??;
        let hello = convert::hello(first.unwrap_or_default()).map_err(|error| invalid(&error))?;
        // It may have been revoked between its certificate's check and now.
        let known =
            self.hub.manager().node(&self.member.peer).await.map_err(crate::manager::status)?;
        let known = known.filter(|node| node.revoked.is_none());
        known.ok_or_else(|| Status::permission_denied("the node was revoked"))?;
        let seat =
            Seat { member: self.member.clone(), hello, outgoing, closer: self.closer.clone() };
        let (answer, answered) = oneshot::channel();
        let stopping = || Status::unavailable("the scheduler is stopping");
        owner.send(Command::Join { seat: Box::new(seat), answer }).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())
    }

    /// Until the node ends its stream, or says what it mustn't.
    async fn listen(
        &self,
        incoming: &mut Streaming<NodeMessage>,
        node: NodeId,
        owner: &mpsc::Sender<Command>,
    ) -> Status {
        loop {
            let message = match incoming.message().await {
                Ok(Some(message)) => message,
                Ok(None) => return Status::ok("the node ended its stream"),
                Err(status) => return status,
            };
            let command = match convert::message(message) {
                Ok(Message::Publish { task, record }) => match self.check(record).await {
                    Ok(statement) => Command::Published { node, task, statement },
                    // Its signer may have been revoked since the node got it.
                    Err(error) => {
                        tracing::info!(peer = %self.member.peer, error = format!("{error:#}"), "index record refused");
                        continue;
                    }
                },
                Ok(message) => Command::Said { node, message },
                Err(error) => return invalid(&error),
            };
            if owner.send(command).await.is_err() {
                return Status::unavailable("the scheduler is stopping");
            }
        }
    }

    /// A record may be passed on by others than its signer; its signature is what counts.
    async fn check(&self, record: IndexRecord) -> anyhow::Result<Statement> {
        let trust = self.hub.directory().trust();
        let checked = statement::check_index(&record, trust, unix_now())?;
        anyhow::ensure!(checked.signer.cluster == self.member.cluster, "it is of another cluster");
        let signer = self.hub.manager().node(&checked.signer.peer).await?;
        let party = signer.context("nobody knows its signer")?.token;
        Ok(Statement {
            table: checked.table,
            signer: checked.signer.peer,
            seed: checked.signer.role == Role::Seed,
            party,
            record,
        })
    }
}

fn invalid(error: &convert::Error) -> Status {
    Status::invalid_argument(error.to_string())
}
