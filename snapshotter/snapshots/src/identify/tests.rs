//! Requests, images and the way from one to the other.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use proptest::prelude::*;
use skimmer_proto::Digest;

use super::image::{self, chain};
use super::{Content, ContentError, Error, Finder, Image, Manifest, Request};
use crate::Labels;
use crate::snapshot::REFERENCE_LABEL;

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A content store in memory.
#[derive(Default)]
pub struct Shelf {
    blobs: Mutex<BTreeMap<Digest, Vec<u8>>>,
    manifests: Mutex<Vec<Manifest>>,
    names: Vec<String>,
}

impl Shelf {
    /// Adds an image with layers `(blob, diff)`; the newest goes first.
    pub fn add(&self, layers: &[(&str, &str)], sources: &[(&str, &str)]) -> Digest {
        let (manifest, config) = documents(layers, GZIP);
        let (digest, config_digest) = (Digest::of(&manifest), Digest::of(&config));
        let mut blobs = self.blobs.lock().unwrap();
        blobs.insert(digest, manifest);
        blobs.insert(config_digest, config);
        let sources = sources.iter().map(|(h, r)| ((*h).to_owned(), (*r).to_owned())).collect();
        let manifest = Manifest { digest, config: config_digest, sources };
        self.manifests.lock().unwrap().insert(0, manifest);
        digest
    }
}

#[async_trait]
impl Content for Shelf {
    async fn manifests(&self, _: &str) -> Result<Vec<Manifest>, ContentError> {
        Ok(self.manifests.lock().unwrap().clone())
    }

    async fn manifest(&self, _: &str, digest: &Digest) -> Result<Option<Manifest>, ContentError> {
        Ok(self.manifests.lock().unwrap().iter().find(|m| m.digest == *digest).cloned())
    }

    async fn read(&self, _: &str, digest: &Digest, _: u64) -> Result<Vec<u8>, ContentError> {
        let found = self.blobs.lock().unwrap().get(digest).cloned();
        found.ok_or(ContentError::Mismatch(*digest))
    }

    async fn leaves_ids_to_us(&self) -> Result<bool, ContentError> {
        Ok(true)
    }

    async fn image_names(&self, _: &str) -> Result<Vec<String>, ContentError> {
        Ok(self.names.clone())
    }
}

/// Manifest and config of an image.
fn documents(layers: &[(&str, &str)], media_type: &str) -> (Vec<u8>, Vec<u8>) {
    let digest = |text: &str| Digest::of(text.as_bytes()).to_string();
    let diff_ids: Vec<_> = layers.iter().map(|(_, diff)| digest(diff)).collect();
    let config =
        serde_json::json!({"os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let config = serde_json::to_vec(&config).unwrap();
    let layers: Vec<_> = layers
        .iter()
        .map(|(blob, _)| {
            serde_json::json!({"mediaType": media_type, "digest": digest(blob), "size": blob.len()})
        })
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "config": {"digest": Digest::of(&config).to_string()}, "layers": layers,
    });
    (serde_json::to_vec(&manifest).unwrap(), config)
}

/// The chain ID over these diffs.
pub fn chain_id(diffs: &[&str]) -> Digest {
    let layers: Vec<_> = diffs.iter().map(|diff| ("", *diff)).collect();
    chain(&documents(&layers, GZIP).1).unwrap().last().unwrap().chain_id
}

fn request(diffs: &[&str], hints: &[(&str, String)]) -> Result<Request, Error> {
    let mut labels: Labels = hints.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
    labels.insert(REFERENCE_LABEL.to_owned(), chain_id(diffs).to_string());
    let below = match diffs {
        [] | [_] => None,
        [below @ .., _] => Some(chain_id(below).to_string()),
    };
    Request::new("default/7/extract-1 sha256:x", &labels, below.as_deref())
}

async fn find(shelf: Shelf, request: &Request) -> Result<Vec<super::Found>, Error> {
    Finder::new(Arc::new(shelf)).find(request, None).await
}

#[test]
fn chain_ids_follow_the_image_spec() {
    let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
    assert_eq!(chain_id(&["a"]), a);
    assert_eq!(chain_id(&["a", "b"]), Digest::of(format!("{a} {b}").as_bytes()));
}

#[test]
fn the_namespace_is_in_the_key() {
    let labels = Labels::from([(REFERENCE_LABEL.to_owned(), chain_id(&["a"]).to_string())]);
    for key in ["k8s.io/1/x", "k8s.io/12/a/b c"] {
        assert_eq!(Request::new(key, &labels, None).unwrap().namespace, "k8s.io");
    }
    for key in ["", "x", "a/b", "a//b", "a/x/b", "/1/b", "/tmp/1/b"] {
        assert!(matches!(Request::new(key, &labels, None), Err(Error::Key(_))), "{key}");
    }
    assert!(matches!(Request::new("a/1/b", &Labels::new(), None), Err(Error::Digest { .. })));
}

