//! Having containerd take a blob: `Content.Write`, for one that lies in its folder and for one that doesn't.

use std::os::unix::fs::FileExt;

use containerd_client::services::v1::{
    AbortRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use skimmer_cache::Whole;
use skimmer_proto::Digest;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{Error, interrupted};
use crate::session::{self, Labels, Session, failed, is_there, unique};

/// Bytes in one message; containerd takes 16 MiB.
const MESSAGE_BYTES: usize = 1 << 20;
/// Messages under way.
const QUEUED: usize = 4;

/// Whether containerd has a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The namespace had it; now the lease keeps it.
    Before,
    Now,
    Not,
}

/// Has the namespace take the blob that lies in containerd's folder.
pub async fn commit(
    session: &Session,
    digest: &Digest,
    len: u64,
    labels: Labels,
) -> Result<Seen, session::Error> {
    let Some(writing) = Writing::open(session, digest, len).await? else {
        return Ok(Seen::Before);
    };
    if writing.offset != len {
        writing.abort(session).await;
        return Ok(Seen::Not);
    }
    writing.finish(labels).await
}

/// Sends the blob.
pub async fn stream(session: &Session, whole: &Whole, labels: Labels) -> Result<Seen, Error> {
    let (digest, len) = (whole.digest(), whole.size());
    let Some(mut writing) = Writing::open(session, &digest, len).await? else {
        return Ok(Seen::Before);
    };
    while writing.offset < len {
        let (reading, at) = (whole.clone(), writing.offset);
        let step = usize::try_from(len - at).unwrap_or(usize::MAX).min(MESSAGE_BYTES);
        let read = spawn_blocking(move || {
            let mut buffer = vec![0; step];
            reading.file().read_exact_at(&mut buffer, at).map(|()| buffer)
        });
        let read = read.await.map_err(|error| interrupted(digest, error))?;
        let data = match read {
            Ok(data) => data,
            Err(source) => {
                writing.abort(session).await;
                return Err(Error::Read { digest, source });
            }
        };
        writing.write(data).await?;
    }
    Ok(writing.finish(labels).await?)
}

/// A blob on its way into containerd.
struct Writing {
    name: String,
    digest: String,
    len: u64,
    /// How much of it containerd has.
    offset: u64,
    sender: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
}

impl Writing {
    /// `None`: the namespace has it.
    async fn open(
        session: &Session,
        digest: &Digest,
        len: u64,
    ) -> Result<Option<Self>, session::Error> {
        let (sender, receiver) = mpsc::channel(QUEUED);
        let digest = digest.to_string();
        let name = format!("skimmer-{}-{digest}", unique());
        let failed = |source| failed(&format!("store {digest}"), source);
        let stat = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: name.clone(),
            total: signed(len),
            expected: digest.clone(),
            ..WriteContentRequest::default()
        };
        // There is room, and the other end is below.
        let _ = sender.send(stat).await;
        let request = session.request(ReceiverStream::new(receiver));
        let answered = match session.content().write(request).await {
            Ok(response) => {
                let mut answers = response.into_inner();
                answers.message().await.map(|answer| (answers, answer))
            }
            Err(status) => Err(status),
        };
        match answered {
            Ok((answers, Some(answer))) => {
                let offset = u64::try_from(answer.offset).unwrap_or(0);
                Ok(Some(Self { name, digest: digest.clone(), len, offset, sender, answers }))
            }
            Ok((_, None)) => Err(failed(Status::internal("the answer is empty"))),
            Err(status) if status.code() == Code::AlreadyExists => Ok(None),
            Err(status) => Err(failed(status)),
        }
    }

    async fn write(&mut self, data: Vec<u8>) -> Result<(), session::Error> {
        let more = data.len() as u64;
        self.send(WriteAction::Write, data, Labels::new()).await;
        let answer = self.answers.message().await;
        let answer = answer.map_err(|source| failed(&format!("store {}", self.digest), source))?;
        let got = answer.map_or(0, |answer| u64::try_from(answer.offset).unwrap_or(0));
        if got != self.offset + more {
            let status = Status::data_loss(format!("it has {got} bytes of {}", self.offset + more));
            return Err(failed(&format!("store {}", self.digest), status));
        }
        self.offset = got;
        Ok(())
    }

    async fn finish(self, labels: Labels) -> Result<Seen, session::Error> {
        self.send(WriteAction::Commit, Vec::new(), labels).await;
        let Self { digest, sender, answers, .. } = self;
        drop(sender);
        let before = is_there(answers).await;
        let before = before.map_err(|source| failed(&format!("store {digest}"), source))?;
        Ok(if before { Seen::Before } else { Seen::Now })
    }

    async fn send(&self, action: WriteAction, data: Vec<u8>, labels: Labels) {
        let request = WriteContentRequest {
            action: action.into(),
            r#ref: self.name.clone(),
            total: signed(self.len),
            expected: self.digest.clone(),
            offset: signed(self.offset),
            data,
            labels,
        };
        // Who doesn't take it any more says why in its answer.
        let _ = self.sender.send(request).await;
    }

    /// Best effort: what is left over ends with the lease.
    async fn abort(self, session: &Session) {
        let Self { name, sender, answers, .. } = self;
        drop((sender, answers));
        let request = session.request(AbortRequest { r#ref: name });
        let _ = session.content().abort(request).await;
    }
}

/// containerd's lengths are signed.
fn signed(len: u64) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}
