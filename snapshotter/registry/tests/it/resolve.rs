//! From references to images.

use std::collections::BTreeMap;
use std::error::Error as _;

use bytes::Bytes;
use futures::TryStreamExt;
use serde_json::{Value, json};
use skimmer_cache::source::{BlobKind, BlobRef, Class, Origin, Source};
use skimmer_proto::{Digest, Platform, Reference};
use skimmer_registry::resolve::Error;
use skimmer_registry::{LayerKind, Registry, Resolved, Shelf};

use crate::blobs::config;
use crate::server::{Answer, Server};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// Documents by path, with their types.
#[derive(Clone, Default)]
struct Content(BTreeMap<String, (String, String)>);

impl Content {
    fn put(&mut self, target: &str, media_type: &str, text: &str) {
        let kind = if media_type == CONFIG { "blobs" } else { "manifests" };
        let path = format!("/v2/a/b/{kind}/{target}");
        self.0.insert(path, (media_type.to_owned(), text.to_owned()));
    }

    /// Stores a document under its digest, and describes it.
    fn add(&mut self, media_type: &str, document: &Value) -> Value {
        let text = document.to_string();
        let digest = Digest::of(text.as_bytes()).to_string();
        self.put(&digest, media_type, &text);
        json!({"mediaType": media_type, "digest": digest, "size": text.len()})
    }

    /// An image with two layers.
    fn image(&mut self, architecture: &str) -> Value {
        let ids = [Digest::of(b"1").to_string(), Digest::of(b"2").to_string()];
        let config = json!({"architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids}});
        let config = self.add(CONFIG, &config);
        let layer = |of: &str| json!({"mediaType": LAYER, "digest": Digest::of(of.as_bytes()).to_string(), "size": 9});
        let layers = [layer("a"), layer("b")];
        self.add(
            MANIFEST,
            &json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}),
        )
    }

    /// Tags what `descriptor` describes.
    fn tag(&mut self, tag: &str, descriptor: &Value) {
        let digest = descriptor["digest"].as_str().unwrap();
        let document = self.0[&format!("/v2/a/b/manifests/{digest}")].clone();
        self.put(tag, &document.0, &document.1);
    }

    async fn serve(self) -> Server {
        Server::new(move |request, _| match self.0.get(&request.path) {
            Some((media_type, text)) => {
                Answer::new(200, text.as_str()).with("content-type", media_type)
            }
            None => Answer::new(
                404,
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#,
            ),
        })
        .await
    }
}

fn on(entry: &Value, architecture: &str) -> Value {
    let mut entry = entry.clone();
    entry["platform"] = json!({"os": "linux", "architecture": architecture});
    entry
}

async fn resolve(server: &Server, target: &str, platform: &str) -> Result<Resolved, Error> {
    let reference: Reference = format!("{}/a/b{target}", server.host()).parse().unwrap();
    let platform: Platform = platform.parse().unwrap();
    Registry::new(config()).resolve(&reference, Some(&platform)).await
}

async fn check_err(content: Content, expected: &[&str]) {
    let server = content.serve().await;
    let error = resolve(&server, ":tag", "linux/amd64").await.expect_err("an error");
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    for word in expected {
        assert!(text.contains(word), "{text}: {word}");
    }
    assert!(text.contains("a/b"), "the error names the image: {text}");
}

