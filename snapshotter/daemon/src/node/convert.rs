//! Domain values to messages, errors to statuses. Nothing behind this module knows protobuf.

use std::collections::BTreeMap;

use skimmer_cache::{Blame, BlobKind, BlobRef, Class, Origin};
use skimmer_index::codec::Compression;
pub use skimmer_layers::error_chain as words;
use skimmer_layers::{
    BundleError, Failure, LayerSpec, Layers, Mode, Shown, Status as LayerStatus, toc_digest,
};
use skimmer_proto::node::{self, FetchedBytes, Progress, ShowIndexResponse};
use skimmer_proto::{Digest, Reference};
use skimmer_registry::Resolved;
use skimmer_snapshots::install::{self, Document, ImageContent, LayerDescriptor};
use skimmer_snapshots::{materialize, session};
use tonic::Status;

use super::images::Image;

pub fn registry_status(reference: &Reference, error: &skimmer_registry::Error) -> Status {
    let text = format!("resolve {reference}: {}", words(error));
    match error.blame() {
        Blame::Refused => Status::permission_denied(text),
        Blame::Local => Status::failed_precondition(text),
        Blame::Registry => Status::unavailable(text),
    }
}

pub fn layer_status(failure: &Failure) -> Status {
    Status::aborted(words(&**failure))
}

pub fn install_status(error: &install::Error) -> Status {
    match error {
        install::Error::Containerd(error) => containerd_status(error),
        other => Status::failed_precondition(words(other)),
    }
}

pub fn materialize_status(error: &materialize::Error) -> Status {
    match error {
        materialize::Error::Containerd(error) => containerd_status(error),
        materialize::Error::Content(_) => Status::unavailable(words(error)),
        other => Status::aborted(words(other)),
    }
}

/// gRPC's own words for a status are noise; its message says it all.
fn containerd_status(error: &session::Error) -> Status {
    Status::new(error.source.code(), format!("{error}: {}", error.source.message()))
}

pub fn bundle_status(error: &BundleError) -> Status {
    let text = words(error);
    match error {
        BundleError::None(_) => Status::not_found(text),
        BundleError::InUse(_) => Status::failed_precondition(text),
        BundleError::Layer { .. } => Status::internal(text),
        _ => Status::invalid_argument(text),
    }
}

/// What the registry said, as containerd is to hear it.
pub fn content(reference: Reference, resolved: Resolved) -> ImageContent {
    let single = resolved.top == resolved.manifest;
    let chain = std::iter::once(resolved.top).chain(resolved.between);
    let mut manifests: Vec<Document> = chain.map(document).collect();
    if !single {
        manifests.push(document(resolved.manifest));
    }
    let layers = resolved.layers.into_iter().map(|d| LayerDescriptor {
        media_type: d.media_type,
        digest: d.digest,
        size: d.size,
        toc_digest: toc_digest(&d.annotations),
    });
    ImageContent {
        reference,
        manifests,
        config: document(resolved.config),
        diff_ids: resolved.diff_ids,
        layers: layers.collect(),
    }
}

pub fn document(document: skimmer_registry::Document) -> Document {
    Document {
        media_type: document.descriptor.media_type,
        digest: document.descriptor.digest,
        bytes: document.bytes.into(),
    }
}

/// The layers of an image that containerd needn't know yet.
pub fn specs(content: &ImageContent) -> Image {
    let name = content.reference.to_string();
    let origin = Origin {
        host: content.reference.host.clone(),
        repository: content.reference.repository.clone(),
    };
    let layers = content.layers.iter().zip(&content.diff_ids).map(|(layer, diff_id)| LayerSpec {
        blob: BlobRef {
            digest: layer.digest,
            len: layer.size,
            kind: BlobKind::Blob,
            origins: vec![origin.clone()],
        },
        media_type: layer.media_type.clone(),
        diff_id: *diff_id,
        image: name.clone(),
        toc_digest: layer.toc_digest,
    });
    Image {
        namespace: String::new(),
        digest: content.manifests.last().map(|m| m.digest.to_string()).unwrap_or_default(),
        layers: layers.collect(),
        name,
    }
}

