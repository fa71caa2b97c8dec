//! Messages of the scheduler stream ⇄ the planner's events and reports.

use std::collections::HashMap;

use skimmer_cache::{BlobRef, Class, Origin};
use skimmer_identity::PeerId;
use skimmer_proto::control as wire;
use skimmer_proto::control::node_message::Message;
use skimmer_proto::control::{
    Announce, Announced, Arrived, Failed, Hello, NodeMessage, Pieces, Reading, Want, Withdraw,
};
use skimmer_proto::{PieceSet, Reference, Scope, TaskId};

use super::Settings;
use super::tasks::Task;
use crate::plan::{Fault, Report};

pub const fn message(message: Message) -> NodeMessage {
    NodeMessage { message: Some(message) }
}

pub fn hello(settings: &Settings, addresses: Vec<String>) -> NodeMessage {
    message(Message::Hello(Hello {
        addresses,
        upload_bytes_per_second: settings.upload,
        download_bytes_per_second: settings.download,
    }))
}

pub fn announce(task: &Task, pieces: &PieceSet) -> NodeMessage {
    let pieces = Some(runs(pieces));
    message(Message::Announce(Announce { task: Some(wire_task(task)), pieces }))
}

pub const fn announced() -> NodeMessage {
    message(Message::Announced(Announced {}))
}

/// `None` for a task that isn't known any more.
pub fn report(tasks: &HashMap<TaskId, Task>, report: Report) -> Option<NodeMessage> {
    Some(message(match report {
        Report::Want { task, pieces, class, origin, .. } => Message::Want(Want {
            task: Some(wire_task(tasks.get(&task)?)),
            pieces: Some(runs(&pieces)),
            class: match class {
                Class::Fault => wire::Class::Fault,
                Class::PullThrough => wire::Class::PullThrough,
                Class::Background => wire::Class::Background,
            }
            .into(),
            origin,
        }),
        Report::Reading { task, pieces } => {
            Message::Reading(Reading { task: bytes(&task), pieces: Some(runs(&pieces)) })
        }
        Report::Arrived { task, pieces } => {
            Message::Arrived(Arrived { task: bytes(&task), pieces: Some(runs(&pieces)) })
        }
        Report::Failed { task, pieces, parent, fault } => Message::Failed(Failed {
            task: bytes(&task),
            pieces: Some(runs(&pieces)),
            parent: parent
                .map(|peer| PeerId::from_public_key(peer.0).to_bytes().to_vec())
                .unwrap_or_default(),
            fault: match fault {
                Fault::Gone => wire::Fault::Gone,
                Fault::Slow => wire::Fault::Slow,
                Fault::Absent => wire::Fault::Absent,
                Fault::Corrupt => wire::Fault::Corrupt,
                Fault::Refused => wire::Fault::Refused,
            }
            .into(),
            detail: String::new(),
        }),
        Report::Withdraw { task, pieces } => {
            Message::Withdraw(Withdraw { task: bytes(&task), pieces: pieces.as_ref().map(runs) })
        }
    }))
}

pub fn wire_task(task: &Task) -> wire::Task {
    task_of(&task.blob, &task.scope)
}

/// A public task names its origin: nodes that are to seed it can't tell by its scope.
pub fn task_of(blob: &BlobRef, scope: &Scope) -> wire::Task {
    let origin = blob.origins.first().filter(|_| *scope == Scope::Public);
    let origin = origin.map(ToString::to_string).filter(|name| {
        let read: Result<Reference, _> = name.parse();
        read.is_ok_and(|read| format!("{}/{}", read.host, read.repository) == *name)
    });
    wire::Task {
        digest: blob.digest.as_bytes().to_vec(),
        len: blob.len,
        scope: scope.name().to_owned(),
        origin: origin.unwrap_or_default(),
    }
}

/// The id of a task as the scheduler names it.
pub fn task_id(bytes: &[u8]) -> Option<TaskId> {
    TaskId::from_slice(bytes)
}

/// A task in full: its blob's digest and length, its scope.
pub fn task(task: Option<wire::Task>) -> Option<(skimmer_proto::Digest, u64, Scope)> {
    let task = task?;
    let digest = skimmer_proto::Digest::from_bytes(task.digest.try_into().ok()?);
    Some((digest, task.len, Scope::from_name(&task.scope)))
}

/// Where the blob of a task is to be had, if it says so.
pub fn origin(task: &wire::Task) -> Option<Origin> {
    let name = if task.scope.is_empty() { &task.origin } else { &task.scope };
    let (host, repository) = name.split_once('/')?;
    Some(Origin { host: host.to_owned(), repository: repository.to_owned() })
}

pub fn pieces(pieces: Option<Pieces>) -> Option<PieceSet> {
    PieceSet::from_wire(&pieces?.runs).ok()
}

pub fn runs(pieces: &PieceSet) -> Pieces {
    Pieces { runs: pieces.to_wire() }
}

fn bytes(task: &TaskId) -> Vec<u8> {
    task.as_bytes().to_vec()
}