#[tokio::test]
async fn an_index_leads_to_the_platforms_image() {
    let mut content = Content::default();
    let (amd, arm) = (content.image("amd64"), content.image("arm64"));
    let inner = content.add(
        INDEX,
        &json!({"schemaVersion": 2, "manifests": [on(&arm, "arm64"), on(&amd, "amd64")]}),
    );
    let outer =
        content.add(INDEX, &json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [inner]}));
    content.tag("tag", &outer);
    let server = content.serve().await;
    for (architecture, image) in [("amd64", &amd), ("arm64", &arm)] {
        let got = resolve(&server, ":tag", &format!("linux/{architecture}")).await.unwrap();
        assert_eq!(got.top.descriptor.digest.to_string(), outer["digest"].as_str().unwrap());
        assert_eq!(got.top.descriptor.media_type, INDEX);
        assert_eq!(got.between.len(), 1);
        assert_eq!(got.between[0].descriptor.digest.to_string(), inner["digest"].as_str().unwrap());
        assert_eq!(got.manifest.descriptor.digest.to_string(), image["digest"].as_str().unwrap());
        for document in [&got.top, &got.between[0], &got.manifest, &got.config] {
            assert_eq!(Digest::of(&document.bytes), document.descriptor.digest);
            assert_eq!(document.bytes.len() as u64, document.descriptor.size);
        }
        assert_eq!(got.layers.len(), 2);
        assert_eq!(got.layers[0].layer_kind().unwrap(), LayerKind::TarGzip);
        assert_eq!(got.diff_ids, [Digest::of(b"1"), Digest::of(b"2")]);
        assert_eq!(got.origin.repository, "a/b");
    }
    let accept = server.requests()[0].header("accept").unwrap().to_owned();
    assert!(accept.contains(INDEX) && accept.contains("manifest.list.v2"), "{accept}");
    // By digest, with and without a tag.
    let digest = amd["digest"].as_str().unwrap();
    for target in [format!("@{digest}"), format!(":other@{digest}")] {
        let got = resolve(&server, &target, "linux/s390x").await.unwrap();
        assert_eq!(got.top, got.manifest);
        assert!(got.between.is_empty());
    }
}

#[tokio::test]
async fn what_is_no_image_is_refused() {
    let mut content = Content::default();
    let image = content.image("arm64");
    let index =
        content.add(INDEX, &json!({"manifests": [on(&image, "arm64"), on(&image, "s390x")]}));
    content.tag("tag", &index);
    check_err(
        content,
        &["no image for platform linux/amd64; there is one for: linux/arm64, linux/s390x"],
    )
    .await;

    check_err(Content::default(), &["manifests/tag does not exist: MANIFEST_UNKNOWN"]).await;

    for (media_type, text, words) in [
        (
            "application/vnd.docker.distribution.manifest.v1+prettyjws",
            r#"{"schemaVersion": 1}"#,
            "schema 1",
        ),
        ("text/html", "<html>", "not a JSON document"),
        (
            MANIFEST,
            r#"{"schemaVersion": 2, "manifests": [], "layers": []}"#,
            "both an index and a manifest",
        ),
        (
            "application/vnd.cncf.helm",
            r#"{"mediaType": "application/x"}"#,
            "neither an image manifest",
        ),
    ] {
        let mut content = Content::default();
        content.put("tag", media_type, text);
        check_err(content, &[words]).await;
    }

    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    for (layer, words) in [
        (foreign, "foreign (non-distributable) layer"),
        ("application/vnd.in-toto+json", "not a file-system layer"),
    ] {
        let mut content = Content::default();
        let config = content.add(CONFIG, &json!({}));
        let layer = json!({"mediaType": layer, "digest": Digest::of(b"x").to_string(), "size": 1});
        let image = content.add(MANIFEST, &json!({"config": config, "layers": [layer]}));
        content.tag("tag", &image);
        check_err(content, &["layer 0", words]).await;
    }

    let mut content = Content::default();
    let config = content.add(CONFIG, &json!({"rootfs": {"diff_ids": []}}));
    let layer = json!({"mediaType": LAYER, "digest": Digest::of(b"x").to_string(), "size": 1});
    let image = content.add(MANIFEST, &json!({"config": config, "layers": [layer]}));
    content.tag("tag", &image);
    check_err(content, &["lists 0 DiffIDs for 1 layers"]).await;
}

#[tokio::test]
async fn other_bytes_than_the_digests_are_refused() {
    // The manifest.
    let mut content = Content::default();
    let image = content.image("amd64");
    let index = content.add(INDEX, &json!({"manifests": [on(&image, "amd64")]}));
    content.tag("tag", &index);
    let honest = content.clone();
    let (digest, size) = (image["digest"].as_str().unwrap(), image["size"].as_u64().unwrap());
    content.put(digest, MANIFEST, &" ".repeat(usize::try_from(size).unwrap()));
    check_err(content.clone(), &["does not match its digest"]).await;
    content.put(digest, MANIFEST, "{}");
    check_err(content, &["has 2 bytes, but its descriptor says"]).await;

    // The configuration.
    let mut content = honest.clone();
    let manifest: Value =
        serde_json::from_str(&honest.0[&format!("/v2/a/b/manifests/{digest}")].1).unwrap();
    let config = &manifest["config"];
    let size = usize::try_from(config["size"].as_u64().unwrap()).unwrap();
    content.put(config["digest"].as_str().unwrap(), CONFIG, &" ".repeat(size));
    check_err(content, &["configuration", "does not match its digest"]).await;

    // What was asked for by digest.
    let mut content = Content::default();
    content.put(digest, MANIFEST, "{}");
    let server = content.serve().await;
    let error = resolve(&server, &format!("@{digest}"), "linux/amd64").await.unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
}

