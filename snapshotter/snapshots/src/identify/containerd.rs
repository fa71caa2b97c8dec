//! [`Content`] over containerd's gRPC services.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{
    GetImageRequest, Image, Info, InfoRequest, ListContentRequest, ListImagesRequest,
    ListNamespacesRequest, Plugin, PluginsRequest, ReadContentRequest, SubscribeRequest,
};
use containerd_client::types::Envelope;
use futures::{Stream, TryFutureExt as _, TryStreamExt as _};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use skimmer_proto::Digest;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tower::service_fn;

use super::{Content, ContentError, Manifest};

const SNAPSHOTTERS: &str = "io.containerd.snapshotter.v1";
const CONTENT_STORES: &str = "io.containerd.content.v1";
const REMAP_IDS: &str = "remap-ids";
const CONFIG_LABEL: &str = "containerd.io/gc.ref.content.config";
const SOURCE_LABEL: &str = "containerd.io/distribution.source.";
/// Topics of containerd's events.
const CREATED: &str = "/images/create";
const UPDATED: &str = "/images/update";
const NAMESPACE_HEADER: &str = "containerd-namespace";
const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// Names of images that are looked at for hosts.
const MAX_IMAGES: usize = 1000;
/// Where the calls go; the connector ignores it.
const NOWHERE: &str = "http://containerd.invalid";

/// An image record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRecord {
    pub name: String,
    /// Digest of what it points at.
    pub target: Digest,
    /// When it was last written.
    pub written: SystemTime,
}

/// containerd's gRPC services. Connects when first asked, and again when it has to. Clones share the
/// connection.
#[derive(Clone, Debug)]
pub struct Containerd {
    address: PathBuf,
    /// Our own socket, by which containerd's plugin for us is known.
    socket: PathBuf,
    channel: Channel,
}

