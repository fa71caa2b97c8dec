//! The node API (`proto/skimmer/node.proto`): requests in, the stages asked, answers out.
//!
//! Owns: nothing but handles of the stages.
//! Does not own: any decision about layers, images or containerd.

mod cache;
mod check;
pub mod convert;
mod documents;
mod follow;
mod get;
mod images;
mod materialize;

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use skimmer_layers::Layers;
use skimmer_proto::node::node_server;
use skimmer_proto::node::{
    BuildIndexRequest, CheckRequest, CheckResponse, ExportIndexRequest, FetchRequest, GetPart,
    GetRequest, ImagesRequest, ImagesResponse, ImportIndexResponse, IndexBytes, MaterializeRequest,
    PeersRequest, PeersResponse, Progress, PruneCacheRequest, PruneCacheResponse, PullRequest,
    ShowCacheRequest, ShowCacheResponse, ShowIndexRequest, ShowIndexResponse, StageRequest,
    VerifyCacheProgress, VerifyCacheRequest,
};
use skimmer_proto::{Digest, Platform, Reference};
use skimmer_registry::Registry;
use skimmer_snapshots::Snapshotter;
use skimmer_snapshots::identify::Containerd;
use skimmer_snapshots::install::{Target, install};
use skimmer_snapshots::materialize::Materializer;
use skimmer_swarm::Swarm;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status, Streaming};

use crate::keeper::KeptBy;
pub use documents::Documents;
use follow::{Work, follow};
use get::Getter;
pub use materialize::{LEASE_TIME, stage_for_kubernetes};

/// Bytes of an index in one message.
const MESSAGE_LEN: usize = 1 << 20;
/// Largest index bundle that is taken in.
const BUNDLE_LEN: usize = 1 << 30;

