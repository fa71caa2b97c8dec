//! What nodes and the scheduler say to each other in tests. Tasks are public, of pieces of 256 KiB.

use skimmer_proto::Digest;
use skimmer_proto::control::node_message::Message as Said;
use skimmer_proto::control::scheduler_message::Message as Heard;
use skimmer_proto::control::{self, Class};

use crate::member::Stream;

const PIECE: u64 = 256 << 10;

pub fn task(blob: &Digest, len: u64) -> Option<control::Task> {
    Some(control::Task { digest: blob.as_bytes().to_vec(), len, ..control::Task::default() })
}

fn all(pieces: u32) -> Option<control::Pieces> {
    Some(control::Pieces { runs: vec![0, pieces] })
}

/// A whole blob of so many pieces of 256 KiB.
pub async fn announce(stream: &Stream, blob: &Digest, pieces: u32) -> anyhow::Result<()> {
    let task = task(blob, u64::from(pieces) * PIECE);
    stream.say(Said::Announce(control::Announce { task, pieces: all(pieces) })).await?;
    stream.say(Said::Announced(control::Announced {})).await
}

pub async fn want(stream: &Stream, blob: &Digest, pieces: u32) -> anyhow::Result<()> {
    stream.say(Said::Announced(control::Announced {})).await?;
    let task = task(blob, u64::from(pieces) * PIECE);
    let class = Class::PullThrough.into();
    stream.say(Said::Want(control::Want { task, pieces: all(pieces), class, origin: true })).await
}

pub fn assigned(heard: Heard) -> Option<(control::Assign, control::Peer)> {
    match heard {
        Heard::Assign(assign) => assign.parent.clone().map(|parent| (assign, parent)),
        _ => None,
    }
}

pub fn lease(heard: Heard) -> Option<Vec<u32>> {
    match heard {
        Heard::Lease(lease) => Some(lease.pieces?.runs),
        _ => None,
    }
}

/// What the node was told to fetch is there.
pub async fn arrived(
    stream: &Stream,
    task: Vec<u8>,
    pieces: Option<control::Pieces>,
) -> anyhow::Result<()> {
    stream.say(Said::Arrived(control::Arrived { task, pieces })).await
}
