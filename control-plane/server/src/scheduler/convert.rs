//! Messages of nodes into values, strictly; values into messages.
//!
//! Nodes may lie: everything is bounded and checked against everything else that the message says.

use skimmer_identity::PeerId;
use skimmer_proto::control::node_message::Message as Wire;
use skimmer_proto::control::{self, IndexRecord, NodeMessage};
use skimmer_proto::{Digest, Geometry, PieceSet, Reference, Scope, TaskId};
use skimmer_scheduler::{Class, Fault, Shape};

const MAX_ADDRESSES: usize = 16;
const MAX_ADDRESS: usize = 256;
const MAX_DETAIL: usize = 300;

/// A task as a node describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub id: TaskId,
    pub blob: Digest,
    pub scope: Scope,
    /// In bytes; in a [`Message::Find`], 0 where it isn't known.
    pub len: u64,
    pub shape: Shape,
    /// `host/repository` where the node that made it known reads it.
    pub origin: Option<String>,
}

/// A node's greeting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub addresses: Vec<String>,
    /// Bytes per second; 0 while unknown.
    pub upload: u64,
    pub download: u64,
}

/// Everything that a node says after its greeting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    Announce {
        task: Task,
        pieces: PieceSet,
    },
    Announced,
    Want {
        task: Task,
        pieces: PieceSet,
        class: Class,
        origin: bool,
    },
    Reading {
        task: TaskId,
        pieces: PieceSet,
    },
    Arrived {
        task: TaskId,
        pieces: PieceSet,
    },
    Failed {
        task: TaskId,
        pieces: PieceSet,
        parent: Option<PeerId>,
        fault: Fault,
        detail: String,
    },
    /// `None`: everything.
    Withdraw {
        task: TaskId,
        pieces: Option<PieceSet>,
    },
    Publish {
        task: Task,
        record: IndexRecord,
    },
    Find {
        task: Task,
    },
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("the stream's first message has to be Hello, and the only one")]
    Hello,
    #[error("a message of an unknown kind")]
    Unknown,
    #[error(
        "a greeting has more than {MAX_ADDRESSES} addresses, or one of more than {MAX_ADDRESS} bytes"
    )]
    Addresses,
    #[error("a message doesn't say which task it is about")]
    NoTask,
    #[error("a task's id or digest isn't 32 bytes")]
    Id,
    #[error("a task's blob has {0} bytes; none has that many")]
    Length(u64),
    #[error("a task's scope isn't host/repository")]
    Scope,
    #[error("a task's origin isn't host/repository")]
    Origin,
    #[error("read the pieces of a message")]
    Pieces(#[from] skimmer_proto::pieces::Error),
    #[error("a message names piece {piece} of a blob of {pieces}")]
    NoSuchPiece { piece: u32, pieces: u32 },
    #[error("a message's class or fault isn't known")]
    Kind,
    #[error("a parent's peer id isn't one")]
    Parent,
    #[error("an index record is for another blob than its task")]
    Record,
}

pub fn hello(hello: control::Hello) -> Result<Hello, Error> {
    let addresses = hello.addresses;
    let legal =
        |a: &String| a.len() <= MAX_ADDRESS && a.bytes().all(|byte| byte.is_ascii_graphic());
    if addresses.len() > MAX_ADDRESSES || !addresses.iter().all(legal) {
        return Err(Error::Addresses);
    }
    let (upload, download) = (hello.upload_bytes_per_second, hello.download_bytes_per_second);
    Ok(Hello { addresses, upload, download })
}

pub fn to_hello(hello: &Hello) -> control::Hello {
    control::Hello {
        addresses: hello.addresses.clone(),
        upload_bytes_per_second: hello.upload,
        download_bytes_per_second: hello.download,
    }
}

/// The task that the message is about, if it is about one.
pub fn task_of(message: &NodeMessage) -> Result<Option<TaskId>, Error> {
    let described = |said: &Option<control::Task>| task(said.clone()).map(|task| Some(task.id));
    match message.message.as_ref().ok_or(Error::Unknown)? {
        Wire::Hello(_) => Err(Error::Hello),
        Wire::Announced(_) => Ok(None),
        Wire::Announce(said) => described(&said.task),
        Wire::Want(said) => described(&said.task),
        Wire::Publish(said) => described(&said.task),
        Wire::Find(said) => described(&said.task),
        Wire::Reading(said) => task_id(&said.task).map(Some),
        Wire::Arrived(said) => task_id(&said.task).map(Some),
        Wire::Failed(said) => task_id(&said.task).map(Some),
        Wire::Withdraw(said) => task_id(&said.task).map(Some),
    }
}

