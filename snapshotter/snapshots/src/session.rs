//! Work in a containerd under a lease of its own, so that its garbage collector leaves alone what is half done.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::{
    CreateImageRequest, CreateRequest, DeleteRequest, Image, Info, InfoRequest, UpdateImageRequest,
    UpdateRequest, WriteAction, WriteContentRequest,
};
use containerd_client::types::Descriptor;
use futures::stream;
use prost_types::FieldMask;
use skimmer_proto::Digest;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use crate::install::Document;

pub type Labels = HashMap<String, String>;

/// A call to containerd that failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} in containerd")]
pub struct Error {
    pub operation: String,
    pub source: Status,
}

/// How long content is kept from the garbage collector if nobody ends the lease.
pub const LEASE_TIME: Duration = Duration::from_secs(24 * 3600);

/// A namespace of a containerd, and a lease in it.
pub struct Session {
    pub containerd: Channel,
    namespace: String,
    lease: String,
}

impl Session {
    /// The lease ends by itself after `time`.
    pub async fn open(containerd: Channel, namespace: &str, time: Duration) -> Result<Self, Error> {
        let expires = humantime::format_rfc3339_seconds(SystemTime::now() + time).to_string();
        let request = CreateRequest {
            labels: HashMap::from([("containerd.io/gc.expire".to_owned(), expires)]),
            id: format!("skimmer-{}", unique()),
        };
        let namespace = namespace.to_owned();
        let mut session = Self { containerd, namespace, lease: String::new() };
        let mut leases = LeasesClient::new(session.containerd.clone());
        let response = leases.create(session.request(request)).await;
        let response = response.map_err(|source| failed("create a lease", source))?;
        session.lease = response.into_inner().lease.map(|lease| lease.id).unwrap_or_default();
        Ok(session)
    }

    /// Ends the lease: what nothing refers to may go.
    pub async fn close(self) -> Result<(), Error> {
        let request = DeleteRequest { id: self.lease.clone(), sync: false };
        let mut leases = LeasesClient::new(self.containerd.clone());
        match leases.delete(self.request(request)).await {
            Err(source) if source.code() != Code::NotFound => Err(failed("delete a lease", source)),
            _ => Ok(()),
        }
    }

    pub fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.containerd.clone())
    }

    /// Whether the namespace has the content.
    pub async fn has(&self, digest: &Digest) -> Result<bool, Error> {
        let request = InfoRequest { digest: digest.to_string() };
        match self.content().info(self.request(request)).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(source) => Err(failed(&format!("look up {digest}"), source)),
        }
    }

    /// Adds labels to content.
    pub async fn label(&self, digest: &Digest, labels: Labels) -> Result<(), Error> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_string(), labels, ..Info::default() };
        let update = UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        let updated = self.content().update(self.request(update)).await;
        updated.map_err(|source| failed(&format!("label {digest}"), source))?;
        Ok(())
    }

    /// Writes `document` into the content store; if it is there already, its labels are added.
    pub async fn write(&self, document: &Document, labels: Labels) -> Result<(), Error> {
        let digest = document.digest.to_string();
        let size = i64::try_from(document.bytes.len()).unwrap_or(i64::MAX);
        let commit = WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: format!("skimmer-{}-{digest}", unique()),
            total: size,
            expected: digest.clone(),
            offset: 0,
            data: document.bytes.clone(),
            labels: labels.clone(),
        };
        let failed = |source| failed(&format!("store {digest}"), source);
        let exists = match self.content().write(self.request(stream::iter([commit]))).await {
            Ok(response) => is_there(response.into_inner()).await.map_err(failed)?,
            Err(status) if status.code() == Code::AlreadyExists => true,
            Err(source) => return Err(failed(source)),
        };
        if exists { self.label(&document.digest, labels).await } else { Ok(()) }
    }

    /// Creates the image record `name`, or points it at `target`.
    pub async fn record(&self, name: &str, target: Descriptor) -> Result<(), Error> {
        let record = Image { name: name.to_owned(), target: Some(target), ..Image::default() };
        let mut images = ImagesClient::new(self.containerd.clone());
        let create = CreateImageRequest { image: Some(record.clone()), source_date_epoch: None };
        let created = match images.create(self.request(create)).await {
            Err(status) if status.code() == Code::AlreadyExists => {
                let update_mask = Some(FieldMask { paths: vec!["target".to_owned()] });
                let update = UpdateImageRequest {
                    image: Some(record),
                    update_mask,
                    source_date_epoch: None,
                };
                images.update(self.request(update)).await.map(|_| ())
            }
            other => other.map(|_| ()),
        };
        created.map_err(|source| failed(&format!("record image {name}"), source))
    }

    /// `message` in our namespace and under our lease.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let pairs = [("containerd-namespace", &self.namespace), ("containerd-lease", &self.lease)];
        for (name, value) in pairs {
            if let Ok(value) = MetadataValue::<Ascii>::try_from(value.as_str())
                && !value.is_empty()
            {
                request.metadata_mut().insert(name, value);
            }
        }
        request
    }
}

/// Reads the answers to a commit to their end, where its error is. Whether the content was there already.
pub async fn is_there<T>(mut answers: Streaming<T>) -> Result<bool, Status> {
    loop {
        match answers.message().await {
            Ok(Some(_)) => {}
            Ok(None) => return Ok(false),
            Err(status) if status.code() == Code::AlreadyExists => return Ok(true),
            Err(status) => return Err(status),
        }
    }
}

pub fn failed(operation: &str, source: Status) -> Error {
    Error { operation: operation.to_owned(), source }
}

/// The label by which containerd knows where content is from: it writes the host without its port.
pub fn source_label(host: &str, repository: &str) -> (String, String) {
    let host = host.split(':').next().unwrap_or_default();
    (format!("containerd.io/distribution.source.{host}"), repository.to_owned())
}

/// Different for each call on this machine: time and a counter.
pub fn unique() -> String {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}", now.as_nanos(), CALLS.fetch_add(1, Ordering::Relaxed))
}
