//! Runs of pieces in any order, from a [`PieceSource`].

use std::sync::Arc;

use futures::StreamExt;
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use super::{Cause, Fetcher, unanswered};
use crate::blob::Blob;
use crate::metrics::Transfer;
use crate::planner::Run;
use crate::source::{Delivery, FetchError, Order, PieceSource, Urgent};

/// The job's end of the line to its run.
pub struct End {
    pub urgent: mpsc::UnboundedReceiver<Urgent>,
    pub stop: Arc<Notify>,
}

impl Fetcher {
    /// Stores what comes until the stream ends or nobody wants the rest.
    pub(super) async fn scattered(
        self: &Arc<Self>,
        blob: &Arc<Blob>,
        run: &Run,
        source: &Arc<dyn PieceSource>,
        line: End,
    ) -> Result<(), Cause> {
        let End { urgent, stop } = line;
        let order = Order {
            blob: blob.reference(),
            geometry: blob.geometry(),
            pieces: run.pieces.clone(),
            class: run.class,
            table: blob.table(),
            urgent,
        };
        tokio::select! {
            () = stop.notified() => Ok(()),
            result = self.take_all(blob, run, source, order) => result,
        }
    }

    async fn take_all(
        self: &Arc<Self>,
        blob: &Arc<Blob>,
        run: &Run,
        source: &Arc<dyn PieceSource>,
        order: Order,
    ) -> Result<(), Cause> {
        let failed = |error| Cause::Fetch(Arc::new(error));
        let name = source.name();
        let opened = timeout(self.stall, source.fetch(order)).await;
        let mut stream =
            opened.unwrap_or_else(|_| Err(self.stalled(blob, name))).map_err(failed)?;
        let pieces = blob.pieces();
        let mut owed = run.pieces.clone();
        while !owed.is_empty() {
            let next = timeout(self.stall, stream.next()).await;
            let delivery = match next.unwrap_or_else(|_| Some(Err(self.stalled(blob, name)))) {
                Some(delivery) => delivery.map_err(failed)?,
                None => {
                    let problem = format!("{} pieces were not delivered", owed.len());
                    return Err(failed(unanswered(blob, name, problem)));
                }
            };
            self.check_shape(blob, name, &delivery).map_err(failed)?;
            let Delivery { piece, bytes, via } = delivery;
            let label = Transfer { source: via.name(), class: run.class.name() };
            self.metrics.fetched.get_or_create(&label).inc_by(bytes.len() as u64);
            blob.count(run.class, via, bytes.len());
            if owed.remove(piece) {
                self.keep(blob, &pieces, run, piece, &bytes).await?;
            }
        }
        Ok(())
    }

    fn check_shape(&self, blob: &Blob, from: &str, delivery: &Delivery) -> Result<(), FetchError> {
        let span = blob.geometry().span(delivery.piece);
        let (expected, actual) = (span.end - span.start, delivery.bytes.len() as u64);
        if expected == actual && expected > 0 {
            return Ok(());
        }
        let piece = delivery.piece;
        let problem = format!("piece {piece} came as {actual} bytes, expected {expected}");
        Err(unanswered(blob, from, problem))
    }
}
