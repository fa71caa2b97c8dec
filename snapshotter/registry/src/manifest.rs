//! What manifests, indexes and configurations say (OCI image-spec, Docker manifest v2 schema 2). Pure.

use std::collections::BTreeMap;

use serde::Deserialize;
use skimmer_proto::{Digest, Platform};

use crate::media::{self, LayerKind, ManifestKind};

/// A reference to content: OCI image-spec, descriptor.md.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// What kind of layer this describes; an error says why it is none that can be used.
    pub fn layer_kind(&self) -> Result<LayerKind, media::Error> {
        LayerKind::of(&self.media_type)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("not a JSON document of the expected form (line {line})")]
    Json { line: usize },
    #[error("descriptor of {what} names no digest that can be used")]
    Digest { what: String, source: skimmer_proto::digest::Error },
    #[error(transparent)]
    Media(#[from] media::Error),
    #[error("it claims to be {claimed}, but it was served as {served}")]
    Ambiguous { claimed: String, served: String },
    #[error("it is both an index and a manifest, which means different images to different tools")]
    TwoKinds,
    #[error("it lists neither images nor layers with a configuration")]
    Incomplete,
    #[error("layer {number}, {digest}")]
    Layer { number: usize, digest: Digest, source: media::Error },
    #[error("no image for platform {wanted}; there is one for: {offered}")]
    Platform { wanted: Platform, offered: String },
    #[error("the configuration lists {diff_ids} DiffIDs for {layers} layers")]
    Count { diff_ids: usize, layers: usize },
}

/// An index's or a manifest's content.
#[derive(Debug)]
pub enum Manifest {
    Index(Vec<Entry>),
    Image { config: Descriptor, layers: Vec<Descriptor> },
}

/// One line of an index.
#[derive(Debug, Deserialize)]
pub struct Entry {
    #[serde(flatten)]
    raw: Raw,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    #[serde(default)]
    schema_version: Option<u64>,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<Vec<Entry>>,
    #[serde(default)]
    config: Option<Raw>,
    #[serde(default)]
    layers: Option<Vec<Raw>>,
}

/// Reads a manifest or index that was served as `served`, and says what its media type is.
pub fn parse(bytes: &[u8], served: &str) -> Result<(String, Manifest), Error> {
    let served = served.split(';').next().unwrap_or_default().trim();
    let written: Written =
        serde_json::from_slice(bytes).map_err(|e| Error::Json { line: e.line() })?;
    if written.schema_version == Some(1) {
        return Err(media::Error::Schema1(served.chars().take(100).collect()).into());
    }
    if written.manifests.is_some() && (written.layers.is_some() || written.config.is_some()) {
        return Err(Error::TwoKinds);
    }
    let shape = match written.manifests {
        Some(_) => "application/vnd.oci.image.index.v1+json",
        None => "application/vnd.oci.image.manifest.v1+json",
    };
    let claimed = written.media_type.filter(|claimed| !claimed.is_empty());
    let served_kind = ManifestKind::of(served);
    let media_type = match (&claimed, served_kind) {
        (Some(claimed), _) => claimed.clone(),
        (None, Ok(_) | Err(media::Error::Schema1(_))) => served.to_owned(),
        (None, Err(_)) => shape.to_owned(),
    };
    let kind = ManifestKind::of(&media_type)?;
    if kind != ManifestKind::of(shape)? || ManifestKind::of(served).is_ok_and(|s| s != kind) {
        let served = if served.is_empty() { shape } else { served };
        let short = |text: &str| text.chars().take(100).collect();
        return Err(Error::Ambiguous { claimed: short(&media_type), served: short(served) });
    }
    if let Some(entries) = written.manifests {
        return Ok((media_type, Manifest::Index(entries)));
    }
    let (Some(config), Some(layers)) = (written.config, written.layers) else {
        return Err(Error::Incomplete);
    };
    let image = image(config, layers)?;
    Ok((media_type, image))
}

fn image(config: Raw, layers: Vec<Raw>) -> Result<Manifest, Error> {
    let config = config.descriptor(|| "the configuration".to_owned())?;
    let mut described = Vec::new();
    for (at, layer) in layers.into_iter().enumerate() {
        let layer = layer.descriptor(|| format!("layer {at}"))?;
        let (number, digest) = (at, layer.digest);
        layer.layer_kind().map_err(|source| Error::Layer { number, digest, source })?;
        described.push(layer);
    }
    media::check_config(&config.media_type)?;
    Ok(Manifest::Image { config, layers: described })
}

impl Raw {
    fn descriptor(self, what: impl Fn() -> String) -> Result<Descriptor, Error> {
        let digest = self.digest.parse();
        Ok(Descriptor {
            digest: digest.map_err(|source| Error::Digest { what: what(), source })?,
            media_type: self.media_type,
            size: self.size,
            annotations: self.annotations.unwrap_or_default(),
        })
    }
}

/// The entry of an index that suits `wanted` best; entries without a platform come last.
pub fn choose(entries: Vec<Entry>, wanted: &Platform) -> Result<Descriptor, Error> {
    let rank = |entry: &Entry| {
        ManifestKind::of(&entry.raw.media_type).ok()?;
        match &entry.platform {
            Some(platform) => wanted.rank(platform),
            None => Some(u32::MAX),
        }
    };
    let mut offered: Vec<String> = entries
        .iter()
        .filter_map(|entry| entry.platform.as_ref())
        .filter(|platform| platform.os != "unknown")
        .map(|platform| platform.to_string().chars().take(60).collect())
        .collect();
    let ranked = entries.into_iter().filter_map(|entry| Some((rank(&entry)?, entry)));
    match ranked.min_by_key(|(rank, _)| *rank) {
        Some((_, entry)) => entry.raw.descriptor(|| format!("the image for {wanted}")),
        None => {
            offered.truncate(20);
            Err(Error::Platform { wanted: wanted.clone(), offered: offered.join(", ") })
        }
    }
}

