//! Work on an image, watched: a stream that tells how its layers stand until the work ends.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use skimmer_layers::Layers;
use skimmer_proto::node::Progress;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::images::Image;
use super::{Answers, blocking, convert};

pub type Work = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;

/// Time between two looks at the layers.
const INTERVAL: Duration = Duration::from_millis(200);

/// Does `work` and reports on `image` meanwhile. The work goes on if the caller goes away: what a
/// pull has begun, the next one would begin again.
pub fn follow(layers: Layers, image: Image, mut work: Work) -> Answers<Progress> {
    let (sender, receiver) = mpsc::channel(4);
    let image = Arc::new(image);
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            let next = async {
                interval.tick().await;
                look(&layers, &image, "layers").await
            };
            tokio::select! {
                end = &mut work => break end,
                Ok(progress) = next => {
                    // A slow reader misses looks, not the end.
                    let _ = sender.try_send(Ok(progress));
                }
            }
        };
        let last = match end {
            Ok(()) => look(&layers, &image, "done").await,
            Err(status) => Err(status),
        };
        let _ = sender.send(last).await;
    });
    Box::pin(ReceiverStream::new(receiver))
}

/// How the layers stand. The work goes on while the disk is looked at.
async fn look(
    layers: &Layers,
    image: &Arc<Image>,
    phase: &'static str,
) -> Result<Progress, Status> {
    let (layers, image) = (layers.clone(), Arc::clone(image));
    blocking(move || convert::progress(&layers, &image, phase)).await
}
