//! A node as the control plane sees it: a key, a certificate, gRPC over mutual TLS. Nothing behind it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hyper_util::rt::TokioIo;
use skimmer_identity::{Credentials, JoinToken, Key, tls};
use skimmer_proto::control::manager_client::ManagerClient;
use skimmer_proto::control::node_message::Message as Said;
use skimmer_proto::control::scheduler_client::SchedulerClient;
use skimmer_proto::control::scheduler_message::Message as Heard;
use skimmer_proto::control::{
    self, EnrolRequest, GrantRequest, Hello, NodeMessage, RenewRequest, SchedulerMessage,
};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Status, Streaming};

/// How long a message may take to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A channel to the control plane at `address`, which must be the one that `fingerprint` names.
pub async fn channel(
    address: &str,
    fingerprint: [u8; 32],
    credentials: Option<Arc<Credentials>>,
) -> anyhow::Result<Channel> {
    let tls = TlsConnector::from(tls::control_client(fingerprint, credentials)?);
    let to = address.to_owned();
    let connect = tower::service_fn(move |_: Uri| {
        let (tls, to) = (tls.clone(), to.clone());
        async move {
            let stream = TcpStream::connect(to).await?;
            std::io::Result::Ok(TokioIo::new(tls.connect(tls::any_name(), stream).await?))
        }
    });
    let endpoint = Endpoint::from_static("http://control-plane");
    endpoint.connect_with_connector(connect).await.with_context(|| format!("connect to {address}"))
}

/// A member of a cluster.
pub struct Member {
    pub credentials: Arc<Credentials>,
    pub membership: control::Membership,
    fingerprint: [u8; 32],
    manager: String,
}

impl Member {
    /// Enrols a new key at the manager at `address`.
    pub async fn enrol(address: &str, token: &str, zone: &str) -> anyhow::Result<Self> {
        Self::enrol_key(address, token, zone, Key::generate()?).await
    }

    pub async fn enrol_key(
        address: &str,
        token: &str,
        zone: &str,
        key: Key,
    ) -> anyhow::Result<Self> {
        let fingerprint = token.parse::<JoinToken>()?.fingerprint;
        let request = EnrolRequest {
            token: token.to_owned(),
            csr: key.csr()?,
            zone: zone.to_owned(),
            name: format!("host-{zone}"),
        };
        let mut manager = ManagerClient::new(channel(address, fingerprint, None).await?);
        let membership = manager.enrol(request).await?.into_inner();
        let credentials = Credentials::new(key, &membership.certificate)?;
        Ok(Self { credentials, membership, fingerprint, manager: address.to_owned() })
    }

    /// Its peer id, as text.
    pub fn id(&self) -> String {
        self.credentials.key().peer().to_string()
    }

    /// A new connection to the manager, made with the certificate that it has now.
    pub async fn manager(&self) -> anyhow::Result<ManagerClient<Channel>> {
        let credentials = Some(Arc::clone(&self.credentials));
        Ok(ManagerClient::new(channel(&self.manager, self.fingerprint, credentials).await?))
    }

    /// Renews its certificate over a new connection.
    pub async fn renew(&mut self) -> anyhow::Result<()> {
        let csr = self.credentials.key().csr()?;
        let renewed = self.manager().await?.renew(RenewRequest { csr }).await?;
        self.membership = renewed.into_inner();
        Ok(self.credentials.set_certificate(&self.membership.certificate)?)
    }

    pub async fn grant(
        &self,
        registry: &str,
        repository: &str,
        authorization: &str,
    ) -> anyhow::Result<Vec<u8>> {
        let request = GrantRequest {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            authorization: authorization.to_owned(),
            manifest: String::new(),
        };
        Ok(self.manager().await?.grant(request).await?.into_inner().grant)
    }

    /// Opens its stream to the scheduler that it was told of, and greets it.
    pub async fn attend(&self) -> anyhow::Result<Stream> {
        self.attend_at(format!("/memory/{}", self.id())).await
    }

    /// The same; others are told that it listens at `address`, a multiaddr.
    pub async fn attend_at(&self, address: String) -> anyhow::Result<Stream> {
        let scheduler = self.membership.schedulers.first().context("told of no scheduler")?;
        let credentials = Some(Arc::clone(&self.credentials));
        let channel = channel(scheduler, self.fingerprint, credentials).await?;
        let (said, says) = mpsc::channel(64);
        let hello = Hello { addresses: vec![address], ..Hello::default() };
        said.send(NodeMessage { message: Some(Said::Hello(hello)) }).await?;
        let heard = SchedulerClient::new(channel).attend(ReceiverStream::new(says)).await?;
        Ok(Stream { said, heard: heard.into_inner() })
    }
}

/// A node's stream to the scheduler.
pub struct Stream {
    said: mpsc::Sender<NodeMessage>,
    heard: Streaming<SchedulerMessage>,
}

impl Stream {
    pub async fn say(&self, message: Said) -> anyhow::Result<()> {
        self.said.send(NodeMessage { message: Some(message) }).await.context("the stream has ended")
    }

    /// The next message; the status with which the stream ended, if it did.
    pub async fn next(&mut self) -> anyhow::Result<Result<Heard, Status>> {
        let next = tokio::time::timeout(PATIENCE, self.heard.message()).await;
        Ok(match next.context("the scheduler says nothing")? {
            Ok(Some(message)) => Ok(message.message.context("an empty message")?),
            Ok(None) => Err(Status::ok("the scheduler ended the stream")),
            Err(status) => Err(status),
        })
    }

    /// The first message that `pick` takes; those before it are dropped.
    pub async fn wait<T>(&mut self, mut pick: impl FnMut(Heard) -> Option<T>) -> anyhow::Result<T> {
        loop {
            let message = self.next().await?.context("the stream ended")?;
            if let Some(picked) = pick(message) {
                return Ok(picked);
            }
        }
    }

    /// How the stream ends; what is said before is dropped.
    pub async fn end(&mut self) -> anyhow::Result<Status> {
        loop {
            if let Err(status) = self.next().await? {
                return Ok(status);
            }
        }
    }
}