#[tokio::test]
async fn documents_are_bounded() {
    let server =
        Server::new(|_, _| Answer::raw(200, vec![b' '; 1 << 20], crate::server::Then::Endless))
            .await;
    let error = resolve(&server, ":tag", "linux/amd64").await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");

    // An index in an index in an index …
    let mut content = Content::default();
    let mut inner = content.image("amd64");
    for _ in 0..10 {
        inner = content.add(INDEX, &json!({"manifests": [inner]}));
    }
    content.tag("tag", &inner);
    check_err(content, &["leads through more than 4 indexes"]).await;
}

#[tokio::test]
async fn a_manifest_is_a_blob_too() {
    let mut content = Content::default();
    let image = content.image("amd64");
    let digest: Digest = image["digest"].as_str().unwrap().parse().unwrap();
    let text = content.0[&format!("/v2/a/b/manifests/{digest}")].1.clone();
    let server = content.serve().await;
    let origins = vec![Origin { host: server.host(), repository: "a/b".to_owned() }];
    let blob = BlobRef { digest, len: text.len() as u64, kind: BlobKind::Manifest, origins };
    let stream = Registry::new(config()).fetch(&blob, 5..20, Class::Background).await.unwrap();
    let chunks: Vec<Bytes> = stream.try_collect().await.unwrap();
    assert_eq!(chunks.concat(), text.as_bytes()[5..20]);
}

/// Documents by digest, and what it was asked for.
struct Shelved(BTreeMap<Digest, Bytes>, std::sync::Mutex<Vec<Digest>>);

#[async_trait::async_trait]
impl Shelf for Shelved {
    async fn find(&self, _: &Origin, digest: &Digest) -> Option<Bytes> {
        self.1.lock().unwrap().push(*digest);
        self.0.get(digest).cloned()
    }
}

#[tokio::test]
async fn what_is_on_the_shelf_is_not_asked_of_the_registry() {
    let mut content = Content::default();
    let image = content.image("amd64");
    let index =
        content.add(INDEX, &json!({"schemaVersion": 2, "manifests": [on(&image, "amd64")]}));
    content.tag("tag", &index);
    let all = content.0.values().map(|(_, text)| Bytes::from(text.clone()));
    let all: BTreeMap<Digest, Bytes> = all.map(|bytes| (Digest::of(&bytes), bytes)).collect();
    let wrong = all.keys().map(|digest| (*digest, Bytes::from_static(b"wrong"))).collect();
    let server = content.serve().await;
    let digest = index["digest"].as_str().unwrap();
    let platform = "linux/amd64".parse().unwrap();
    for (shelf, target, asked, requests) in [
        (all.clone(), format!("@{digest}"), 3, 0),
        (all, ":tag".to_owned(), 2, 1),
        (wrong, format!("@{digest}"), 3, 3),
        (BTreeMap::new(), format!("@{digest}"), 3, 3),
    ] {
        let before = server.requests().len();
        let shelf = Shelved(shelf, std::sync::Mutex::default());
        let reference: Reference = format!("{}/a/b{target}", server.host()).parse().unwrap();
        let registry = Registry::new(config());
        let resolved = registry.resolve_with(&reference, Some(&platform), &shelf).await.unwrap();
        assert_eq!(resolved.top.descriptor.digest.to_string(), digest);
        assert_eq!(resolved.top.descriptor.media_type, INDEX);
        assert_eq!(resolved.manifest.descriptor.media_type, MANIFEST);
        assert_eq!(resolved.layers.len(), 2);
        assert_eq!(shelf.1.into_inner().unwrap().len(), asked, "{target}");
        assert_eq!(server.requests().len() - before, requests, "{target}");
    }
}
