//! Which layer is it? From containerd's request to the image, the blob and where to get it.
//!
//! A request names a chain ID and may carry hints. Only an image's manifest and config, read from
//! containerd's content store by digest, tell which blob stands where in which chain; and even
//! they are the image author's word: that the blob decodes to the DiffID is for the layers to prove.

mod containerd;
mod finder;
mod image;
mod request;
#[cfg(test)]
pub(crate) mod tests;

use async_trait::async_trait;
use skimmer_proto::Digest;

pub use containerd::{Containerd, ImageRecord};
pub(crate) use finder::{Finder, bind};
pub use finder::{Found, MAX_DOCUMENT_BYTES, find_origins};
pub use image::{Image, Layer, Link, is_distributable, links};
pub use request::Request;

/// Why a layer isn't identified. containerd then unpacks it in its own way.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("key {0:?} is not <namespace>/<number>/<key>: it did not come through containerd")]
    Key(String),
    #[error("{what} {text:?} is not a digest")]
    Digest { what: &'static str, text: String, source: skimmer_proto::digest::Error },
    #[error("no image in namespace {namespace} has a layer with chain ID {reference}")]
    NoImage { namespace: String, reference: Digest },
    #[error("the snapshot parent is not the layer below chain ID {reference} in image {image}")]
    OtherParent { reference: Digest, image: String },
    #[error(
        "layer {layer} of image {image} has the media type {media_type:?}: foreign, encrypted or no \
         file system; only containerd may be able to get it"
    )]
    Unservable { layer: Digest, image: String, media_type: String },
    #[error("image {image} came from no registry that containerd recorded")]
    NoOrigin { image: String },
    #[error("read {what} from containerd's content store")]
    Content { what: String, source: ContentError },
    #[error("image {image}")]
    Image { image: String, source: image::Error },
}

/// What containerd's content store holds: an outside world.
#[async_trait]
pub trait Content: Send + Sync + 'static {
    /// The image manifests in a namespace, the newest first.
    async fn manifests(&self, namespace: &str) -> Result<Vec<Manifest>, ContentError>;

    /// One of them.
    async fn manifest(
        &self,
        namespace: &str,
        digest: &Digest,
    ) -> Result<Option<Manifest>, ContentError>;

    /// The bytes of a manifest or config: at most `limit`, and they match the digest.
    async fn read(
        &self,
        namespace: &str,
        digest: &Digest,
        limit: u64,
    ) -> Result<Vec<u8>, ContentError>;

    /// Whether containerd was told that we can `remap-ids`: else it maps a container's ids itself,
    /// and doing it twice would be wrong.
    async fn leaves_ids_to_us(&self) -> Result<bool, ContentError>;

    /// The names of the namespace's images.
    async fn image_names(&self, namespace: &str) -> Result<Vec<String>, ContentError>;
}

/// What containerd's labels say of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub digest: Digest,
    pub config: Digest,
    /// Registry hosts, without ports, each with a repository on it.
    pub sources: Vec<(String, String)>,
}

/// A failed request to containerd.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    #[error("ask containerd at {address}")]
    Ask { address: String, source: Box<tonic::Status> },
    #[error("namespace {0:?} cannot be sent to containerd")]
    Namespace(String),
    #[error("{digest} is longer than {limit} bytes")]
    TooLong { digest: Digest, limit: u64 },
    #[error("the bytes of {0} do not match it")]
    Mismatch(Digest),
}