#[derive(Clone)]
pub struct Node {
    pub containerd: Arc<Containerd>,
    pub layers: Layers,
    pub snapshots: Snapshotter,
    pub registry: Registry,
    pub documents: Documents,
    pub materializer: Materializer,
    /// Where CRI's image service is served; empty: nowhere.
    pub image_service: PathBuf,
    /// Who keeps the descriptors of mounts.
    pub kept_by: KeptBy,
    /// `None` where the node stands alone.
    pub swarm: Option<Swarm>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl node_server::Node for Node {
    type PullStream = Answers<Progress>;
    type FetchStream = Answers<Progress>;
    type MaterializeStream = Answers<Progress>;
    type StageStream = Answers<Progress>;
    type BuildIndexStream = Answers<Progress>;
    type ExportIndexStream = Answers<IndexBytes>;
    type GetStream = Answers<GetPart>;
    type VerifyCacheStream = Answers<VerifyCacheProgress>;

    async fn images(
        &self,
        request: Request<ImagesRequest>,
    ) -> Result<Response<ImagesResponse>, Status> {
        let ImagesRequest { namespace, image } = request.into_inner();
        let found = images::find(&self.containerd, &namespace, &image).await?;
        let lost = self.snapshots.lost().await;
        let lost = lost.map_err(|error| Status::internal(convert::words(&error)))?;
        let layers = self.layers.clone();
        let images = move || {
            let described = |image| convert::image(&layers, image, &lost);
            found.into_iter().map(described).collect::<Vec<_>>()
        };
        let images = blocking(images).await?;
        Ok(Response::new(ImagesResponse { images }))
    }

    async fn pull(
        &self,
        request: Request<PullRequest>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let request = request.into_inner();
        let (reference, platform) = parse(&request.reference, &request.platform)?;
        let target = Target {
            containerd: self.containerd.channel(),
            namespace: non_empty(request.namespace, "default"),
            snapshotter: non_empty(request.snapshotter, "skimmer"),
        };
        let resolved = self.documents.resolve(&self.registry, &reference, platform.as_ref()).await;
        let resolved = resolved.map_err(|error| convert::registry_status(&reference, &error))?;
        let content = convert::content(reference, resolved);
        if request.full {
            return Ok(Response::new(materialize::pull(self, &target.namespace, &content)?));
        }
        let specs = convert::specs(&content);
        let work: Work = Box::pin(async move {
            install(&target, &content).await.map_err(|error| convert::install_status(&error))
        });
        Ok(Response::new(follow(self.layers.clone(), specs, work)))
    }

    async fn materialize(
        &self,
        request: Request<MaterializeRequest>,
    ) -> Result<Response<Self::MaterializeStream>, Status> {
        Ok(Response::new(materialize::installed(self, request.into_inner()).await?))
    }

    async fn stage(
        &self,
        request: Request<StageRequest>,
    ) -> Result<Response<Self::StageStream>, Status> {
        Ok(Response::new(materialize::stage(self, request.into_inner()).await?))
    }

    async fn fetch(
        &self,
        request: Request<FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let FetchRequest { image, namespace } = request.into_inner();
        if image.is_empty() {
            return Err(Status::invalid_argument("fetch needs the name of an image"));
        }
        let image = images::find_one(&self.containerd, &namespace, &image).await?;
        let (layers, specs) = (self.layers.clone(), image.layers.clone());
        let work: Work = Box::pin(async move {
            let completed = layers.complete(specs).await;
            completed.map_err(|failure| convert::layer_status(&failure))
        });
        Ok(Response::new(follow(self.layers.clone(), image, work)))
    }

    async fn build_index(
        &self,
        request: Request<BuildIndexRequest>,
    ) -> Result<Response<Self::BuildIndexStream>, Status> {
        let request = request.into_inner();
        let (reference, platform) = parse(&request.reference, &request.platform)?;
        let resolved = self.documents.resolve(&self.registry, &reference, platform.as_ref()).await;
        let resolved = resolved.map_err(|error| convert::registry_status(&reference, &error))?;
        let image = convert::specs(&convert::content(reference, resolved));
        let layers = self.layers.clone();
        let specs = image.layers.clone();
        let work: Work = Box::pin(async move {
            let built = layers.build(specs).await;
            built.map_err(|failure| convert::layer_status(&failure))
        });
        Ok(Response::new(follow(self.layers.clone(), image, work)))
    }

    async fn show_index(
        &self,
        request: Request<ShowIndexRequest>,
    ) -> Result<Response<ShowIndexResponse>, Status> {
        let digest = digest(&request.into_inner().layer)?;
        let layers = self.layers.clone();
        let shown = blocking(move || layers.show(digest)).await?;
        let shown = shown.map_err(|error| convert::bundle_status(&error))?;
        Ok(Response::new(convert::shown(digest, &shown)))
    }

    async fn export_index(
        &self,
        request: Request<ExportIndexRequest>,
    ) -> Result<Response<Self::ExportIndexStream>, Status> {
        let digest = digest(&request.into_inner().layer)?;
        let layers = self.layers.clone();
        let bundle = blocking(move || layers.export(digest)).await?;
        let bundle = bundle.map_err(|error| convert::bundle_status(&error))?;
        let messages: Vec<_> =
            bundle.chunks(MESSAGE_LEN).map(|part| Ok(IndexBytes { data: part.to_vec() })).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn import_index(
        &self,
        request: Request<Streaming<IndexBytes>>,
    ) -> Result<Response<ImportIndexResponse>, Status> {
        let mut messages = request.into_inner();
        let mut bundle = Vec::new();
        while let Some(message) = messages.next().await.transpose()? {
            if bundle.len() + message.data.len() > BUNDLE_LEN {
                return Err(Status::invalid_argument("the exported index is larger than 1 GiB"));
            }
            bundle.extend_from_slice(&message.data);
        }
        let layer = self.layers.import(bundle).await;
        let layer = layer.map_err(|error| convert::bundle_status(&error))?;
        Ok(Response::new(ImportIndexResponse { layer: layer.to_string() }))
    }

    async fn peers(&self, _: Request<PeersRequest>) -> Result<Response<PeersResponse>, Status> {
        let status = self.swarm.as_ref().map(Swarm::status);
        Ok(Response::new(status.map(convert::peers).unwrap_or_default()))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        let getter = Getter {
            cache: self.documents.cache.clone(),
            registry: self.registry.clone(),
            swarm: self.swarm.clone(),
        };
        Ok(Response::new(getter.get(request.into_inner()).await?))
    }

    async fn show_cache(
        &self,
        _: Request<ShowCacheRequest>,
    ) -> Result<Response<ShowCacheResponse>, Status> {
        Ok(Response::new(cache::show(&self.documents.cache).await?))
    }

    async fn prune_cache(
        &self,
        request: Request<PruneCacheRequest>,
    ) -> Result<Response<PruneCacheResponse>, Status> {
        let all = request.into_inner().all;
        Ok(Response::new(cache::prune(&self.documents.cache, all).await?))
    }

    async fn verify_cache(
        &self,
        _: Request<VerifyCacheRequest>,
    ) -> Result<Response<Self::VerifyCacheStream>, Status> {
        Ok(Response::new(cache::verify(self.layers.clone(), self.documents.cache.clone())))
    }

    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let registry = request.into_inner().registry;
        let mut checks = vec![check::daemon(), check::lazily(&self.layers)];
        let kept_by = self.kept_by.clone();
        checks.push(blocking(move || check::keeper(&kept_by, kept_by.is_safe())).await?);
        checks.push(check::containerd(&self.containerd).await);
        checks.push(check::image_service(&self.image_service));
        if !registry.is_empty() {
            checks.extend(check::registry(&self.registry, &registry).await);
        }
        Ok(Response::new(CheckResponse { checks }))
    }
}

fn parse(reference: &str, platform: &str) -> Result<(Reference, Option<Platform>), Status> {
    let invalid =
        |error: &(dyn std::error::Error + 'static)| Status::invalid_argument(convert::words(error));
    let reference = reference.parse().map_err(|error| invalid(&error))?;
    let platform = match platform {
        "" => None,
        text => Some(text.parse().map_err(|error| invalid(&error))?),
    };
    Ok((reference, platform))
}

fn digest(text: &str) -> Result<Digest, Status> {
    text.parse().map_err(|error| Status::invalid_argument(convert::words(&error)))
}

fn non_empty(text: String, default: &str) -> String {
    if text.is_empty() { default.to_owned() } else { text }
}

/// `work` on a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| Status::internal("the request was interrupted"))
}