/// The DiffIDs of a configuration, one for each of `layers` layers, lowest first.
pub fn diff_ids(config: &[u8], layers: usize) -> Result<Vec<Digest>, Error> {
    #[derive(Deserialize)]
    struct Config {
        rootfs: Rootfs,
    }
    #[derive(Deserialize)]
    struct Rootfs {
        #[serde(default)]
        diff_ids: Option<Vec<String>>,
    }
    let config: Config =
        serde_json::from_slice(config).map_err(|e| Error::Json { line: e.line() })?;
    let written = config.rootfs.diff_ids.unwrap_or_default();
    if written.len() != layers {
        return Err(Error::Count { diff_ids: written.len(), layers });
    }
    let what = || "a layer's DiffID".to_owned();
    let parsed = written.iter().map(|text| text.parse());
    parsed.map(|d| d.map_err(|source| Error::Digest { what: what(), source })).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
    const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

    fn descriptor(media_type: &str, of: &str) -> serde_json::Value {
        json!({"mediaType": media_type, "digest": Digest::of(of.as_bytes()).to_string(), "size": 7})
    }

    fn image(layer: &str) -> serde_json::Value {
        json!({"schemaVersion": 2, "config": descriptor(CONFIG, "c"), "layers": [descriptor(layer, "l")]})
    }

    #[test]
    fn tells_kinds_apart() {
        let docker = "application/vnd.docker.distribution.manifest.v2+json";
        let with_type = |mut value: serde_json::Value, media_type: &str| {
            value["mediaType"] = json!(media_type);
            value
        };
        let mut both = image(LAYER);
        both["manifests"] = json!([]);
        let rows = [
            (image(LAYER), IMAGE, Ok(IMAGE)),
            (image(LAYER), "application/json; charset=utf-8", Ok(IMAGE)),
            (with_type(image(LAYER), docker), docker, Ok(docker)),
            (json!({"manifests": []}), "", Ok(INDEX)),
            (with_type(image(LAYER), INDEX), IMAGE, Err("claims to be")),
            (image(LAYER), INDEX, Err("claims to be")),
            (both, IMAGE, Err("both an index and a manifest")),
            (json!({"schemaVersion": 1, "fsLayers": []}), "", Err("schema 1")),
            (image("application/vnd.in-toto+json"), IMAGE, Err("layer 0")),
            (json!({"schemaVersion": 2}), IMAGE, Err("lists neither images nor layers")),
            (json!("text"), IMAGE, Err("not a JSON document")),
        ];
        for (document, served, expected) in rows {
            let got = parse(document.to_string().as_bytes(), served);
            match (got, expected) {
                (Ok((media_type, _)), Ok(expected)) => assert_eq!(media_type, expected),
                (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{error}"),
                (got, expected) => panic!("{document}: {got:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn chooses_the_platform() {
        let entry = |platform: Option<&str>, of: &str| {
            let mut entry = descriptor(IMAGE, of);
            if let Some(platform) = platform {
                let parts: Vec<&str> = platform.split('/').collect();
                entry["platform"] =
                    json!({"os": parts[0], "architecture": parts[1], "variant": parts.get(2)});
            }
            entry
        };
        let check = |entries: Vec<serde_json::Value>, wanted: &str, expected: Option<&str>| {
            let document = json!({ "manifests": entries }).to_string();
            let Ok((_, Manifest::Index(entries))) = parse(document.as_bytes(), INDEX) else {
                panic!("{document}");
            };
            let chosen = choose(entries, &wanted.parse().unwrap());
            let expected = expected.map(|of| Digest::of(of.as_bytes()));
            assert_eq!(chosen.map(|d| d.digest).ok(), expected, "{wanted} of {document}");
        };
        let many = || {
            vec![
                entry(Some("unknown/unknown"), "attestation"),
                entry(Some("linux/arm/v6"), "v6"),
                entry(Some("linux/arm/v7"), "v7"),
                entry(Some("linux/amd64"), "amd64"),
                entry(Some("linux/amd64"), "second"),
                entry(Some("linux/arm64/v8"), "arm64"),
            ]
        };
        check(many(), "linux/amd64", Some("amd64"));
        check(many(), "linux/arm64", Some("arm64"));
        check(many(), "linux/arm/v8", Some("v7"));
        check(many(), "linux/arm/v6", Some("v6"));
        check(many(), "linux/riscv64", None);
        check(
            vec![entry(None, "any"), entry(Some("linux/amd64"), "it")],
            "linux/amd64",
            Some("it"),
        );
        check(vec![entry(None, "any")], "linux/amd64", Some("any"));
        check(vec![descriptor("application/x-artifact", "a")], "linux/amd64", None);
        check(vec![], "linux/amd64", None);
    }

    #[test]
    fn counts_diff_ids() {
        let id = Digest::of(b"x");
        let config =
            json!({"rootfs": {"type": "layers", "diff_ids": [id.to_string()]}}).to_string();
        assert_eq!(diff_ids(config.as_bytes(), 1).unwrap(), [id]);
        assert!(matches!(diff_ids(config.as_bytes(), 2), Err(Error::Count { .. })));
        let bad = config.replace("sha256", "sha1");
        assert!(matches!(diff_ids(bad.as_bytes(), 1), Err(Error::Digest { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>, served in ".{0,60}") {
            let _ = parse(&bytes, &served);
            let _ = diff_ids(&bytes, 1);
        }
    }
}