pub fn message(message: NodeMessage) -> Result<Message, Error> {
    Ok(match message.message.ok_or(Error::Unknown)? {
        Wire::Hello(_) => return Err(Error::Hello),
        Wire::Announce(said) => {
            let task = task(said.task)?;
            let pieces = pieces_of(&task, said.pieces)?;
            Message::Announce { task, pieces }
        }
        Wire::Announced(control::Announced {}) => Message::Announced,
        Wire::Want(said) => {
            let class = class(said.class())?;
            let task = task(said.task)?;
            let pieces = pieces_of(&task, said.pieces)?;
            Message::Want { task, pieces, class, origin: said.origin }
        }
        Wire::Reading(said) => {
            Message::Reading { task: task_id(&said.task)?, pieces: pieces(said.pieces)? }
        }
        Wire::Arrived(said) => {
            Message::Arrived { task: task_id(&said.task)?, pieces: pieces(said.pieces)? }
        }
        Wire::Failed(said) => Message::Failed {
            task: task_id(&said.task)?,
            fault: fault(said.fault())?,
            pieces: pieces(said.pieces)?,
            parent: match said.parent.as_slice() {
                [] => None,
                id => Some(PeerId::from_bytes(id).map_err(|_| Error::Parent)?),
            },
            detail: said.detail.chars().filter(|c| !c.is_control()).take(MAX_DETAIL).collect(),
        },
        Wire::Withdraw(said) => Message::Withdraw {
            task: task_id(&said.task)?,
            pieces: said.pieces.map(|said| pieces(Some(said))).transpose()?,
        },
        Wire::Publish(said) => {
            let task = task(said.task)?;
            let record = said.record.ok_or(Error::Record)?;
            if record.blob != task.blob.as_bytes() {
                return Err(Error::Record);
            }
            Message::Publish { task, record }
        }
        Wire::Find(said) => Message::Find { task: task(said.task)? },
    })
}

fn task(said: Option<control::Task>) -> Result<Task, Error> {
    let said = said.ok_or(Error::NoTask)?;
    let blob = Digest::from_bytes(said.digest.try_into().map_err(|_| Error::Id)?);
    let geometry = Geometry::of(said.len).ok_or(Error::Length(said.len))?;
    let scope = Scope::from_name(&said.scope);
    if let Scope::Repository(name) = &scope
        && !is_repository(name)
    {
        return Err(Error::Scope);
    }
    let origin = Some(said.origin).filter(|origin| !origin.is_empty());
    if origin.as_ref().is_some_and(|origin| !is_repository(origin)) {
        return Err(Error::Origin);
    }
    let shape = Shape { pieces: geometry.pieces(), piece_len: geometry.piece_len() };
    Ok(Task { id: TaskId::of(&scope, &blob), blob, scope, len: said.len, shape, origin })
}

/// `host/repository`, written as we do.
fn is_repository(name: &str) -> bool {
    let read: Result<Reference, _> = name.parse();
    read.is_ok_and(|reference| format!("{}/{}", reference.host, reference.repository) == name)
}

fn task_id(bytes: &[u8]) -> Result<TaskId, Error> {
    TaskId::from_slice(bytes).ok_or(Error::Id)
}

fn pieces(said: Option<control::Pieces>) -> Result<PieceSet, Error> {
    Ok(PieceSet::from_wire(&said.unwrap_or_default().runs)?)
}

fn pieces_of(task: &Task, said: Option<control::Pieces>) -> Result<PieceSet, Error> {
    let pieces = pieces(said)?;
    match pieces.iter().last() {
        Some(piece) if piece >= task.shape.pieces => {
            Err(Error::NoSuchPiece { piece, pieces: task.shape.pieces })
        }
        _ => Ok(pieces),
    }
}

const fn class(class: control::Class) -> Result<Class, Error> {
    match class {
        control::Class::Fault => Ok(Class::Fault),
        control::Class::PullThrough => Ok(Class::PullThrough),
        control::Class::Background => Ok(Class::Background),
        control::Class::Unspecified => Err(Error::Kind),
    }
}

const fn fault(fault: control::Fault) -> Result<Fault, Error> {
    match fault {
        control::Fault::Gone => Ok(Fault::Gone),
        control::Fault::Slow => Ok(Fault::Slow),
        control::Fault::Absent => Ok(Fault::Absent),
        control::Fault::Corrupt => Ok(Fault::Corrupt),
        control::Fault::Refused => Ok(Fault::Refused),
        control::Fault::Unspecified => Err(Error::Kind),
    }
}

