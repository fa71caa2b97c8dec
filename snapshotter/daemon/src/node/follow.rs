//! Work on an image, watched: a stream that tells how its layers stand until the work ends.

use std::pin::Pin;
use std::time::Duration;

use skimmer_layers::Layers;
use skimmer_proto::node::Progress;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::images::Image;
use super::{Answers, convert};

pub type Work = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;

/// Time between two looks at the layers.
const INTERVAL: Duration = Duration::from_millis(200);

/// Does `work` and reports on `image` meanwhile. The work goes on if the caller goes away: what a
/// pull has begun, the next one would begin again.
pub fn follow(layers: Layers, image: Image, mut work: Work) -> Answers<Progress> {
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(INTERVAL);
        let end = loop {
            tokio::select! {
                end = &mut work => break end,
                _ = interval.tick() => {
                    // A slow reader misses looks, not the end.
                    let _ = sender.try_send(Ok(convert::progress(&layers, &image, "layers")));
                }
            }
        };
        let last = end.map(|()| convert::progress(&layers, &image, "done"));
        let _ = sender.send(last).await;
    });
    Box::pin(ReceiverStream::new(receiver))
}