#[tokio::test]
async fn finds_the_layer_and_those_above() {
    let shelf = Shelf::default();
    shelf.add(&[("A", "a"), ("B", "b"), ("C", "c")], &[("r.io", "x/y")]);
    shelf.add(&[("other", "z")], &[("r.io", "z")]);
    let found = find(shelf, &request(&["a", "b"], &[]).unwrap()).await.unwrap();
    let [found] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!(found.layer.blob.digest, Digest::of(b"B"));
    assert_eq!(found.layer.diff_id, Digest::of(b"b"));
    assert_eq!(found.layer.blob.origins[0].to_string(), "r.io/x/y");
    assert_eq!(found.above.len(), 1);
    assert_eq!(found.above[0].blob.digest, Digest::of(b"C"));
}

#[tokio::test]
async fn hints_choose_among_images_of_one_chain() {
    let manifest = "containerd.io/snapshot/cri.manifest-digest";
    let image = "containerd.io/snapshot/cri.image-ref";
    let shelf = || {
        let shelf = Shelf::default();
        let old = shelf.add(&[("honest", "a")], &[("r.io", "x")]);
        shelf.add(&[("poison", "a")], &[("r.io", "evil")]);
        (shelf, old)
    };
    let (newest, old) = shelf();
    let found = find(newest, &request(&["a"], &[]).unwrap()).await.unwrap();
    let blobs: Vec<_> = found.iter().map(|found| found.layer.blob.digest).collect();
    assert_eq!(blobs, [Digest::of(b"poison"), Digest::of(b"honest")]);
    let hints = [(manifest, old.to_string()), (image, "r.io:5000/x:t".to_owned())];
    let found = find(shelf().0, &request(&["a"], &hints).unwrap()).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].layer.blob.digest, Digest::of(b"honest"));
    assert_eq!(found[0].layer.image, "r.io:5000/x:t");
    assert_eq!(found[0].layer.blob.origins[0].to_string(), "r.io:5000/x");
}

#[tokio::test]
async fn says_why_a_layer_is_not_identified() {
    let check = async |layers: &[(&str, &str)], sources: &[(&str, &str)], wanted: &[&str]| {
        let shelf = Shelf::default();
        shelf.add(layers, sources);
        find(shelf, &request(wanted, &[]).unwrap()).await.unwrap_err()
    };
    let source = [("r.io", "x")];
    let error = check(&[("A", "a")], &source, &["b"]).await;
    assert!(matches!(error, Error::NoImage { .. }), "{error}");
    let error = check(&[("A", "a")], &[], &["a"]).await;
    assert!(matches!(error, Error::NoOrigin { .. }), "{error}");
    // The parent claims another chain.
    let shelf = Shelf::default();
    shelf.add(&[("A", "a"), ("B", "b")], &source);
    let mut wrong = request(&["a", "b"], &[]).unwrap();
    for below in [None, Some(chain_id(&["c"]))] {
        wrong.below = below;
        let shelf = Shelf::default();
        shelf.add(&[("A", "a"), ("B", "b")], &source);
        let error = find(shelf, &wrong).await.unwrap_err();
        assert!(matches!(error, Error::OtherParent { .. }), "{error}");
    }
}

#[test]
fn refuses_images_that_contradict_themselves() {
    let (manifest, _) = documents(&[("A", "a")], GZIP);
    let (_, config) = documents(&[("A", "a"), ("B", "b")], GZIP);
    let error = Image::new(&manifest, &config).unwrap_err();
    assert!(matches!(error, image::Error::Counts { layers: 1, diff_ids: 2 }), "{error}");
    assert!(matches!(chain(b"{}"), Err(image::Error::Config(_))));
    assert!(matches!(
        chain(br#"{"rootfs":{"type":"other","diff_ids":[]}}"#),
        Err(image::Error::RootFs(_))
    ));
    assert!(matches!(
        chain(br#"{"rootfs":{"type":"layers","diff_ids":["md5:1"]}}"#),
        Err(image::Error::Digest { .. })
    ));
}

#[test]
fn serves_tars_only() {
    for (media_type, servable) in [
        (GZIP, true),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", true),
        ("application/vnd.oci.image.layer.v1.tar+zstd", true),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", false),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", false),
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", false),
        ("", false),
    ] {
        let (manifest, config) = documents(&[("A", "a")], media_type);
        let image = Image::new(&manifest, &config).unwrap();
        assert_eq!(image.layers[0].is_servable(), servable, "{media_type}");
    }
}

proptest! {
    #[test]
    fn documents_never_panic(manifest: Vec<u8>, config: Vec<u8>, cut in 0usize..400) {
        let _either = Image::new(&manifest, &config);
        let (manifest, config) = documents(&[("A", "a"), ("B", "b")], GZIP);
        let config = &config[..cut.min(config.len())];
        let _either = Image::new(&manifest, config);
    }
}
