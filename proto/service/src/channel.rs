//! The way to the control plane: gRPC over our own TLS, which knows the authority by its fingerprint.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use skimmer_identity::tls;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

const CONNECT: Duration = Duration::from_secs(10);
/// A server that doesn't answer pings for so long is gone.
const PING: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("use {address:?} as the control plane's address: it must be host:port")]
    Address { address: String },
    #[error("connect to the control plane at {address}")]
    Connect { address: String, source: tonic::transport::Error },
}

/// A connection to the server at `address` (`host:port`).
pub async fn connect(address: &str, config: Arc<ClientConfig>) -> Result<Channel, Error> {
    let wrong = |_| Error::Address { address: address.to_owned() };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(wrong)?;
    let endpoint = endpoint
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .keep_alive_while_idle(true);
    let target = address.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let (target, connector) = (target.clone(), TlsConnector::from(Arc::clone(&config)));
        async move {
            let stream = TcpStream::connect(target).await?;
            stream.set_nodelay(true)?;
            Ok::<_, io::Error>(TokioIo::new(connector.connect(tls::any_name(), stream).await?))
        }
    });
    let connected = endpoint.connect_with_connector(connector).await;
    connected.map_err(|source| Error::Connect { address: address.to_owned(), source })
}
