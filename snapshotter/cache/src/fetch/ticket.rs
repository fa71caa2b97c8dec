//! Waiting for pieces.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Failure, Fetcher};
use crate::planner::{Event, NeedId, Why};

/// Somebody's wait for pieces; dropping it says that nobody waits any more.
#[derive(Debug)]
pub struct Ticket {
    pub(super) need: NeedId,
    /// `None` once answered.
    pub(super) answer: Option<oneshot::Receiver<Result<(), Failure>>>,
    pub(super) fetcher: Arc<Fetcher>,
}

impl Ticket {
    /// Resolves when every piece has arrived, or one can't be had. To be called until it resolves
    /// once; may be cancelled.
    pub async fn wait(&mut self) -> Result<(), Failure> {
        let Some(answer) = self.answer.as_mut() else { return Ok(()) };
        let result = answer.await;
        self.answer = None;
        // The sender is only dropped with the planner.
        result.unwrap_or(Err(Failure { why: Why::Deadline, cause: None }))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.answer.is_some() {
            self.fetcher.state().waiters.remove(&self.need);
            self.fetcher.handle(Event::Withdrawn { need: self.need });
        }
    }
}
