//! Puts an image into containerd without its layers' bytes: documents into the content store, a
//! remote snapshot for each layer, then the image record. Works with every containerd, since it
//! passes the labels that only newer ones pass by themselves.
//!
//! Owns: the order of those steps and the lease that protects what is half done.
//! Does not own: where the documents come from, and what a snapshot is made of.

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::types::Descriptor;
use skimmer_proto::{Digest, Reference};
use tonic::Code;
use tonic::transport::Channel;

use crate::identify::links;
use crate::session::{self, LEASE_TIME, Labels, Session, failed, source_label, unique};
use crate::snapshot::{REFERENCE_LABEL, REQUIRED_LABEL};

/// An image as the registry describes it.
#[derive(Clone, Debug)]
pub struct ImageContent {
    pub reference: Reference,
    /// Manifests and indexes from what the reference names down to the platform's manifest.
    pub manifests: Vec<Document>,
    pub config: Document,
    /// One for each layer, from the config.
    pub diff_ids: Vec<Digest>,
    pub layers: Vec<LayerDescriptor>,
}

/// A small JSON document, stored whole.
#[derive(Clone, Debug)]
pub struct Document {
    pub media_type: String,
    pub digest: Digest,
    pub bytes: Vec<u8>,
}

impl Document {
    /// As an image record has it.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor {
            media_type: self.media_type.clone(),
            digest: self.digest.to_string(),
            size: i64::try_from(self.bytes.len()).unwrap_or(i64::MAX),
            ..Descriptor::default()
        }
    }
}

#[derive(Clone, Debug)]
pub struct LayerDescriptor {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    /// That of the table of contents inside the blob, if the manifest gives one.
    pub toc_digest: Option<Digest>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Containerd(#[from] session::Error),
    #[error("image {image} has no manifest")]
    NoManifest { image: Reference },
    #[error("image {image} has {layers} layers and {diff_ids} DiffIDs")]
    Layers { image: Reference, layers: usize, diff_ids: usize },
    #[error(
        "layer {layer} of {image} could not be prepared lazily: containerd's snapshotter \
         {snapshotter:?} answered with mounts, so it is not skimmerd"
    )]
    NotLazy { image: Reference, layer: Digest, snapshotter: String },
}

/// A containerd, a namespace of it, and its name for us.
#[derive(Clone, Debug)]
pub struct Target {
    pub containerd: Channel,
    pub namespace: String,
    pub snapshotter: String,
}

/// Longest list of layers in a label: a label is at most 4096 bytes, its key included.
const LAYERS_LABEL_LEN: usize = 4096 - "containerd.io/snapshot/cri.image-layers".len();

/// Installs `image` so that containers can be made from it.
pub async fn install(target: &Target, image: &ImageContent) -> Result<(), Error> {
    if image.layers.len() != image.diff_ids.len() {
        return Err(Error::Layers {
            image: image.reference.clone(),
            layers: image.layers.len(),
            diff_ids: image.diff_ids.len(),
        });
    }
    let session = Session::open(target.containerd.clone(), &target.namespace, LEASE_TIME).await?;
    let installed = Installation { target, session: &session }.run(image).await;
    let closed = session.close().await.map_err(Error::from);
    installed.and(closed)
}

/// A pull under way.
struct Installation<'a> {
    target: &'a Target,
    session: &'a Session,
}

impl Installation<'_> {
    async fn run(&self, image: &ImageContent) -> Result<(), Error> {
        let top = image.manifests.first().ok_or_else(|| no_manifest(image))?;
        let chain: Vec<Digest> = links(&image.diff_ids).iter().map(|link| link.chain_id).collect();
        for (document, labels) in labelled(image, &self.target.snapshotter, chain.last()) {
            self.session.write(document, labels).await?;
        }
        for (i, chain_id) in chain.iter().enumerate() {
            let parent = i.checked_sub(1).map(|below| chain[below]);
            self.prepare(image, i, *chain_id, parent).await?;
        }
        Ok(self.session.record(&image.reference.to_string(), top.descriptor()).await?)
    }

    /// Makes the snapshot of layer `i`, unless containerd has it.
    async fn prepare(
        &self,
        image: &ImageContent,
        i: usize,
        chain_id: Digest,
        parent: Option<Digest>,
    ) -> Result<(), Error> {
        if self.has_snapshot(chain_id).await? {
            return Ok(());
        }
        let key = format!("extract-{} {chain_id}", unique());
        let request = PrepareSnapshotRequest {
            snapshotter: self.target.snapshotter.clone(),
            key: key.clone(),
            parent: parent.map_or_else(String::new, |parent| parent.to_string()),
            labels: layer_labels(image, i, chain_id),
        };
        let mut snapshots = SnapshotsClient::new(self.session.containerd.clone());
        let layer = image.layers[i].digest;
        match snapshots.prepare(self.session.request(request)).await {
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(source) => {
                let image = &image.reference;
                Err(failed(&format!("prepare layer {layer} of {image}"), source).into())
            }
            Ok(_) => {
                let snapshotter = self.target.snapshotter.clone();
                let remove = RemoveSnapshotRequest { snapshotter: snapshotter.clone(), key };
                let removed = snapshots.remove(self.session.request(remove)).await;
                removed.map_err(|source| failed("remove an unused snapshot", source))?;
                Err(Error::NotLazy { image: image.reference.clone(), layer, snapshotter })
            }
        }
    }

    async fn has_snapshot(&self, chain_id: Digest) -> Result<bool, Error> {
        let request = StatSnapshotRequest {
            snapshotter: self.target.snapshotter.clone(),
            key: chain_id.to_string(),
        };
        let mut snapshots = SnapshotsClient::new(self.session.containerd.clone());
        match snapshots.stat(self.session.request(request)).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(source) => Err(failed(&format!("look up snapshot {chain_id}"), source).into()),
        }
    }
}

