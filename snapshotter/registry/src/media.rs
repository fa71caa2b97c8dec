//! Media types: what a descriptor points at (OCI image-spec media-types.md, Docker's manifest v2).

/// What the Accept header of a manifest request asks for.
pub const MANIFEST_ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// How a layer's tar is compressed, by its media type. The bytes have the last word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerKind {
    Tar,
    TarGzip,
    TarZstd,
}

/// The two kinds of document under `/manifests/` that lead to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ManifestKind {
    /// An OCI index or a Docker manifest list.
    Index,
    /// The manifest of one image.
    Image,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error(
        "media type {0} is a foreign (non-distributable) layer: its bytes are not in the registry; \
         rebuild the image on a base image without such layers"
    )]
    Foreign(String),
    #[error("media type {0} is an encrypted layer, which is not supported")]
    Encrypted(String),
    #[error(
        "media type {0} is not a file-system layer: this is not a container image, but some other \
         artifact (an attestation, a chart, a signature)"
    )]
    NotALayer(String),
    #[error(
        "media type {0} is the obsolete schema 1 manifest; push the image again with a current tool"
    )]
    Schema1(String),
    #[error("media type {0} is neither an image manifest nor an image index")]
    NotAManifest(String),
    #[error("media type {0} is not an image configuration: this is some other artifact")]
    NotAConfig(String),
}

impl LayerKind {
    pub fn of(media_type: &str) -> Result<Self, Error> {
        let shown = || media_type.chars().take(100).collect();
        match media_type {
            "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.docker.image.rootfs.diff.tar" => Ok(Self::Tar),
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Ok(Self::TarGzip),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(Self::TarZstd),
            _ if media_type.contains(".nondistributable.") || media_type.contains(".foreign.") => {
                Err(Error::Foreign(shown()))
            }
            _ if media_type.ends_with("encrypted") => Err(Error::Encrypted(shown())),
            _ => Err(Error::NotALayer(shown())),
        }
    }
}

impl ManifestKind {
    pub fn of(media_type: &str) -> Result<Self, Error> {
        let shown = || media_type.chars().take(100).collect();
        match media_type {
            "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json" => Ok(Self::Index),
            "application/vnd.oci.image.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v2+json" => Ok(Self::Image),
            "application/vnd.docker.distribution.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v1+prettyjws" => {
                Err(Error::Schema1(shown()))
            }
            _ => Err(Error::NotAManifest(shown())),
        }
    }
}

/// Refuses configurations that aren't an image's.
pub fn check_config(media_type: &str) -> Result<(), Error> {
    match media_type {
        "application/vnd.oci.image.config.v1+json"
        | "application/vnd.docker.container.image.v1+json" => Ok(()),
        _ => Err(Error::NotAConfig(media_type.chars().take(100).collect())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_layers_from_other_things() {
        type Row<'a> = (&'a str, Result<LayerKind, fn(String) -> Error>);
        let rows: [Row<'_>; 10] = [
            ("application/vnd.oci.image.layer.v1.tar", Ok(LayerKind::Tar)),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Ok(LayerKind::TarGzip)),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Ok(LayerKind::TarZstd)),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Ok(LayerKind::TarGzip)),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Err(Error::Foreign)),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", Err(Error::Foreign)),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", Err(Error::Encrypted)),
            ("application/vnd.in-toto+json", Err(Error::NotALayer)),
            ("application/vnd.cncf.helm.chart.content.v1.tar+gzip", Err(Error::NotALayer)),
            ("", Err(Error::NotALayer)),
        ];
        for (input, expected) in rows {
            assert_eq!(LayerKind::of(input), expected.map_err(|e| e(input.to_owned())));
        }
    }

    #[test]
    fn knows_manifests() {
        for media_type in MANIFEST_ACCEPT.split(',').map(str::trim) {
            assert_eq!(ManifestKind::of(media_type).is_err(), media_type.starts_with('*'));
        }
        assert!(matches!(
            ManifestKind::of("application/vnd.docker.distribution.manifest.v1+prettyjws"),
            Err(Error::Schema1(_))
        ));
        assert!(check_config("application/vnd.cncf.helm.config.v1+json").is_err());
    }
}
