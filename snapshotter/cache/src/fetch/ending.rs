//! The end of a run's job, however it comes.

use std::sync::Arc;

use tracing::debug;

use super::{AnySource, Cause, Fetcher, scattered};
use crate::blob::Blob;
use crate::metrics::Transfer;
use crate::planner::{Event, Outcome, Run};

/// Tells the planner of a run's end, even if its job is dropped or panics.
pub struct Ending {
    pub fetcher: Arc<Fetcher>,
    pub run: Run,
    pub failure: Option<Cause>,
    /// The job came to its end.
    pub ended: bool,
    /// For runs of pieces.
    pub line: Option<scattered::End>,
}

impl Ending {
    pub async fn perform(mut self, blob: &Arc<Blob>) {
        let source = self.fetcher.sources[self.run.source.0].name();
        let label = Transfer { source, class: self.run.class.name() };
        self.fetcher.metrics.runs.get_or_create(&label).inc();
        let result = match (&self.fetcher.sources[self.run.source.0], self.line.take()) {
            (AnySource::Ranges(source), _) => self.fetcher.transfer(blob, &self.run, source).await,
            (AnySource::Pieces(source), Some(line)) => {
                self.fetcher.scattered(blob, &self.run, source, line).await
            }
            (AnySource::Pieces(_), None) => Ok(()),
        };
        self.ended = true;
        if let Err(cause) = result {
            self.fetcher.metrics.failed_runs.get_or_create(&label).inc();
            debug!(blob = %blob.digest(), source, ?cause, "fetch failed");
            self.failure = Some(cause);
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let run = self.run.id;
        self.fetcher.ending(&self.run);
        if let Some(cause) = self.failure.take() {
            let outcome = Outcome::Failed { retryable: cause.is_retryable() };
            self.fetcher.handle_failure(self.run.blob, cause, Event::Ended { run, outcome });
        } else {
            let lost = Outcome::Failed { retryable: true };
            let outcome = if self.ended { Outcome::Done } else { lost };
            self.fetcher.handle(Event::Ended { run, outcome });
        }
    }
}