pub fn to_task(task: &Task) -> control::Task {
    control::Task {
        digest: task.blob.as_bytes().to_vec(),
        len: task.len,
        scope: task.scope.name().to_owned(),
        origin: task.origin.clone().unwrap_or_default(),
    }
}

pub fn to_pieces(pieces: &PieceSet) -> control::Pieces {
    control::Pieces { runs: pieces.to_wire() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};
    use prost::Message as _;

    use super::*;

    fn wire(len: u64, scope: &str) -> Option<control::Task> {
        let scope = scope.into();
        Some(control::Task { digest: vec![7; 32], len, scope, ..Default::default() })
    }

    fn from_origin(origin: &str) -> Option<control::Task> {
        Some(control::Task { origin: origin.into(), ..wire(1 << 20, "").unwrap() })
    }

    fn want(task: Option<control::Task>, runs: &[u32], class: i32) -> NodeMessage {
        let pieces = Some(control::Pieces { runs: runs.to_vec() });
        let want = control::Want { task, pieces, class, origin: true };
        NodeMessage { message: Some(Wire::Want(want)) }
    }

    #[test]
    fn a_want_is_read() {
        let read = message(want(wire(1 << 20, "r.io/a"), &[1, 3], 2)).unwrap();
        let Message::Want { task, pieces, class, origin } = read else { panic!("{read:?}") };
        let scope = Scope::Repository("r.io/a".into());
        assert_eq!(task.id, TaskId::of(&scope, &Digest::from_bytes([7; 32])));
        assert_eq!((task.shape.pieces, task.shape.piece_len), (4, 256 << 10));
        assert_eq!((pieces.to_wire(), class, origin), (vec![1, 3], Class::PullThrough, true));
        assert_eq!(to_task(&task), wire(1 << 20, "r.io/a").unwrap());
        let read = message(want(from_origin("r.io:5000/a/b"), &[1, 3], 2)).unwrap();
        let Message::Want { task: public, .. } = read else { panic!("{read:?}") };
        assert_eq!(to_task(&public), from_origin("r.io:5000/a/b").unwrap());
        assert_eq!(public.id, TaskId::of(&Scope::Public, &public.blob), "it isn't part of the id");
    }

    #[test]
    fn lies_are_refused() {
        let mib = 1 << 20;
        for (bad, expected) in [
            (NodeMessage::default(), Error::Unknown),
            (want(None, &[], 1), Error::NoTask),
            (want(wire(u64::MAX, ""), &[], 1), Error::Length(u64::MAX)),
            (want(wire(mib, "debian"), &[], 1), Error::Scope),
            (want(wire(mib, "r.io/a:tag"), &[], 1), Error::Scope),
            (want(wire(mib, "r.io/../a"), &[], 1), Error::Scope),
            (want(from_origin("debian"), &[], 1), Error::Origin),
            (want(from_origin("r.io/a?b"), &[], 1), Error::Origin),
            (want(wire(mib, ""), &[2, 3], 1), Error::NoSuchPiece { piece: 4, pieces: 4 }),
            (want(wire(0, ""), &[0, 1], 1), Error::NoSuchPiece { piece: 0, pieces: 0 }),
            (want(wire(mib, ""), &[0], 1), Error::Pieces(skimmer_proto::pieces::Error::Odd)),
            (want(wire(mib, ""), &[], 0), Error::Kind),
            (want(wire(mib, ""), &[], 77), Error::Kind),
        ] {
            assert_eq!(message(bad.clone()), Err(expected), "{bad:?}");
        }
        let greeting = |addresses: Vec<String>| control::Hello { addresses, ..Default::default() };
        assert!(hello(greeting(vec!["/ip4/10.0.0.1/tcp/4001".into()])).is_ok());
        assert_eq!(hello(greeting(vec!["/x".into(); 17])), Err(Error::Addresses));
        assert_eq!(hello(greeting(vec!["x".repeat(257)])), Err(Error::Addresses));
        let again = NodeMessage { message: Some(Wire::Hello(greeting(Vec::new()))) };
        assert_eq!(message(again), Err(Error::Hello));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(decoded) = NodeMessage::decode(bytes.as_slice()) {
                if let Some(Wire::Hello(greeting)) = &decoded.message {
                    let _ = hello(greeting.clone());
                }
                let about = task_of(&decoded);
                if let Ok(Message::Want { task, pieces, .. }) = message(decoded) {
                    prop_assert!(pieces.len() <= task.shape.pieces);
                    prop_assert_eq!(about, Ok(Some(task.id)));
                }
            }
        }
    }
}