impl Containerd {
    /// For the containerd whose gRPC socket is `address`, and which knows us by our `socket`. Must be
    /// called inside a tokio runtime.
    pub fn new(address: &Path, socket: &Path) -> Self {
        let target = address.to_owned();
        let connector = service_fn(move |_| {
            let target = target.clone();
            async move { UnixStream::connect(target).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static(NOWHERE).connect_with_connector_lazy(connector);
        Self { address: address.to_owned(), socket: socket.to_owned(), channel }
    }

    /// For calls to other services of the same containerd.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub async fn version(&self) -> Result<String, ContentError> {
        let version = VersionClient::new(self.channel.clone()).version(()).await;
        Ok(version.map_err(|error| self.failed(error))?.into_inner().version)
    }

    pub async fn namespaces(&self) -> Result<Vec<String>, ContentError> {
        let mut client = NamespacesClient::new(self.channel.clone());
        let reply = client.list(ListNamespacesRequest::default()).await;
        let namespaces = reply.map_err(|error| self.failed(error))?.into_inner().namespaces;
        Ok(namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    /// The image records of `namespace`.
    pub async fn images(&self, namespace: &str) -> Result<Vec<ImageRecord>, ContentError> {
        let mut client =
            ImagesClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let request = request(namespace, ListImagesRequest { filters: Vec::new() })?;
        let images = client.list(request).await.map_err(|error| self.failed(error))?;
        Ok(images.into_inner().images.into_iter().filter_map(record).collect())
    }

    /// The image record `name`, if there is one.
    pub async fn image(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<ImageRecord>, ContentError> {
        let request = request(namespace, GetImageRequest { name: name.to_owned() })?;
        match ImagesClient::new(self.channel.clone()).get(request).await {
            Ok(reply) => Ok(reply.into_inner().image.and_then(record)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.failed(status)),
        }
    }

    /// What image records are written from now on: namespaces and names. containerd answers with the first of them, so
    /// that there is nothing else to wait for.
    pub fn recorded_images(&self) -> impl Stream<Item = Result<(String, String), ContentError>> {
        let (this, mut events) = (self.clone(), EventsClient::new(self.channel.clone()));
        let filters = [CREATED, UPDATED].map(|topic| format!("topic=={topic:?}")).to_vec();
        let subscribed = async move { events.subscribe(SubscribeRequest { filters }).await };
        let events = subscribed.map_ok(tonic::Response::into_inner).try_flatten_stream();
        let recorded = events.try_filter_map(async |event| Ok(recorded(event)));
        recorded.map_err(move |error| this.failed(error))
    }

    /// The folder in which containerd keeps content, if it says so.
    pub async fn content_root(&self) -> Result<Option<PathBuf>, ContentError> {
        let plugins = self.plugins(CONTENT_STORES).await?;
        let root = plugins.into_iter().find_map(|mut plugin| plugin.exports.remove("root"));
        Ok(root.map(PathBuf::from))
    }

    /// containerd's name for us, and what it takes for our folder, if it knows us.
    pub async fn ourselves(&self) -> Result<Option<(String, Option<PathBuf>)>, ContentError> {
        let us = self.us().await?;
        let named = |mut us: Plugin| {
            let root = us.exports.remove("root").map(PathBuf::from);
            (us.id, root)
        };
        Ok(us.map(named))
    }

    async fn us(&self) -> Result<Option<Plugin>, ContentError> {
        let socket = self.socket.to_string_lossy();
        let is_us = |plugin: &Plugin| plugin.exports.get("address").is_some_and(|a| *a == socket);
        Ok(self.plugins(SNAPSHOTTERS).await?.into_iter().find(is_us))
    }

    async fn plugins(&self, kind: &str) -> Result<Vec<Plugin>, ContentError> {
        let mut client = IntrospectionClient::new(self.channel.clone());
        let request = PluginsRequest { filters: vec![format!("type=={kind:?}")] };
        let plugins = client.plugins(request).await.map_err(|error| self.failed(error))?;
        Ok(plugins.into_inner().plugins)
    }

    fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn failed(&self, source: Status) -> ContentError {
        let address = self.address.display().to_string();
        ContentError::Ask { address, source: Box::new(source) }
    }
}

#[async_trait]
impl Content for Containerd {
    async fn manifests(&self, namespace: &str) -> Result<Vec<Manifest>, ContentError> {
        let filters = vec![format!("labels.{CONFIG_LABEL:?}")];
        let request = request(namespace, ListContentRequest { filters })?;
        let pages = self.content().list(request).await;
        let mut pages = pages.map_err(|error| self.failed(error))?.into_inner();
        let mut found = Vec::new();
        while let Some(page) = pages.message().await.map_err(|error| self.failed(error))? {
            let created = |info: &Info| info.created_at.map_or((0, 0), |t| (t.seconds, t.nanos));
            found
                .extend(page.info.iter().filter_map(|info| Some((created(info), manifest(info)?))));
        }
        found.sort_by_key(|(created, manifest)| (*created, manifest.digest));
        Ok(found.into_iter().rev().map(|(_, manifest)| manifest).collect())
    }

    async fn manifest(
        &self,
        namespace: &str,
        digest: &Digest,
    ) -> Result<Option<Manifest>, ContentError> {
        let request = request(namespace, InfoRequest { digest: digest.to_string() })?;
        match self.content().info(request).await {
            Ok(reply) => Ok(reply.into_inner().info.as_ref().and_then(manifest)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.failed(status)),
        }
    }

    async fn read(
        &self,
        namespace: &str,
        digest: &Digest,
        limit: u64,
    ) -> Result<Vec<u8>, ContentError> {
        let whole = ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 };
        let parts = self.content().read(request(namespace, whole)?).await;
        let mut parts = parts.map_err(|error| self.failed(error))?.into_inner();
        let mut bytes = Vec::new();
        while let Some(part) = parts.message().await.map_err(|error| self.failed(error))? {
            bytes.extend_from_slice(&part.data);
            if bytes.len() as u64 > limit {
                return Err(ContentError::TooLong { digest: *digest, limit });
            }
        }
        if Digest::of(&bytes) != *digest {
            return Err(ContentError::Mismatch(*digest));
        }
        Ok(bytes)
    }

    async fn leaves_ids_to_us(&self) -> Result<bool, ContentError> {
        let us = self.us().await?;
        Ok(us.is_some_and(|plugin| plugin.capabilities.iter().any(|c| c == REMAP_IDS)))
    }

    async fn image_names(&self, namespace: &str) -> Result<Vec<String>, ContentError> {
        let images = self.images(namespace).await?.into_iter().take(MAX_IMAGES);
        Ok(images.map(|image| image.name).collect())
    }
}

fn request<T>(namespace: &str, message: T) -> Result<tonic::Request<T>, ContentError> {
    let value = namespace.parse().map_err(|_| ContentError::Namespace(namespace.to_owned()))?;
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert(NAMESPACE_HEADER, value);
    Ok(request)
}

fn record(image: Image) -> Option<ImageRecord> {
    let written = image.updated_at.and_then(|at| SystemTime::try_from(at).ok());
    Some(ImageRecord {
        name: image.name,
        target: image.target?.digest.parse().ok()?,
        written: written.unwrap_or(SystemTime::UNIX_EPOCH),
    })
}

/// The namespace and the name of the image that an event is about.
fn recorded(event: Envelope) -> Option<(String, String)> {
    let ImageEvent { name } = ImageEvent::decode(event.event?.value.as_slice()).ok()?;
    Some((event.namespace, name))
}

/// What `ImageCreate` and `ImageUpdate` of containerd's `api/events/image.proto` have in common.
#[derive(prost::Message)]
struct ImageEvent {
    #[prost(string, tag = "1")]
    name: String,
}

/// The content as a manifest, if its labels make it one.
fn manifest(info: &Info) -> Option<Manifest> {
    let config = info.labels.get(CONFIG_LABEL)?.parse().ok()?;
    let mut sources: Vec<_> = info
        .labels
        .iter()
        .filter_map(|(label, repositories)| Some((label.strip_prefix(SOURCE_LABEL)?, repositories)))
        .flat_map(|(host, repositories)| {
            repositories.split(',').map(|repository| (host.to_owned(), repository.to_owned()))
        })
        .collect();
    sources.sort();
    Some(Manifest { digest: info.digest.parse().ok()?, config, sources })
}
