//! containerd's `Snapshots` service on the [`Snapshotter`].

use std::pin::Pin;

use futures::{Stream, StreamExt};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::{Instrument, info, info_span, warn};

use crate::convert::{self, status};
use crate::proto::snapshots_server::{Snapshots, SnapshotsServer};
use crate::proto::{
    CleanupRequest, CommitSnapshotRequest, ListSnapshotsRequest, ListSnapshotsResponse,
    MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse,
    RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest,
    UpdateSnapshotResponse, UsageRequest, UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
};
use crate::snapshotter::{Error, Prepared, Snapshotter};

/// Largest message in either direction; containerd's own limit.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// The service, ready to be added to a server.
pub fn service(snapshotter: Snapshotter) -> SnapshotsServer<Service> {
    SnapshotsServer::new(Service { snapshotter })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

pub struct Service {
    snapshotter: Snapshotter,
}

#[tonic::async_trait]
impl Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("prepare", key = request.key, parent = request.parent);
        let prepare = self.snapshotter.prepare(request.key, request.parent, request.labels);
        match prepare.instrument(span.clone()).await.map_err(|e| answered(&span, &e))? {
            Prepared::Mounts(mounts) => {
                let mounts = convert::mounts(mounts);
                Ok(Response::new(PrepareSnapshotResponse { mounts }))
            }
            Prepared::Exists(name) => Err(Status::already_exists(format!(
                "the layer is provided as committed snapshot {name}"
            ))),
        }
    }

    async fn view(
        &self,
        request: Request<ViewSnapshotRequest>,
    ) -> Result<Response<ViewSnapshotResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("view", key = request.key, parent = request.parent);
        let view = self.snapshotter.view(request.key, request.parent, request.labels);
        let mounts = view.instrument(span.clone()).await.map_err(|e| answered(&span, &e))?;
        Ok(Response::new(ViewSnapshotResponse { mounts: convert::mounts(mounts) }))
    }

    async fn mounts(
        &self,
        request: Request<MountsRequest>,
    ) -> Result<Response<MountsResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("mounts", key = request.key);
        let mounts = self.snapshotter.mounts(request.key).instrument(span.clone()).await;
        let mounts = convert::mounts(mounts.map_err(|e| answered(&span, &e))?);
        Ok(Response::new(MountsResponse { mounts }))
    }

    async fn commit(
        &self,
        request: Request<CommitSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let CommitSnapshotRequest { name, key, labels, parent, .. } = request.into_inner();
        let span = info_span!("commit", key, name);
        let commit = self.snapshotter.commit(name, key, labels, parent);
        commit.instrument(span.clone()).await.map_err(|e| answered(&span, &e))?;
        Ok(Response::new(()))
    }

    async fn remove(
        &self,
        request: Request<RemoveSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let span = info_span!("remove", key = request.key);
        let remove = self.snapshotter.remove(request.key);
        remove.instrument(span.clone()).await.map_err(|e| answered(&span, &e))?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<StatSnapshotRequest>,
    ) -> Result<Response<StatSnapshotResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("stat", key = request.key);
        let found = self.snapshotter.stat(request.key).await.map_err(|e| answered(&span, &e))?;
        Ok(Response::new(StatSnapshotResponse { info: Some(convert::info(found)) }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let request = request.into_inner();
        let info = request.info.ok_or_else(|| Status::invalid_argument("update needs an info"))?;
        let fields = request.update_mask.map(|mask| mask.paths).unwrap_or_default();
        let span = info_span!("update", key = info.name);
        let update = self.snapshotter.update(info.name, info.labels, fields);
        let updated = update.instrument(span.clone()).await.map_err(|e| answered(&span, &e))?;
        Ok(Response::new(UpdateSnapshotResponse { info: Some(convert::info(updated)) }))
    }

    type ListStream =
        Pin<Box<dyn Stream<Item = Result<ListSnapshotsResponse, Status>> + Send + 'static>>;

    async fn list(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let request = request.into_inner();
        let span = info_span!("list", filters = ?request.filters);
        let pages = self.snapshotter.list(&request.filters).map_err(|e| answered(&span, &e))?;
        let pages = ReceiverStream::new(pages).map(move |page| {
            let page = page.map_err(|e| answered(&span, &e))?;
            Ok(ListSnapshotsResponse { info: page.into_iter().map(convert::info).collect() })
        });
        Ok(Response::new(Box::pin(pages)))
    }

    async fn usage(
        &self,
        request: Request<UsageRequest>,
    ) -> Result<Response<UsageResponse>, Status> {
        let request = request.into_inner();
        let span = info_span!("usage", key = request.key);
        let usage = self.snapshotter.usage(request.key).await;
        Ok(Response::new(convert::usage(usage.map_err(|e| answered(&span, &e))?)))
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        let span = info_span!("cleanup");
        self.snapshotter.cleanup().await.map_err(|e| answered(&span, &e))?;
        Ok(Response::new(()))
    }
}

/// The error as containerd gets it. Refusals are its daily business; a failure of ours is logged.
fn answered(span: &tracing::Span, error: &Error) -> Status {
    let status = status(error);
    let _in = span.enter();
    match status.code() {
        tonic::Code::Internal | tonic::Code::DataLoss | tonic::Code::Unavailable => {
            warn!(code = ?status.code(), error = status.message(), "request failed");
        }
        code => info!(?code, error = status.message(), "request refused"),
    }
    status
}
