//! Calls of the image service, handed on to containerd.
//!
//! Owns: what happens around a pull: its credentials are remembered before and forgotten if it failed with them, and the
//! image's blobs are brought in first where that is wanted.
//! Does not own: the answer. It is always containerd's own.
//!
//! Invariants:
//! - Nothing that goes wrong here keeps a call from containerd.
//! - No message is changed, also none that is newer than we are.

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use async_trait::async_trait;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, Limited};
use skimmer_proto::Reference;
use skimmer_registry::Told;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::Channel;
use tower::{Service, ServiceExt as _};
use tracing::{debug, info};

use crate::pull::Pull;

const PULL: &str = "/runtime.v1.ImageService/PullImage";

/// A request to pull. containerd's own limit for messages.
const PULL_BYTES: usize = 16 << 20;

/// Brings an image's blobs to where containerd looks for them.
#[async_trait]
pub trait Stage: Send + Sync {
    /// The message of an error is for the log only.
    async fn stage(&self, reference: &Reference) -> Result<(), Status>;
}

/// The image service of the containerd at the other end of a channel.
#[derive(Clone)]
pub struct Proxy {
    pub containerd: Channel,
    /// Learns the credentials of pulls.
    pub told: Told,
    /// Called before a pull is handed on; `None` where containerd's snapshotter wants no blobs.
    pub stage: Option<Arc<dyn Stage>>,
}

impl NamedService for Proxy {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl Service<Request<Body>> for Proxy {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let answer = if request.uri().path() == PULL {
                this.pull(request).await
            } else {
                this.forward(request).await
            };
            Ok(answer.unwrap_or_else(Status::into_http))
        })
    }
}

impl Proxy {
    async fn pull(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (parts, body) = request.into_parts();
        let body = Limited::new(body, PULL_BYTES).collect().await;
        let body = body.map_err(|error| {
            Status::resource_exhausted(format!("read the request to pull: {error}"))
        })?;
        let body = body.to_bytes();
        let pull = Pull::of(&body);
        let request = Request::from_parts(parts, Body::new(Full::new(body)));
        let Some(Pull { reference, credential }) = pull else {
            debug!("a request to pull can't be read here");
            return self.forward(request).await;
        };
        let repository = reference.repository.as_str();
        let fresh = credential
            .filter(|(host, credential)| self.told.remember(host, repository, credential));
        if let Some(stage) = &self.stage
            && let Err(error) = stage.stage(&reference).await
        {
            let error = error.message();
            info!(%reference, error, "containerd gets the blobs of an image itself");
        }
        let answer = self.forward(request).await;
        if let Some((host, credential)) = fresh
            && !answer.as_ref().is_ok_and(has_succeeded)
        {
            self.told.forget(&host, repository, &credential);
        }
        answer
    }

    async fn forward(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let mut containerd = self.containerd.clone();
        let answer = async { containerd.ready().await?.call(request).await };
        answer.await.map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            let cause = cause.unwrap_or_default();
            Status::unavailable(format!("skimmerd doesn't reach containerd: {error}{cause}"))
        })
    }
}

/// gRPC servers say at once that a call has failed, and at the end of the answer that it hasn't.
fn has_succeeded(answer: &Response<Body>) -> bool {
    answer.status().is_success()
        && answer.headers().get("grpc-status").is_none_or(|status| status == "0")
}
