//! Between the domain and protobuf. Nothing behind this file knows protobuf.

use skimmer_proto::error_chain;
use tonic::{Code, Status};

use crate::layers::LayerBlame;
use crate::mounts::Mount;
use crate::snapshotter::Error;
use crate::{Kind, Snapshot, Usage, chain, proto};

pub fn info(snapshot: Snapshot) -> proto::Info {
    let kind = match snapshot.kind {
        Kind::View => proto::Kind::View,
        Kind::Active => proto::Kind::Active,
        Kind::Committed => proto::Kind::Committed,
    };
    proto::Info {
        name: snapshot.name,
        parent: snapshot.parent,
        kind: kind.into(),
        created_at: Some(snapshot.created.into()),
        updated_at: Some(snapshot.updated.into()),
        labels: snapshot.labels,
    }
}

pub fn mounts(mounts: Vec<Mount>) -> Vec<proto::Mount> {
    let convert = |mount: Mount| proto::Mount {
        r#type: mount.kind.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    };
    mounts.into_iter().map(convert).collect()
}

pub fn usage(usage: Usage) -> proto::UsageResponse {
    proto::UsageResponse {
        size: usage.bytes.try_into().unwrap_or(i64::MAX),
        inodes: usage.inodes.try_into().unwrap_or(i64::MAX),
    }
}

/// The error with all its causes; the code is what containerd's own snapshotters answer.
pub fn status(error: &Error) -> Status {
    Status::new(code(error), error_chain(error))
}

fn code(error: &Error) -> Code {
    match error {
        Error::Chain(error) => chain_code(error),
        Error::Filter(_) | Error::IdMapping { .. } => Code::InvalidArgument,
        Error::Unidentified { .. } => Code::FailedPrecondition,
        Error::Pending { .. } => Code::Unavailable,
        Error::Layer { source, .. } => match source.blame {
            LayerBlame::Content => Code::DataLoss,
            LayerBlame::Source => Code::Unavailable,
            LayerBlame::Local => Code::Internal,
        },
        Error::Records(_)
        | Error::Folders(_)
        | Error::Cover { .. }
        | Error::Remap { .. }
        | Error::Remaps(_)
        | Error::Capability(_)
        | Error::Job(_) => Code::Internal,
    }
}

fn chain_code(error: &chain::Error) -> Code {
    match error {
        chain::Error::NotFound(_) | chain::Error::NoParent(_) => Code::NotFound,
        chain::Error::Exists(_) => Code::AlreadyExists,
        chain::Error::NotActive(_)
        | chain::Error::Committed(_)
        | chain::Error::HasChildren(_)
        | chain::Error::RebaseOnUncommitted(_) => Code::FailedPrecondition,
        chain::Error::NoName
        | chain::Error::ParentNotCommitted(_)
        | chain::Error::OtherParent { .. }
        | chain::Error::Immutable { .. } => Code::InvalidArgument,
        chain::Error::TooLong(_) | chain::Error::Records(_) => Code::Internal,
    }
}
