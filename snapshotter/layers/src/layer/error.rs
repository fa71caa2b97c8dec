//! Why a layer can't be used, in words for the person whose pull or read failed.

use std::io;

use skimmer_proto::Digest;

use crate::{fill, mount, pull};

/// A layer that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("layer {layer} of {image}")]
pub struct LayerError {
    /// Digest of the blob.
    pub layer: Digest,
    pub image: String,
    #[source]
    pub cause: Cause,
}

#[derive(Debug, thiserror::Error)]
pub enum Cause {
    #[error("open the blob in the cache")]
    Blob { source: skimmer_cache::blob::Error },
    #[error("open the layer's files in the cache")]
    Files { source: skimmer_cache::layer::Error },
    #[error("store what is known of the layer")]
    Record { source: skimmer_store::Error },
    #[error(
        "the blob is known to decode to a layer with the DiffID {actual}, but this image's config \
         says {expected}: the image lists another image's DiffIDs, or is damaged"
    )]
    DiffId { expected: Digest, actual: Digest },
    #[error("pull it through")]
    Pull { source: Box<pull::Error> },
    #[error("read the inodes of its index")]
    Inodes { source: Box<skimmer_index::erofs::ReadError> },
    #[error("fetch what is missing of it")]
    Fill { source: std::sync::Arc<fill::Error> },
    #[error("verify it")]
    Verify { source: super::VerifyError },
    #[error("mount it")]
    Mount { source: mount::Error },
    #[error("map its inodes into memory")]
    Map { source: io::Error },
    #[error("the control plane says that the index by which it was mounted is a lie")]
    Disowned,
    #[error("it was released meanwhile")]
    Released,
    #[error("work on it was interrupted")]
    Interrupted,
}
