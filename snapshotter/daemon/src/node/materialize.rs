//! Images whole, into containerd's content store.

use std::time::Duration;

use skimmer_proto::node::{MaterializeRequest, Progress, StageRequest};
use skimmer_proto::{Platform, Reference};
use skimmer_snapshots::install::ImageContent;
use skimmer_snapshots::materialize::{Contents, Materializer};
use tokio::time::timeout;
use tonic::Status;

use super::follow::{Work, follow};
use super::images::{self, Image};
use super::{Answers, Node, convert, digest, parse};

/// How long content is kept from containerd's garbage collector if nobody ends the lease.
pub const LEASE_TIME: Duration = Duration::from_secs(24 * 3600);

/// How long what was staged waits for the pull that asks for it.
const STAGED: Duration = Duration::from_secs(3600);

/// Where it waits. containerd shares content between namespaces, unless it is told otherwise; and who is about to
/// pull doesn't say into which.
const STAGE: &str = "skimmer";

/// Into which CRI pulls.
const KUBERNETES: &str = "k8s.io";

/// How long kubelet's pull is held up where the registry doesn't even say what the image is.
const RESOLVED: Duration = Duration::from_secs(30);

/// Puts an image that the registry has described into containerd, with its records.
pub fn pull(
    node: &Node,
    namespace: &str,
    image: &ImageContent,
) -> Result<Answers<Progress>, Status> {
    let top = image.manifests.first().ok_or_else(|| Status::data_loss("it has no manifest"))?;
    let contents = Contents::of(image).recorded_as(&image.reference, top);
    let work = put(node.materializer.clone(), namespace.to_owned(), contents);
    Ok(follow(node.layers.clone(), convert::specs(image), work))
}

/// Puts the blobs of an image that containerd has into its content store.
pub async fn installed(
    node: &Node,
    request: MaterializeRequest,
) -> Result<Answers<Progress>, Status> {
    let MaterializeRequest { image, namespace } = request;
    if image.is_empty() {
        return Err(Status::invalid_argument("materialize needs the name of an image"));
    }
    let image = images::find_installed(&node.containerd, &namespace, &image).await?;
    let contents = Contents::of_installed(&node.containerd, &image).await;
    let contents = contents.map_err(|error| convert::materialize_status(&error.into()))?;
    let work = put(node.materializer.clone(), image.namespace.clone(), contents);
    Ok(follow(node.layers.clone(), Image::from(image), work))
}

/// Puts what a pull is about to ask for where it finds it.
pub async fn stage(node: &Node, request: StageRequest) -> Result<Answers<Progress>, Status> {
    let (mut reference, platform) = parse(&request.reference, &request.platform)?;
    reference.digest = Some(digest(&request.digest)?);
    let (image, work) = staging(node, STAGE, reference, platform.as_ref()).await?;
    Ok(follow(node.layers.clone(), image, work))
}

/// The same for a pull by CRI, to its end.
pub async fn stage_for_kubernetes(node: &Node, reference: Reference) -> Result<(), Status> {
    let staging = staging(node, KUBERNETES, reference, None);
    let staging = timeout(RESOLVED, staging).await;
    let (_, work) = staging.map_err(|_| {
        Status::deadline_exceeded(format!("the registry didn't answer within {RESOLVED:?}"))
    })??;
    work.await
}

/// The image, and the work that puts it into the content store of `namespace`.
async fn staging(
    node: &Node,
    namespace: &'static str,
    reference: Reference,
    platform: Option<&Platform>,
) -> Result<(Image, Work), Status> {
    let resolved = node.documents.resolve(&node.registry, &reference, platform).await;
    let resolved = resolved.map_err(|error| convert::registry_status(&reference, &error))?;
    let others = node.documents.others(&node.registry, &reference, &resolved).await;
    let image = convert::content(reference, resolved);
    let contents =
        Contents::of(&image).with_documents(others.into_iter().map(convert::document).collect());
    let materializer = node.materializer.clone();
    let work: Work = Box::pin(async move {
        let kept = materializer.put(namespace, &contents, STAGED).await;
        kept.map(drop).map_err(|error| convert::materialize_status(&error))
    });
    Ok((convert::specs(&image), work))
}

fn put(materializer: Materializer, namespace: String, contents: Contents) -> Work {
    Box::pin(async move {
        let put = async {
            let kept = materializer.put(&namespace, &contents, LEASE_TIME).await?;
            kept.release().await
        };
        put.await.map_err(|error| convert::materialize_status(&error))
    })
}