pub fn progress(layers: &Layers, image: &Image, phase: &str) -> Progress {
    Progress {
        phase: phase.to_owned(),
        image: image.name.clone(),
        digest: image.digest.clone(),
        layers: image.layers.iter().map(|spec| layer(layers, spec)).collect(),
    }
}

/// `lost`: snapshots whose mounts nobody kept, by the layer's blob.
pub fn image(layers: &Layers, image: Image, lost: &BTreeMap<Digest, Vec<String>>) -> node::Image {
    let described = |spec: &LayerSpec| node::Layer {
        lost: lost.get(&spec.blob.digest).cloned().unwrap_or_default(),
        ..layer(layers, spec)
    };
    node::Image {
        layers: image.layers.iter().map(described).collect(),
        namespace: image.namespace,
        name: image.name,
        digest: image.digest,
    }
}

fn layer(layers: &Layers, spec: &LayerSpec) -> node::Layer {
    match layers.status(spec) {
        Ok(status) => described(status),
        Err(cause) => node::Layer {
            digest: spec.blob.digest.to_string(),
            diff_id: spec.diff_id.to_string(),
            media_type: spec.media_type.clone(),
            size: spec.blob.len,
            mode: node::Mode::Failed.into(),
            error: words(&cause),
            ..node::Layer::default()
        },
    }
}

fn described(status: LayerStatus) -> node::Layer {
    let mode = match status.mode {
        Mode::Absent => node::Mode::Absent,
        Mode::PullThrough => node::Mode::PullThrough,
        Mode::Lazy => node::Mode::Lazy,
        Mode::Local => node::Mode::Local,
        Mode::Failed => node::Mode::Failed,
    };
    let server = match status.in_kernel {
        None => node::Server::Unspecified,
        Some(false) => node::Server::Fuse,
        Some(true) => node::Server::Kernel,
    };
    let [origin, swarm] = status.fetched_via;
    let mut fetched = FetchedBytes { origin, swarm, ..FetchedBytes::default() };
    for (class, bytes) in Class::ALL.into_iter().zip(status.fetched) {
        match class {
            Class::Fault => fetched.fault = bytes,
            Class::PullThrough => fetched.pull_through = bytes,
            Class::Background => fetched.background = bytes,
        }
    }
    node::Layer {
        digest: status.digest.to_string(),
        diff_id: status.diff_id.to_string(),
        media_type: status.media_type,
        size: status.size,
        mode: mode.into(),
        server: server.into(),
        data_bytes: status.data_bytes,
        data_bytes_present: status.data_bytes_present,
        blob_bytes_present: status.blob_bytes_present,
        fetched: Some(fetched),
        index_bytes: status.index_bytes,
        error: status.error.unwrap_or_default(),
        // That is the snapshots' to tell.
        lost: Vec::new(),
    }
}

pub fn peers(status: skimmer_swarm::swarm::Status) -> node::PeersResponse {
    let peers = status.peers.into_iter().map(|peer| {
        let link = peer.link;
        let round_trip =
            link.rtt.map_or(0, |rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX));
        node::Peer {
            id: link.peer.to_string(),
            zone: link.membership.zone,
            role: link.membership.role.name().to_owned(),
            addresses: link.addresses,
            sent_bytes: link.sent,
            received_bytes: link.received,
            round_trip_us: round_trip,
        }
    });
    node::PeersResponse {
        peers: peers.collect(),
        peer: status.peer.to_string(),
        cluster: status.cluster,
        scheduler: status.scheduler,
    }
}

pub fn shown(layer: Digest, shown: &Shown) -> ShowIndexResponse {
    let compression = match shown.index.compression {
        Compression::Stored => "none",
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    };
    ShowIndexResponse {
        layer: layer.to_string(),
        diff_id: shown.table.diff_id.to_string(),
        index_digest: shown.table.index.to_string(),
        index_bytes: shown.encoded.len() as u64,
        piece_table_bytes: shown.table.encode().len() as u64,
        blob_bytes: shown.table.geometry.blob_len(),
        data_bytes: shown.index.data_len,
        inodes: shown.inodes,
        chunks: shown.index.chunks.len() as u64,
        pieces: shown.table.geometry.pieces().into(),
        compression: compression.to_owned(),
    }
}
