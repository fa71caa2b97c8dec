//! The connection to skimmerd.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use skimmer_proto::node::node_client::NodeClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// Nothing answers at a socket.
#[derive(Debug)]
pub struct Unreachable {
    address: PathBuf,
    program: &'static str,
    option: &'static str,
}

impl Unreachable {
    fn skimmerd(address: &Path) -> Self {
        Self { address: address.to_owned(), program: "skimmerd", option: "--address" }
    }

    pub fn control(address: &Path) -> Self {
        Self { address: address.to_owned(), program: "skimmer-control", option: "--control-socket" }
    }
}

impl std::fmt::Display for Unreachable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { address, program, option } = self;
        write!(
            f,
            "connect to {program} at {} (is it running? `systemctl status {program}`; another socket: {option})",
            address.display()
        )
    }
}

pub async fn connect(address: &Path) -> anyhow::Result<NodeClient<Channel>> {
    let channel = unix_channel(address)
        .await
        .map_err(|error| anyhow::Error::from(error).context(Unreachable::skimmerd(address)))?;
    // An exported index of the largest blob, in one message at most 4 MiB each way otherwise.
    Ok(NodeClient::new(channel).max_decoding_message_size(16 << 20))
}

/// A gRPC channel over a unix socket.
pub async fn unix_channel(address: &Path) -> Result<Channel, tonic::transport::Error> {
    let path = address.to_owned();
    // The URI is never used: the connector below decides where the bytes go.
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
}

/// The daemon's own words, without gRPC's.
pub fn plain(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}