/// Each document of `image`, with the labels by which containerd's garbage collector follows it.
fn labelled<'a>(
    image: &'a ImageContent,
    snapshotter: &str,
    top_chain_id: Option<&Digest>,
) -> Vec<(&'a Document, Labels)> {
    let source = source_label(&image.reference.host, &image.reference.repository);
    let layers: Vec<Digest> = image.layers.iter().map(|layer| layer.digest).collect();
    let mut documents = linked(&image.manifests, &image.config, &layers);
    for (_, labels) in &mut documents {
        labels.extend([source.clone()]);
    }
    if let Some((chain_id, (_, config))) = top_chain_id.zip(documents.first_mut()) {
        let key = format!("containerd.io/gc.ref.snapshot.{snapshotter}");
        config.insert(key, chain_id.to_string());
    }
    documents
}

/// An image's documents, each with the labels that lead the garbage collector from it to what it refers to;
/// from the config and the manifest up, so that whatever is stored has all that it refers to.
pub(crate) fn linked<'a>(
    manifests: &'a [Document],
    config: &'a Document,
    layers: &[Digest],
) -> Vec<(&'a Document, Labels)> {
    let mut documents = vec![(config, Labels::new())];
    for (depth, document) in manifests.iter().enumerate().rev() {
        let mut labels = Labels::new();
        match manifests.get(depth + 1) {
            Some(child) => {
                labels.insert("containerd.io/gc.ref.content.m.0".into(), child.digest.to_string());
            }
            None => {
                let config = config.digest.to_string();
                labels.insert("containerd.io/gc.ref.content.config".into(), config);
                for (i, layer) in layers.iter().enumerate() {
                    let key = format!("containerd.io/gc.ref.content.l.{i}");
                    labels.insert(key, layer.to_string());
                }
            }
        }
        documents.push((document, labels));
    }
    documents
}

/// What CRI tells a snapshotter of a layer, from containerd 1.4 on.
fn layer_labels(image: &ImageContent, i: usize, chain_id: Digest) -> Labels {
    let manifest = image.manifests.last().map(|m| m.digest.to_string()).unwrap_or_default();
    let mut layers = String::new();
    for layer in &image.layers[i..] {
        let digest = layer.digest.to_string();
        if layers.len() + 1 + digest.len() > LAYERS_LABEL_LEN {
            break;
        }
        if !layers.is_empty() {
            layers.push(',');
        }
        layers.push_str(&digest);
    }
    Labels::from([
        (REFERENCE_LABEL.to_owned(), chain_id.to_string()),
        (REQUIRED_LABEL.to_owned(), "true".to_owned()),
        ("containerd.io/snapshot/cri.image-ref".to_owned(), image.reference.to_string()),
        ("containerd.io/snapshot/cri.manifest-digest".to_owned(), manifest),
        ("containerd.io/snapshot/cri.layer-digest".to_owned(), image.layers[i].digest.to_string()),
        ("containerd.io/snapshot/cri.image-layers".to_owned(), layers),
    ])
}

fn no_manifest(image: &ImageContent) -> Error {
    Error::NoManifest { image: image.reference.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Document {
        Document {
            media_type: "application/json".to_owned(),
            digest: Digest::of(text.as_bytes()),
            bytes: text.as_bytes().to_vec(),
        }
    }

    fn image(layers: usize) -> ImageContent {
        let layer = |i: usize| LayerDescriptor {
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            digest: Digest::of(&i.to_le_bytes()),
            size: 1,
            toc_digest: None,
        };
        ImageContent {
            reference: "localhost:5000/app:v1".parse().unwrap(),
            manifests: vec![document("index"), document("manifest")],
            config: document("config"),
            diff_ids: (0..layers).map(|i| Digest::of(format!("{i}").as_bytes())).collect(),
            layers: (0..layers).map(layer).collect(),
        }
    }

    #[test]
    fn children_are_stored_before_what_refers_to_them() {
        let image = image(2);
        let documents = labelled(&image, "skimmer", Some(&image.diff_ids[1]));
        let order: Vec<Digest> = documents.iter().map(|(d, _)| d.digest).collect();
        let expected = [&image.config, &image.manifests[1], &image.manifests[0]];
        assert_eq!(order, expected.map(|d| d.digest));
        let manifest = &documents[1].1;
        assert_eq!(
            manifest["containerd.io/gc.ref.content.config"],
            image.config.digest.to_string()
        );
        assert_eq!(
            manifest["containerd.io/gc.ref.content.l.1"],
            image.layers[1].digest.to_string()
        );
        assert_eq!(
            documents[2].1["containerd.io/gc.ref.content.m.0"],
            image.manifests[1].digest.to_string()
        );
        assert_eq!(
            documents[0].1["containerd.io/gc.ref.snapshot.skimmer"],
            image.diff_ids[1].to_string()
        );
        for (_, labels) in &documents {
            assert_eq!(labels["containerd.io/distribution.source.localhost"], "app");
        }
    }

    #[test]
    fn no_label_is_longer_than_containerd_takes() {
        let image = image(128);
        for (key, value) in layer_labels(&image, 0, image.diff_ids[0]) {
            assert!(key.len() + value.len() <= 4096, "{key}");
            assert!(!value.is_empty(), "{key}");
        }
    }
}
