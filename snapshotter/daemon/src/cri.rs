//! CRI's image service at a socket of its own, wired.

use std::sync::Arc;

use anyhow::Context as _;
use async_trait::async_trait;
use skimmer_cri::{Client, Proxy, Stage};
use skimmer_proto::Reference;
use skimmer_registry::Told;
use skimmer_service::socket;
use tokio::net::UnixListener;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Server;

use crate::config::Cri;
use crate::node::{self, Node};

/// Where the service is to be; `None` where the configuration wants none.
pub fn listen(config: &Cri) -> anyhow::Result<Option<UnixListener>> {
    let address = &config.address;
    let is_set = !address.as_os_str().is_empty();
    is_set.then(|| socket::listen("cri.address", address)).transpose()
}

/// The service of the containerd that `node` works for.
pub fn proxy(config: &Cri, node: &Node, told: Told) -> Proxy {
    let stage = config.full.then(|| Arc::new(Whole(node.clone())) as Arc<dyn Stage>);
    Proxy { containerd: node.containerd.channel(), told, stage }
}

/// Serves until `stop`; at its end if there is nowhere to serve.
pub async fn serve(
    listener: Option<UnixListener>,
    proxy: Proxy,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let Some(listener) = listener else { return Ok(()) };
    let clients = UnixListenerStream::new(listener).map(|client| client.map(Client::from));
    let server = Server::builder().add_service(proxy);
    let served = server.serve_with_incoming_shutdown(clients, stop.cancelled_owned()).await;
    served.context("serve cri.address")
}

/// Images whole, in containerd's content store.
struct Whole(Node);

#[async_trait]
impl Stage for Whole {
    /// The work goes on if the caller goes away: kubelet asks again.
    async fn stage(&self, reference: &Reference) -> Result<(), Status> {
        let (node, reference) = (self.0.clone(), reference.clone());
        let staged =
            tokio::spawn(async move { node::stage_for_kubernetes(&node, reference).await });
        staged.await.map_err(|_| Status::internal("the work was interrupted"))?
    }
}
